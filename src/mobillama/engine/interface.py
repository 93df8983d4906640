"""What every engine answers, whatever computes below: torch now, others later. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Engine(Protocol):
    """One sequence being decoded: its keys and values are kept, so each token is computed once."""

    context_length: int
    vocab_size: int

    @property
    def length(self) -> int:
        """Number of tokens taken in."""
        ...

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Take in tokens after those already held; return the logits (vocabulary,) that follow the last.

        Raises:
            ValueError: no tokens, or more than ``context_length`` in all.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        ...
