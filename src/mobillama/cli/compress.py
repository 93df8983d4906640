"""Verbs that make a model smaller: compress quantize."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mobillama.cli.verbs import add_group, add_verb, at_least, new_path

if TYPE_CHECKING:
    from mobillama.cli.verbs import Verbs

TYPES = ("q4_0", "q4_1", "q8_0")


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    group = add_group(verbs, "compress", "make a model smaller")
    verb = add_verb(
        group,
        "quantize",
        _quantize,
        "write a GGUF file of few bits, and what they cost on text held out (docs/on-device.md)",
    )
    verb.add_argument("model", type=Path, help="a model directory (a checkpoint's model/) or a GGUF file")
    verb.add_argument("out", type=new_path, help="the file to make; the figures go to OUT.json and its metadata")
    verb.add_argument(
        "--type", choices=TYPES, default="q4_0", help="of matrices; 4-bit types get a q8_0 head (default: %(default)s)"
    )
    verb.add_argument(
        "--method",
        choices=("rtn", "gptq"),
        default="gptq",
        help="rtn: round to nearest; gptq: calibrated, what codes do to outputs on text decides, which takes time "
        "(default: %(default)s)",
    )
    verb.add_argument(
        "--calibration",
        type=Path,
        metavar="DATA|TEXT",
        help="prepared data, or a text, JSON-lines or Parquet file or a directory of them; a part of it is held out to "
        "judge by (default: the packaged sample corpus)",
    )
    verb.add_argument(
        "--sequences", type=at_least(1), default=64, metavar="N", help="to calibrate on (default: %(default)s)"
    )
    verb.add_argument("--seed", type=at_least(0), default=0, help="of the draw of sequences (default: %(default)s)")
    verb.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")


def _quantize(args: argparse.Namespace) -> None:
    from mobillama.compress.quantize import quantize
    from mobillama.console import note, progress
    from mobillama.deploy.parity import Parity
    from mobillama.engine.blocks import TYPES as KINDS

    with progress() as show:
        facts = quantize(
            args.model,
            args.out,
            KINDS[args.type],
            args.method,
            args.calibration,
            args.sequences,
            args.seed,
            args.device,
            show,
        )
    for name, record in facts["held_out"].items():
        its = Parity(**record)
        cost = its.bits_per_byte_copy / its.bits_per_byte_model - 1
        note(
            f"held out, {name}: {its.bits_per_byte_model:.4f} → {its.bits_per_byte_copy:.4f} bits per byte ({cost:+.2%}) · "
            f"same likeliest token {its.top1_agreement:.2%} · KL {its.kl_nats_per_token:.2e} nats/token"
        )
    note(f"{args.out}: {facts['bytes'] / 1e6:,.1f} MB, {facts['bits_per_weight']:.2f} bits per weight")
    print(json.dumps({"out": str(args.out), **facts}))
