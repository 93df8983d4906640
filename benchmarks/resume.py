"""A run that is killed with SIGKILL and goes on: are the steps that are computed again the same, bit for bit?

    python benchmarks/resume.py kill RECIPE.yaml --after 335        # start the run, kill it after so many seconds
    python benchmarks/resume.py finish RECIPE.yaml                  # the same command again, to the end
    python benchmarks/resume.py report RUN --out docs/experiments/NAME

`kill` keeps the records as they were in RUN/killed-*.jsonl; `report` compares the ledger with the final one line by line and
writes summary.json, metrics.jsonl and metrics.png. Set train.deterministic in the recipe, or bits may differ on a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mobillama.config import load_recipe, read_mapping
from mobillama.console import note
from mobillama.recipe import PretrainRecipe
from mobillama.record.files import read_json, write_json
from mobillama.report.picture import draw_run


def kill(recipe: Path, after: float) -> None:
    """Start a run and kill it after ``after`` seconds."""
    run = Path(load_recipe(PretrainRecipe, recipe, []).run)
    process = subprocess.Popen([sys.executable, "-m", "mobillama", "pretrain", str(recipe)])
    time.sleep(after)
    process.kill()
    process.wait()
    for name in ("ledger.jsonl", "metrics.jsonl"):
        shutil.copy(run / name, run / f"killed-{name}")


def finish(recipe: Path) -> None:
    """Go on to the end."""
    subprocess.run([sys.executable, "-m", "mobillama", "pretrain", str(recipe)], check=True)


def report(run: Path, out: Path) -> None:
    """Compare what was computed before and after the kill, and draw the run."""
    before, after = _steps(run / "killed-ledger.jsonl"), _steps(run / "ledger.jsonl")
    recipe = read_mapping(run / "recipe.yaml")
    every = recipe["train"]["checkpoint_every"]
    resumed = max(before) // every * every
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in metrics if line["kind"] == "step"]
    killed = [json.loads(line) for line in (run / "killed-metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lost = [line for line in killed if line["kind"] == "step" and line["step"] > resumed]
    saves = [line for line in metrics if line["kind"] == "checkpoint" and line["seconds"]]
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "metrics.jsonl", out / "metrics.jsonl")
    write_json(
        out / "summary.json",
        {
            "environment": read_json(run / "environment.json"),
            "model": recipe["model"],
            "train": {k: recipe["train"][k] for k in ("batch_size", "micro_batch_size", "precision", "deterministic")},
            "steps": len(after),
            "tokens": steps[-1]["tokens"],
            "training_seconds": sum(line["seconds"] for line in [*steps, *lost]),
            "killed_after_step": max(before),
            "resumed_after_step": resumed,
            "computed_again": max(before) - resumed,
            "computed_again_with_equal_bits": sum(before[s] == after[s] for s in before if s > resumed),
            "lines_before_the_kill": len(before),
            "lines_equal": sum(before[s] == after[s] for s in before),
            "checkpoints": len([line for line in metrics if line["kind"] == "checkpoint"]),
            "checkpoint_seconds": [line["seconds"] for line in saves],
            "held_up_seconds": [line["held_up"] for line in saves],
            "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steps),
            "mfu": statistics.median(line["mfu"] for line in steps) if "mfu" in steps[0] else None,
            "kilojoules": sum(sum(line["joules"].values()) for line in steps if "joules" in line) / 1000,
            "data_wait_seconds": sum(line["data_wait"] for line in steps),
            "held_out_bits_per_byte": [(m["step"], m["bits_per_byte"]) for m in metrics if m["kind"] == "validation"],
        },
    )
    draw_run(run, out / "metrics.png", killed=max(before), resumed=resumed)
    note(f"{out}: written")


def _steps(ledger: Path) -> dict[int, dict[str, Any]]:
    lines = map(json.loads, ledger.read_text(encoding="utf-8").splitlines())
    return {
        line["step"]: {k: v for k, v in line.items() if k != "previous"} for line in lines if line["kind"] == "step"
    }


def main() -> None:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("kill", "finish"):
        part = parts.add_parser(name)
        part.add_argument("recipe", type=Path)
        if name == "kill":
            part.add_argument("--after", type=float, required=True, help="seconds")
    part = parts.add_parser("report")
    part.add_argument("run", type=Path)
    part.add_argument("--out", type=Path, required=True)
    words = vars(parser.parse_args())
    {"kill": kill, "finish": finish, "report": report}[words.pop("part")](**words)


if __name__ == "__main__":
    main()
