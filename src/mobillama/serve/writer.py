"""The text of an answer as its tokens come: whole characters, and nothing of what a stop text begins."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Writer:
    """Turns tokens into text, one answer.

    Args:
        token_bytes: the bytes of each id.
        stops: texts that end the answer and are no part of it.
    """

    def __init__(self, token_bytes: Sequence[bytes], stops: Sequence[str]) -> None:
        self._token_bytes, self._stops = token_bytes, stops
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # may turn out to begin a stop text
        self.stopped = False

    def write(self, token: int) -> str:
        """Return the text that a token makes certain; ``stopped`` tells whether a stop text came."""
        text = self._utf8.decode(self._token_bytes[token])
        return self._certain(text) if self._stops else text

    def finish(self) -> str:
        """Return what was held back, at the end of an answer; a cut character becomes U+FFFD."""
        text = self._certain(self._utf8.decode(b"", final=True))
        return text if self.stopped else text + self._held

    def _certain(self, text: str) -> str:
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max(map(len, self._stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        held = next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
