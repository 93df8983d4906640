"""Counts what two steps of a sharded model send, and writes it to a file; started by torchrun: RECIPE OUT OVERRIDES…"""

import json
import sys
from collections import Counter
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

from mobillama.config import load_recipe
from mobillama.data.dataset import Dataset
from mobillama.recipe import PretrainRecipe
from mobillama.train.step import Stepper
from mobillama.train.task import Pretraining
from mobillama.train.weights import fingerprint
from mobillama.train.world import join_world

recipe = load_recipe(PretrainRecipe, Path(sys.argv[1]), sys.argv[3:])


class Sent(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace in ("c10d", "_c10d_functional"):
            self.counts[str(operator).replace("_", "")] += 1
        return operator(*args, **(kwargs or {}))


with join_world("cpu") as world:
    stepper = Stepper(Pretraining(recipe, Dataset(Path(recipe.data))), world)
    before = fingerprint(stepper.model.state_dict(), world)
    for step in range(2):  # the first one sets FSDP up
        with Sent() as sent:
            computed = stepper.gradient(step)
        stepper.update(1e-3, computed)
    stepper.loader.close()
    if world.is_first:
        counts = dict(sent.counts)
        Path(sys.argv[2]).write_text(json.dumps({"counts": counts, "fingerprint": before}))
