"""Make a model directory of a preset with random weights: speed and memory do not depend on what the weights are.

    python benchmarks/random_model.py mobillama-0.5b runs/random-0.5b --tokenizer llama.model [--context 1024]

What is measured on it is to be recorded with --remark "random weights".
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from mobillama.data.tokenizer import load_tokenizer
from mobillama.directory import save_model
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import PRESETS
from mobillama.record.files import new_directory


def main() -> None:
    """Draw the weights and write the directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="of as many ids as the preset has")
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    config = dataclasses.replace(PRESETS[args.preset][0], max_position_embeddings=args.context)
    model = MobiLlama(config)
    initialise(model, config, 0)
    with new_directory(args.out) as work:
        save_model(work, config, model.to(torch.bfloat16).state_dict(), load_tokenizer(args.tokenizer))


if __name__ == "__main__":
    main()
