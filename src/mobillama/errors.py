"""Errors that users meet, each with the exit code that the command line returns for it.

0 done · 2 wrong use or config · 3 verification failed · 4 data corrupt · 5 diverged · 75 stopped, run me again to
resume · 130/143 killed by the user.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable


class MobiLlamaError(Exception):
    """Base of all errors whose message alone tells the user what to do: one line, naming the place and the remedy."""

    exit_code = 2


class UsageError(MobiLlamaError):
    """Wrong use or configuration: a missing file, an unknown key, sizes that do not fit."""


class LockedError(UsageError):
    """Another process is at work in this place."""


class VerificationError(MobiLlamaError):
    """Something computed again differs from what a record says of it."""

    exit_code = 3


class CorruptDataError(MobiLlamaError):
    """Bytes on disk are not the bytes that were written."""

    exit_code = 4


class DivergedError(MobiLlamaError):
    """Training produced a loss or a gradient that is not finite, or a model logits that are not."""

    exit_code = 5


class Stopped(MobiLlamaError):
    """The run saved itself after a signal; the same command resumes it."""

    exit_code = 75


def cause(error: Exception) -> str:
    """Return the first line of another library's error, or its beginning up to a whole word, to stand in a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[0], 200, placeholder=" …")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name nearest to ``name``, or ``""`` when none is near.

    A dotted name is compared whole first, then by its last part, so ``train.lrr`` finds ``train.lr``.
    """
    candidates = list(known)
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if not near:
        by_leaf = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
        leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.6)
        near = [by_leaf[match] for match in leaf]
    return f" (did you mean '{near[0]}'?)" if near else ""
