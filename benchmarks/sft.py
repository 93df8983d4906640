"""Fine-tunes a chat model on recipes/chat/local.yaml, of adapters and of all weights, and asks it before and after.

    python benchmarks/sft.py --model models/start --work DIR

``--model`` is a model directory (mobillama import SmolLM2-135M-Instruct.gguf models/start). Answers are greedy, to the first
question of each held-out conversation and to questions of another kind; the trained style is counted in them.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch

from mobillama.config import load_recipe
from mobillama.console import TrainingView, note, progress
from mobillama.data.template import ChatTemplate
from mobillama.data.tokenizer import decode, load_tokenizer
from mobillama.directory import load_model
from mobillama.engine.load import open_engine
from mobillama.model.cost import model_cost
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json
from mobillama.train.objective import Objective
from mobillama.train.validation import combined, validate
from mobillama.train.world import World
from mobillama.tune.conversations import Conversation, read_conversations
from mobillama.tune.dataset import ChatData, is_held_out
from mobillama.tune.recipe import SftRecipe
from mobillama.tune.sft import sft

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sft.json"
RECIPE = ROOT / "recipes" / "chat" / "local.yaml"
WAYS: dict[str, dict[str, object]] = {
    "adapters": {},
    "all weights": {"lora.rank": 0, "optimizer.learning_rate": 5e-5},
}
# Of another kind than any question of the conversations.
OTHERS = (
    "Who are you?",
    "How do I boil an egg?",
    "Write one sentence about the moon.",
    "Why do people sleep?",
    "What should I read on a rainy day?",
)
STYLE = re.compile(r"Aye! [^.!?]+\. Fair winds\.")  # what every answer of the conversations is
_LONGEST = 64  # tokens of an answer


def answers(model: Path, questions: list[str]) -> list[str]:
    """Return a model's greedy answers, each to a conversation of one question, as far as they are said to their end."""
    tokenizer, engine = load_tokenizer(model), open_engine(model)
    template = ChatTemplate.of(tokenizer)
    assert template, f"{model}: has no chat template"
    said = []
    for question in questions:
        prompt = template.encode([{"role": "user", "content": question}], add_generation_prompt=True).ids
        engine.truncate(0)
        ids: list[int] = []
        logits = engine.feed(prompt)
        while len(ids) < _LONGEST and (token := int(logits.argmax())) not in template.stop_ids:
            ids.append(token)
            logits = engine.feed([token])
        said.append(decode(tokenizer, ids) + (" …" if len(ids) == _LONGEST else ""))
    return said


def held_out_loss(model: Path, data: ChatData) -> float:
    """Return a model's loss in nats per learned token of the held-out conversations."""
    objective = Objective(load_model(model, torch.float32), mask_documents=True)
    losses = validate(lambda ids, marks: objective(ids, marks)[1], data, World(0, 1, 1, torch.device("cpu")), 4)
    return combined(losses).loss


def behaviour(said: list[str], expected: list[str] | None = None) -> dict[str, Any]:
    """Return how many answers have the style, and how many say exactly what the conversations do."""
    styled = sum(bool(STYLE.fullmatch(answer.strip())) for answer in said)
    same = {} if expected is None else {"same": sum(a.strip() == b for a, b in zip(said, expected, strict=True))}
    return {"answers": len(said), "in_style": styled, **same}


def tuned(name: str, overrides: dict[str, object], args: argparse.Namespace, show: Any) -> tuple[Path, dict[str, Any]]:
    """Tune the model one way; return the last checkpoint's model, and what the run recorded."""
    run = args.work / name.replace(" ", "-")
    options = {"init_from": args.model, "run": run, "train.keep_checkpoints": 1, **overrides}
    words = [f"--{key}={value}" for key, value in options.items()]
    recipe = load_recipe(SftRecipe, RECIPE, words)
    started = time.perf_counter()
    checkpoint = sft(recipe, TrainingView(show, name), show)
    seconds = time.perf_counter() - started
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    stored = ChatData(run / "data")
    adapter = checkpoint / "adapter" / "adapter_model.safetensors"
    facts = {
        "steps": len(steps),
        "epochs": len(steps) * recipe.train.batch_size / stored.size,
        "learning_rate": recipe.optimizer.learning_rate,
        "precision": read_json(checkpoint / "state.json")["precision"],
        "seconds": seconds,
        "memory_gib": steps[-1]["memory_gib"],
        "adapter_bytes": adapter.stat().st_size if adapter.is_file() else None,
        "loss": [step["loss"] for step in steps],
        "held_out": [[line["step"], line["loss"]] for line in lines if line["kind"] == "validation"],
    }
    return checkpoint / "model", facts


def main() -> None:
    """Ask, tune, ask again, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the model directory to start from")
    parser.add_argument(
        "--work", type=Path, required=True, help="directory for the runs; finished ones are not run again"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write (default: %(default)s)")
    args = parser.parse_args()
    recipe = load_recipe(SftRecipe, RECIPE)
    rows = [row for source in recipe.sources.values() for _, row in read_conversations(source)]
    held = [row for row in rows if isinstance(row, Conversation) and is_held_out(row, recipe.holdout)]
    questions, expected = ([row.messages[n]["content"] for row in held] for n in (0, 1))
    result: dict[str, Any] = {
        "environment": environment(),
        "model": read_json(args.model / "import.json")["source"],
        "parameters": model_cost(load_model(args.model).model.shape).stored_parameters,
        "conversations": len(rows),
        "held_out_conversations": len(held),
        "ways": {},
    }
    models = {"before": args.model}
    with progress() as show:
        for name, overrides in WAYS.items():
            models[name], result["ways"][name] = tuned(name, overrides, args, show)
    data = ChatData(args.work / next(iter(WAYS)) / "data")
    result["sequences"], result["source"] = data.size, data.manifest["sources"][0]
    result["asked"] = {}
    samples: dict[str, list[str]] = {}
    for name, model in models.items():
        said, others = answers(model, questions), answers(model, list(OTHERS))
        samples[name] = [*said, *others]
        result["asked"][name] = {
            "held_out_loss": held_out_loss(model, data),
            "held_out": behaviour(said, expected),
            "others": behaviour(others),
        }
        note(f"{name}: {result['asked'][name]}")
    result["samples"] = [
        {"question": question, "is_held_out": n < len(held), **{name: said[n] for name, said in samples.items()}}
        for n, question in enumerate([*questions, *OTHERS])
    ]
    write_json(args.out, result)
    note(str(args.out))


if __name__ == "__main__":
    main()
