"""Answers in OpenAI's format: whole, or as the data of server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mobillama.serve.scheduler import Finish, LogProbability, Piece


@dataclass
class Choice:
    """One answer as it grows."""

    text: str = ""
    tokens: int = 0
    reason: str | None = None
    pieces: list[Piece] = field(default_factory=list)


class Answers:
    """The answers to one request.

    Args:
        model: its name.
        fingerprint: digest of its weights.
        token_bytes: the bytes of each id.
        prompt_tokens: of all prompts.
        choices: how many answers there are.
        is_chat: in the chat's format, or the completion's.
    """

    def __init__(
        self,
        model: str,
        fingerprint: str,
        token_bytes: Sequence[bytes],
        prompt_tokens: int,
        choices: int,
        is_chat: bool,
    ) -> None:
        self._token_bytes, self._is_chat, self._prompt_tokens = token_bytes, is_chat, prompt_tokens
        self.choices = [Choice() for _ in range(choices)]
        self._kind = "chat.completion" if is_chat else "text_completion"
        self._facts = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        chunk = _dumps({**self._facts, "object": self._chunk, "choices": []})
        self._begin, self._end = f"data: {chunk[:-2]}", f"{chunk[-2:]}\n\n"  # of every event, around its choice

    def take(self, index: int, events: Sequence[Piece | Finish]) -> None:
        """Add what came of one answer."""
        choice = self.choices[index]
        choice.text += "".join(event.text for event in events)
        for event in events:
            if isinstance(event, Finish):
                choice.reason = event.reason
            else:
                choice.tokens += 1
                if event.log_probability:
                    choice.pieces.append(event)

    def whole(self) -> dict[str, Any]:
        """Return the whole response."""
        choices = []
        for index, choice in enumerate(self.choices):
            message: dict[str, Any] = (
                {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
                if self._is_chat
                else {"text": choice.text}
            )
            known = self._log_probabilities(choice.pieces) if choice.pieces else None
            choices.append({"index": index, **message, "logprobs": known, "finish_reason": choice.reason})
        return {**self._facts, "object": self._kind, "choices": choices, "usage": self.usage()}

    def opening(self) -> bytes:
        """Return the events that begin a stream: of chats, the role of each answer."""
        role = {"role": "assistant", "content": ""}
        indices = range(len(self.choices) if self._is_chat else 0)
        return b"".join(self._event(index, role, None, None) for index in indices)

    def event(self, index: int, events: Sequence[Piece | Finish]) -> bytes:
        """Return what came of one answer as server-sent events; nothing where it says nothing."""
        text = "".join(event.text for event in events)
        pieces = [event for event in events if isinstance(event, Piece) and event.log_probability]
        known = self._log_probabilities(pieces) if pieces else None
        said = self._event(index, {"content": text}, known, None) if text or known else b""
        end = events[-1]
        return said + self._event(index, {}, None, end.reason) if isinstance(end, Finish) else said

    def usage_event(self) -> bytes:
        """Return the event that closes a stream whose usage was asked for."""
        return _sse({**self._facts, "object": self._chunk, "choices": [], "usage": self.usage()})

    def usage(self) -> dict[str, int]:
        """Return the counts of tokens."""
        said = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": said,
            "total_tokens": self._prompt_tokens + said,
        }

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self._is_chat else self._kind

    def _event(self, index: int, delta: dict[str, Any], known: Any, reason: str | None) -> bytes:
        content: dict[str, Any] = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        choice = {"index": index, **content, "logprobs": known, "finish_reason": reason}
        return (self._begin + _dumps(choice) + self._end).encode()

    def _log_probabilities(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        known = [piece.log_probability for piece in pieces if piece.log_probability]
        return self._chat_format(known) if self._is_chat else self._completion_format(known)

    def _chat_format(self, known: Sequence[LogProbability]) -> dict[str, Any]:
        def entry(token: int, value: float) -> dict[str, Any]:
            return {"token": self._text(token), "logprob": value, "bytes": list(self._token_bytes[token])}

        content = [
            {**entry(its.token, its.value), "top_logprobs": [entry(token, value) for token, value in its.top]}
            for its in known
        ]
        return {"content": content, "refusal": None}

    def _completion_format(self, known: Sequence[LogProbability]) -> dict[str, Any]:
        return {
            "tokens": [self._text(its.token) for its in known],
            "token_logprobs": [its.value for its in known],
            "top_logprobs": [{self._text(token): value for token, value in its.top} for its in known],
        }

    def _text(self, token: int) -> str:
        return self._token_bytes[token].decode("utf-8", errors="replace")


DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def _sse(value: Any) -> bytes:
    return b"data: " + _dumps(value).encode() + b"\n\n"


_dumps: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def error_event(body: dict[str, Any]) -> bytes:
    """Return an error that ends a stream."""
    return _sse(body)
