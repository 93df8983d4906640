"""Guessing ahead on a chat model: passes and speed with and without it, and greedy answers to look at.

    python benchmarks/lookup.py SmolLM2-135M-Instruct.Q4_1.gguf [--tokens 100]

Each prompt is answered greedily with several numbers of guesses, whose answers have to be the same to the token. Passes do not
depend on the machine; seconds do.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from mobillama.console import note
from mobillama.engine import NATIVE
from mobillama.engine.load import load_engine
from mobillama.engine.sampling import Sampling
from mobillama.engine.stream import Session, stream_tokens, text_of
from mobillama.record.environment import environment
from mobillama.record.files import write_json
from mobillama.serve.turns import turns_of

RESULTS = Path(__file__).parent / "results" / "lookup.json"
WIDTHS = (0, 8)
PASSAGE = (
    "The lighthouse at Cape Verne was built in 1823 by the engineer Thomas Alden. It stands 41 metres tall and was lit with "
    "whale oil until 1871, when paraffin lamps replaced it. The keeper's house burned down in 1902 and was rebuilt in brick. "
    "In 1956 the light was made automatic, and the last keeper, Mary Orr, left the cape."
)
THINGS = (
    "a lighthouse", "the Moon", "bread", "a bicycle", "rain", "a library", "the heart", "a volcano", "tea", "a bridge",
    "gravity", "a piano", "bees", "a desert", "glass", "a compass", "salt", "a glacier", "the number zero", "a clock",
)  # fmt: skip
KINDS = {
    "questions": (
        "What is {}?",
        "Why do people care about {}?",
        "Tell a short story about {}.",
        "Name three facts about {}.",
    ),
    "repeating": ("Repeat this text word for word, then say one sentence about {}:\n" + PASSAGE,),
}


class Counting(Session):
    """A session that counts passes and tokens fed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.passes = self.fed = 0

    def append(self, *tokens: int) -> Any:
        """Take in more tokens."""
        self.passes, self.fed = self.passes + 1, self.fed + len(tokens)
        return super().append(*tokens)


def main() -> None:
    """Answer, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--remark", default="")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    engine, tokenizer = load_engine(args.model, NATIVE)
    turns = turns_of(tokenizer)
    answers: dict[str, str] = {}
    found: dict[str, Any] = {}
    for kind, forms in KINDS.items():
        counts = {width: dict.fromkeys(("tokens", "passes", "fed", "seconds"), 0.0) for width in WIDTHS}
        for prompt in (form.format(thing) for form in forms for thing in THINGS):
            ids = turns.encode([{"role": "user", "content": prompt}], add_generation_prompt=True).ids
            said: list[list[int]] = []
            for width in WIDTHS:
                session = Counting(engine)
                session.set(ids)
                started = time.perf_counter()
                random = np.random.default_rng(0)
                tokens = stream_tokens(session, ids, turns.stop_ids, Sampling(0), args.tokens, random, width)
                said.append(list(tokens))
                seconds = time.perf_counter() - started
                if said[-1] != said[0]:
                    raise SystemExit(f"{prompt!r}: another answer with {width} guesses")
                its = (len(said[-1]), session.passes, session.fed, seconds)
                counts[width] = {key: held + new for (key, held), new in zip(counts[width].items(), its, strict=True)}
            answers[prompt] = "".join(text_of(said[0], tokenizer))
        found[kind] = {str(width): counted for width, counted in counts.items()}
        note(f"{kind}: {found[kind]}")
    facts = {"model": args.model.name, "remark": args.remark, "widths": found, "answers": answers}
    write_json(args.results, facts | {"environment": environment()})


if __name__ == "__main__":
    main()
