"""What is done about a step whose loss or gradient is not finite, or whose gradient is far above the usual."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from mobillama.recipe import FaultConfig

_REMEMBERED = 64  # gradient norms of accepted steps that a new one is compared with
_ENOUGH = 16


@dataclass
class Watch:
    """Judges each step, and remembers what it needs to judge the next the same way after a resume.

    The policy is a ladder: a bad step is skipped (its gradient thrown away); when more than ``max_skips`` follow one
    another, the run goes back to its last checkpoint and passes over the steps up to there; when that happened
    ``max_rollbacks`` times already, it stops.
    """

    policy: FaultConfig
    norms: list[float] = field(default_factory=list)
    skipped: int = 0
    """Bad steps in a row."""
    rollbacks: int = 0
    passed_over: int = 0
    """Steps up to this one are passed over: their data lead to where a rollback came from."""

    @property
    def limit(self) -> float:
        """The gradient norm above which the next step is bad."""
        if not self.policy.spike_factor or len(self.norms) < _ENOUGH:
            return math.inf
        return self.policy.spike_factor * statistics.median(self.norms)

    def judge(self, loss: float, norm: float) -> str:
        """Return why a step is bad, or ``""``; count it."""
        fault = ""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            fault = "not finite"
        elif norm > self.limit:
            fault = "spike"
        if fault:
            self.skipped += 1
        else:
            self.skipped = 0
            self.norms = [*self.norms, norm][-_REMEMBERED:]
        return fault

    @property
    def must_roll_back(self) -> bool:
        """Whether more bad steps followed one another than may be skipped."""
        return self.skipped > self.policy.max_skips

    def roll_back(self, step: int) -> None:
        """Count a rollback after ``step`` steps; they will be passed over."""
        self.rollbacks, self.passed_over, self.skipped = self.rollbacks + 1, step, 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        names = ("norms", "skipped", "rollbacks", "passed_over")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        for name, value in state.items():
            setattr(self, name, value)
