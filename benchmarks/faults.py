"""A soak of what goes wrong while training: kills, crashes at every border of a save, flipped and cut files.

    python benchmarks/faults.py --work DIR                 # all parts; about half an hour
    python benchmarks/faults.py --work DIR --parts flips

Runs a small model on a few sentences of the sample corpus, on the CPU, and writes how many faults were tried and what
became of them to benchmarks/results/faults.json. The borders of a save need strace.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mobillama.console import note, progress
from mobillama.data.prepare.pipeline import prepare
from mobillama.data.tokenizer import load_tokenizer
from mobillama.data.tokenizer_training import train_tokenizer
from mobillama.directory import save_model
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig, OptimizerConfig, PrepareRecipe, SourceConfig
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json
from mobillama.train.checkpoint import list_checkpoints, newest_whole_checkpoint, remove_leftovers
from mobillama.train.optimizer import build_optimizers
from mobillama.train.saver import Saver
from mobillama.train.world import World

RESULTS = Path(__file__).parent / "results" / "faults.json"
SAMPLE = Path(__file__).parents[1] / "src" / "mobillama" / "data" / "sample"
SHAPE = ModelConfig(512, 32, 48, 3, 2, max_position_embeddings=64)
CALLS = "write,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir,chmod,fchmod"


def prepared(work: Path) -> Path:
    """Return a recipe for a run of a few seconds, after preparing what it learns from."""
    texts = work / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for name in ("books", "code"):
        (texts / f"{name}.jsonl.xz").write_bytes((SAMPLE / f"{name}.jsonl.xz").read_bytes())
    if not (work / "data").exists():
        from mobillama.data.documents import read_texts

        train_tokenizer(read_texts([texts / "books.jsonl.xz"]), 512, work / "small.model")
        sources = {name: SourceConfig(str(texts / f"{name}.jsonl.xz")) for name in ("books", "code")}
        recipe = PrepareRecipe(sources=sources, tokenizer=str(work / "small.model"), sequence_length=65, chunks=3)
        prepare(recipe, work / "data")
    path = work / "recipe.yaml"
    path.write_text(
        f"data: {work / 'data'}\nrun: {work / 'whole'}\n"
        "model: {vocab_size: 512, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 3, num_attention_heads: 2,\n"
        "  max_position_embeddings: 64}\noptimizer: {learning_rate: 3.0e-3, warmup_steps: 3}\n"
        "train: {steps: 3200, batch_size: 8, micro_batch_size: 4, checkpoint_every: 8, keep_checkpoints: 3,\n"
        "  validate_every: 400, validate_sequences: 4, precision: float32, device: cpu}\n",
        encoding="utf-8",
    )
    return path


def kills(work: Path, show: Any, count: int = 200) -> dict[str, Any]:
    """Kill a run again and again, each third time when a save is seen under way; it must end as one that was left alone."""
    recipe = prepared(work)
    command = [sys.executable, "-m", "mobillama", "pretrain", str(recipe)]
    if not list_checkpoints(work / "whole" / "checkpoints"):
        subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(work / "killed", ignore_errors=True)
    command += ["--run", str(work / "killed")]
    checkpoints = work / "killed" / "checkpoints"
    choose = random.Random(0)
    inside = resumes = 0
    for number in range(count):
        show("kills", number, count, f"{inside} inside a save")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        resumes += _resumed(process)
        while not list_checkpoints(checkpoints):  # the first run's: each kill is followed by a resume
            time.sleep(0.01)
        if number % 3:
            time.sleep(choose.random() * 0.4)
        else:
            while process.poll() is None and not list(checkpoints.glob(".step-*.tmp")):
                time.sleep(0.0002)
            time.sleep(choose.random() * 0.008)
        if process.poll() is not None:
            raise SystemExit("the run ended before all kills; give it more steps")
        process.kill()
        process.wait()
        committed = {path for _, path in list_checkpoints(checkpoints)}
        inside += any(path not in committed for path in checkpoints.iterdir())
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    resumes += _resumed(process)
    process.communicate()
    if process.returncode:
        raise SystemExit(f"the last run ended with {process.returncode}")
    last = [_digests(list_checkpoints(work / name / "checkpoints")[-1][1]) for name in ("killed", "whole")]
    return {
        "kills": count,
        "inside_a_save": inside,
        "resumes": resumes,
        "same_ledger": (work / "killed" / "ledger.jsonl").read_bytes()
        == (work / "whole" / "ledger.jsonl").read_bytes(),
        "same_weights_and_moments": last[0] == last[1],
        "left_behind": len(list(checkpoints.glob(".*"))),
    }


def _resumed(process: subprocess.Popen[str]) -> bool:
    """Wait until a run starts to train; tell whether it went on from a checkpoint."""
    resumed = False
    for line in process.stderr or ():
        resumed |= "resuming after" in line
        if line.startswith("pretrain"):
            break
    return resumed


def _digests(path: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(path.rglob("*.safetensors"))}


def save_once(directory: Path, tokenizer: Path, step: int) -> None:
    """Save a checkpoint of a model drawn from the step's seed, after one update."""
    model = MobiLlama(SHAPE)
    initialise(model, SHAPE, step)
    optimizers = build_optimizers(model, OptimizerConfig())
    model(torch.arange(8)[None]).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    made = load_tokenizer(tokenizer)
    alone = World(0, 1, 1, torch.device("cpu"))
    saver = Saver(directory, alone, lambda work, weights: save_model(work / "model", SHAPE, weights, made), 2)
    saver.start(step, model, optimizers, {})
    saver.wait()


