"""What the server counts, in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import sys
from collections import Counter

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters, each written by one thread only."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.prompt_tokens = self.reused_tokens = self.generated_tokens = self.steps = self.failures = 0
        self.step_seconds = 0.0
        self._first = [0] * (len(BUCKETS) + 1)
        self._first_sum = 0.0

    def count_prompt(self, tokens: int, reused: int) -> None:
        """Count a prompt, and how much of it a slot held already."""
        self.prompt_tokens += tokens
        self.reused_tokens += reused

    def count_step(self, seconds: float) -> None:
        """Count one feed of the engine."""
        self.steps += 1
        self.step_seconds += seconds

    def count_first(self, seconds: float) -> None:
        """Count a first token, by the time since its request arrived."""
        self._first[next((i for i, most in enumerate(BUCKETS) if seconds <= most), len(BUCKETS))] += 1
        self._first_sum += seconds

    def count_failure(self, error: Exception) -> None:
        """Count a failed step and say so; of prompts nothing is said."""
        self.failures += 1
        print(f"mobillama: the engine failed ({type(error).__name__}: {error})", file=sys.stderr, flush=True)

    def text(self, running: int, waiting: int) -> str:
        """Return all of it, with how many requests run and wait now."""
        lines: list[str] = []

        def add(name: str, kind: str, summary: str, values: dict[str, float]) -> None:
            lines.extend([f"# HELP mobillama_{name} {summary}", f"# TYPE mobillama_{name} {kind}"])
            lines.extend(f"mobillama_{name}{labels} {value}" for labels, value in values.items())

        add("requests_running", "gauge", "Requests in slots.", {"": running})
        add("requests_waiting", "gauge", "Requests in the queue.", {"": waiting})
        by_status = sorted(self.requests.copy().items())
        answered = {f'{{path="{path}",status="{status}"}}': float(count) for (path, status), count in by_status}
        add("requests_total", "counter", "Requests answered.", answered)
        add("prompt_tokens_total", "counter", "Tokens of prompts.", {"": self.prompt_tokens})
        add("prompt_tokens_reused_total", "counter", "Of these, held by a slot already.", {"": self.reused_tokens})
        add("generated_tokens_total", "counter", "Tokens of answers.", {"": self.generated_tokens})
        add("engine_steps_total", "counter", "Times the engine was fed.", {"": self.steps})
        add("engine_seconds_total", "counter", "Seconds that the engine computed.", {"": self.step_seconds})
        add("engine_failures_total", "counter", "Times the engine failed.", {"": self.failures})
        counts, seen = {}, 0
        for most, count in zip((*map(str, BUCKETS), "+Inf"), self._first, strict=True):
            seen += count
            counts[f'_bucket{{le="{most}"}}'] = float(seen)
        counts |= {"_sum": self._first_sum, "_count": seen}
        add("first_token_seconds", "histogram", "From a request's arrival to its first token.", counts)
        return "\n".join(lines) + "\n"
