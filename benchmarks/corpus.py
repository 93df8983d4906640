"""The proofs of the data pipeline at full size: the seven sources of the paper's Table 2, about 480 MB of text.

    python benchmarks/corpus.py --corpus DIR --tokenizer llama.model --work /tmp/corpus [--part workers kills …]

Each part ends in facts that are true or not; all are written to benchmarks/results/corpus.json. Tests hold the same at
small size; this is the size that a user would meet.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mobillama.config import load_recipe, to_yaml
from mobillama.data.amber_export import export_amber
from mobillama.data.amber_import import import_amber
from mobillama.data.dataset import Dataset
from mobillama.data.rederive import rederive, sample_rows
from mobillama.data.verify import verify
from mobillama.recipe import CleanConfig, PrepareRecipe
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json
from mobillama.workflows.corpus import statistics

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "corpus.json"
KILLS = 20


class Proof:
    """The corpus, where to work, and what was found."""

    def __init__(self, corpus: Path, tokenizer: Path, work: Path, processes: int) -> None:
        self.work, self.processes = work, processes
        recipe = load_recipe(PrepareRecipe, ROOT / "recipes" / "corpus-local.yaml")
        sources = {
            name: dataclasses.replace(source, path=str(corpus / f"{name}.jsonl.xz"))
            for name, source in recipe.sources.items()
        }
        self.cleaned = dataclasses.replace(recipe, sources=sources, tokenizer=str(tokenizer))
        plain = {name: dataclasses.replace(source, clean=CleanConfig()) for name, source in sources.items()}
        self.plain = dataclasses.replace(self.cleaned, sources=plain)

    def command(self, name: str, recipe: PrepareRecipe, *options: str) -> list[str]:
        """Return the command that prepares ``recipe`` in ``work/name``."""
        path = self.work / f"{name}.yaml"
        path.write_text(to_yaml(recipe), encoding="utf-8")
        words = ["-m", "mobillama", "data", "prepare", str(path), "--out", str(self.work / name)]
        return [sys.executable, *words, "--workers", str(self.processes), *options]

    def prepare(self, name: str, recipe: PrepareRecipe, *options: str) -> dict[str, Any]:
        """Prepare in ``work/name`` unless it is there; return how long it took and the manifest's hash."""
        out = self.work / name
        if not out.exists():
            started = time.perf_counter()
            subprocess.run(self.command(name, recipe, *options), check=True, stdout=subprocess.DEVNULL)
            (self.work / f"{name}.seconds").write_text(str(time.perf_counter() - started))
        seconds = float((self.work / f"{name}.seconds").read_text())
        return {"seconds": round(seconds, 1), "manifest_sha256": _sha256(out / "manifest.json")}

    def statistics(self) -> dict[str, Any]:
        """The corpus, cleaned: its Table 2 and the share of each stage."""
        run = self.prepare("cleaned", self.cleaned)
        facts = statistics(Dataset(self.work / "cleaned"))
        del facts["data"]
        return {**run, **facts, "stage_seconds": read_json(self.work / "cleaned" / "preparation.json")["seconds"]}

    def workers(self) -> dict[str, Any]:
        """The same corpus with one worker: the same bytes."""
        one, many = self.prepare("one-worker", self.cleaned, "--workers", "1"), self.prepare("cleaned", self.cleaned)
        return {"one": one, "many": many, "identical_manifests": one["manifest_sha256"] == many["manifest_sha256"]}

    def ray(self) -> dict[str, Any]:
        """The same corpus on a Ray cluster started here: the same bytes."""
        here = self.prepare("cleaned", self.cleaned)
        there = self.prepare("ray", self.cleaned, "--executor", "ray")
        return {**there, "identical_manifests": there["manifest_sha256"] == here["manifest_sha256"]}

    def slurm(self) -> dict[str, Any]:
        """The same corpus as Slurm jobs, where SLURM_CONF and a partition named debug are there: the same bytes."""
        if shutil.which("sbatch") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
            return {"skipped": "no Slurm here"}
        here = self.prepare("cleaned", self.cleaned)
        there = self.prepare("slurm", self.cleaned, "--executor", "slurm", "--slurm-partition", "debug")
        return {**there, "identical_manifests": there["manifest_sha256"] == here["manifest_sha256"]}

    def kills(self) -> dict[str, Any]:
        """Killed with SIGKILL at 20 random moments and started again: the same bytes."""
        whole = self.prepare("plain", self.plain)
        shutil.rmtree(self.work / "killed", ignore_errors=True)
        shutil.rmtree(self.work / "killed.partial", ignore_errors=True)
        generator, moments, words = random.Random(0), [], self.command("killed", self.plain)
        while len(moments) < KILLS:
            process = subprocess.Popen(
                words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            wait = generator.uniform(0.5, 0.6 * whole["seconds"])
            try:
                process.wait(wait)
                shutil.rmtree(self.work / "killed")  # it got to its end before all kills were spent: from the start
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                moments.append(round(wait, 2))
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        digest = _sha256(self.work / "killed" / "manifest.json")
        return {
            "kills": len(moments),
            "seconds_before_each": moments,
            "identical_manifests": digest == whole["manifest_sha256"],
            "nothing_left_behind": not (self.work / "killed.partial").exists(),
        }

    def positions(self) -> dict[str, Any]:
        """1,000 random training positions made anew from raw documents, and everything hashed again."""
        self.prepare("cleaned", self.cleaned)
        started = time.perf_counter()
        facts = verify(self.work / "cleaned", self.processes, _silent)
        hashed = time.perf_counter() - started
        dataset = Dataset(self.work / "cleaned")
        equal = rederive(dataset, sample_rows(dataset, 1000, 0), {}, _silent)
        seconds = {"hash": round(hashed, 1), "make_anew": round(time.perf_counter() - started - hashed, 1)}
        return {"verified_bytes": facts["bytes"], "positions": 1000, "made_anew_and_equal": equal, "seconds": seconds}

    def amber(self) -> dict[str, Any]:
        """To LLM360's JSON lines and back: the same ids and sources, and the same lines once more."""
        self.prepare("cleaned", self.cleaned)
        first = Dataset(self.work / "cleaned")
        for name in ("amber", "back", "amber-again"):
            shutil.rmtree(self.work / name, ignore_errors=True)
        seconds = {"export": _seconds(lambda: export_amber(first, self.work / "amber", _silent))}
        tokenizer = Path(self.cleaned.tokenizer)
        seconds["import"] = _seconds(lambda: import_amber(self.work / "amber", tokenizer, self.work / "back", _silent))
        back = Dataset(self.work / "back")
        export_amber(back, self.work / "amber-again", _silent)
        names = [np.array(dataset.source_names) for dataset in (first, back)]
        same_ids = same_sources = first.size == back.size
        for start in range(0, first.size, 1024):
            rows = np.arange(start, min(start + 1024, first.size))
            same_ids &= bool(np.array_equal(first.read(rows), back.read(rows)))
            labels = [name[dataset.layout.source_of(rows)] for name, dataset in zip(names, (first, back), strict=True)]
            same_sources &= bool(np.array_equal(*labels))
        files = [path.name for path in sorted((self.work / "amber").glob("*.jsonl"))]
        same_lines = all(_sha256(self.work / "amber" / n) == _sha256(self.work / "amber-again" / n) for n in files)
        return {
            "sequences": first.size,
            "identical_ids": same_ids,
            "identical_sources": same_sources,
            "identical_root": first.root == back.root,
            "identical_lines_when_exported_again": same_lines,
            "seconds": seconds,
        }

    def chunks360(self) -> dict[str, Any]:
        """The paper's number of chunks."""
        run = self.prepare("chunks360", dataclasses.replace(self.plain, chunks=360))
        rows = [chunk["rows"] for chunk in Dataset(self.work / "chunks360").manifest["chunks"]]
        return {**run, "chunks": len(rows), "rows_of_a_chunk": [min(rows), max(rows)]}


def _silent(stage: str, done: float, total: float) -> None:
    pass


def _seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return round(time.perf_counter() - started, 1)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Run the parts asked for and write what they found."""
    parts = ("statistics", "workers", "ray", "slurm", "kills", "positions", "amber", "chunks360")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of NAME.jsonl.xz")
    parser.add_argument("--tokenizer", type=Path, required=True, help="LLaMA's tokenizer.model")
    parser.add_argument("--work", type=Path, required=True, help="scratch, about 6 GB; what it holds is used again")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    proof = Proof(args.corpus.absolute(), args.tokenizer.absolute(), args.work.absolute(), args.processes)
    results = read_json(RESULT) if RESULT.is_file() else {}
    for part in args.part:
        results[part] = {**getattr(proof, part)(), "environment": environment()}
        print(part, json.dumps(results[part], indent=2), flush=True)
        write_json(RESULT, results)


if __name__ == "__main__":
    main()
