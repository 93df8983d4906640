"""Writes the shared network's gradient of the first step to a file; started by torchrun: RECIPE OUT OVERRIDES…

Fused layers compute by their formulas here, where the kernels are missing.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import mobillama.train.step
from mobillama.config import load_recipe
from mobillama.data.dataset import Dataset
from mobillama.recipe import PretrainRecipe
from mobillama.train.step import Stepper
from mobillama.train.task import Pretraining
from mobillama.train.world import join_world

mobillama.train.step.require_hopper = lambda *facts: None
recipe = load_recipe(PretrainRecipe, Path(sys.argv[1]), sys.argv[3:])

with join_world("cpu") as world:
    stepper = Stepper(Pretraining(recipe, Dataset(Path(recipe.data))), world)
    stepper.gradient(0)
    stepper.loader.close()
    shared = {name: p.grad for name, p in stepper.model.named_parameters() if "ffns" in name}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in shared.items()}
    if world.is_first:
        save_file(whole, sys.argv[2])
