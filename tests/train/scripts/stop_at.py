"""Runs a recipe and asks it to stop after a step, as a scheduler would; started by torchrun: RECIPE STEP OVERRIDES…"""

import os
import signal
import sys
from pathlib import Path

from mobillama.config import load_recipe
from mobillama.errors import Stopped
from mobillama.recipe import PretrainRecipe
from mobillama.train.loop import Silent, pretrain

recipe = load_recipe(PretrainRecipe, Path(sys.argv[1]), sys.argv[3:])


class StopAt(Silent):
    def on_record(self, record):
        if record["kind"] == "step" and record["step"] == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGTERM)


try:
    pretrain(recipe, StopAt())
except Stopped:
    print("stopped")