def borders(work: Path, show: Any) -> dict[str, Any]:
    """Kill a save at each of its system calls that changes a disk, one after another."""
    prepared(work)
    directory, tokenizer = work / "borders", work / "small.model"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    save_once(directory, tokenizer, 1)
    whole = _digests(directory / "step-000001")
    command = [sys.executable, __file__, "--work", str(work), "--save", "2"]
    tried = old = new = 0
    while True:
        tried += 1
        inject = ["-e", f"trace={CALLS}", "-e", f"inject={CALLS}:signal=KILL:when={tried}"]
        done = subprocess.run(["strace", "-f", "-qq", "-o", "/dev/null", *inject, *command], capture_output=True)
        path, damaged = newest_whole_checkpoint(directory)
        if path is None or damaged:
            raise SystemExit(f"call {tried}: {path}, {damaged}")
        old, new = old + (path.name == "step-000001"), new + (path.name == "step-000002")
        if _digests(directory / "step-000001") != whole:
            raise SystemExit(f"call {tried}: the old checkpoint was changed")
        show("borders", tried, max(tried + 1, 150), f"{new} after the commit")
        if done.returncode == 0:
            return {"borders": tried - 1, "old_one_used": old, "new_one_whole": new - 1, "half_one_loaded": 0}
        shutil.rmtree(directory / "step-000002", ignore_errors=True)
        remove_leftovers(directory)


def flips(work: Path, show: Any) -> dict[str, Any]:
    """Flip 1,000 bits and cut 16 times in each file of a checkpoint: each time the one before must be used."""
    prepared(work)
    directory = work / "flips"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for step in (1, 2):
        save_once(directory, work / "small.model", step)
    victim, choose = directory / "step-000002", random.Random(0)
    files = sorted(path for path in victim.rglob("*") if path.is_file())
    tried = found = 0
    for number, file in enumerate(files):
        show("flips", number, len(files), file.name)
        content = file.read_bytes()
        bits = choose.sample(range(len(content) * 8), min(1000, len(content) * 8))
        harmed = [_flipped(content, bit) for bit in bits]
        harmed += [content[: choose.randrange(len(content))] for _ in range(16)]
        for wrong in harmed:
            file.write_bytes(wrong)
            tried += 1
            path, _ = newest_whole_checkpoint(directory)
            found += path is not None and path.name == "step-000001"
        file.write_bytes(content)
    return {"files": len(files), "faults": tried, "caught": found}


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


PARTS = {"flips": flips, "borders": borders, "kills": kills}


def main() -> None:
    """Run the parts and add what they found to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a directory for the runs; kept between parts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--save", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work.resolve()
    torch.set_num_threads(1)
    if args.save:
        save_once(work / "borders", work / "small.model", args.save)
        return
    for name in args.parts:
        started = time.monotonic()
        with progress() as show:
            found = PARTS[name](work, show)
        found |= {"seconds": round(time.monotonic() - started), "environment": environment()}
        known = read_json(RESULTS) if RESULTS.is_file() else {}
        write_json(RESULTS, {**known, name: found})
        note(f"{name}: {json.dumps({k: v for k, v in found.items() if k != 'environment'})}")


if __name__ == "__main__":
    main()
