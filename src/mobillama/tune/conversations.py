"""Conversations from files and data sets, in OpenAI's form or ShareGPT's, each with its place of origin.

OpenAI: ``{"messages": [{"role": "user", "content": "…"}, …]}``, where ``"weight": 0`` marks an answer that is not to be
learned. ShareGPT: ``{"conversations": [{"from": "human", "value": "…"}, …]}``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobillama.data.archives import ARCHIVE_ERRORS, open_lines
from mobillama.data.documents import JSON_SUFFIXES, hub_commit, hub_dataset
from mobillama.errors import CorruptDataError, UsageError, cause
from mobillama.recipe import SourceConfig
from mobillama.record.files import canonical_json, sha256_file
from mobillama.tune.recipe import ChatSourceConfig

ROLES = {
    **{name: "system" for name in ("system", "developer")},
    **{name: "user" for name in ("user", "human")},
    **{name: "assistant" for name in ("assistant", "gpt", "chatgpt", "bing", "bard", "model")},
}
_SUFFIXES = (*JSON_SUFFIXES, ".json")


class RowFault(Exception):
    """What is wrong with a row, as a clause."""


@dataclass(frozen=True)
class Conversation:
    """Messages of alternating roles, the first of which may be the system's, up to the last answer."""

    messages: list[dict[str, str]]
    """``role`` and ``content`` of each."""
    is_learned: list[bool]
    """For each message whether it is an answer to learn."""
    has_lost_answer: bool = False
    """Whether it began with an answer, which has no question and was left out."""

    @property
    def digest(self) -> bytes:
        """Return 8 bytes that depend on what is said and by whom."""
        return hashlib.sha256(canonical_json(self.messages)).digest()[:8]


def describe_source(source: ChatSourceConfig, name: str) -> dict[str, Any]:
    """Return what a source is, by content: of a file its name, size and sha256; of a data set its commit or files.

    Raises:
        UsageError: there is no such file or data set.
    """
    path = Path(source.path)
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise UsageError(f"sources.{name}.path: {path} is none of {', '.join(_SUFFIXES)}; rename or convert it")
        for key in ("subset", "split", "revision"):
            if getattr(source, key) != getattr(ChatSourceConfig(""), key):
                raise UsageError(f"sources.{name}.{key}: has no effect on a file; remove it")
        return {"name": name, "file": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    if path.name.endswith(_SUFFIXES):
        raise UsageError(f"sources.{name}.path: {path} does not exist")
    described = {"name": name, "subset": source.subset, "split": source.split}
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {**described, "files": {file.relative_to(path).as_posix(): sha256_file(file) for file in files}}
    return {**described, "dataset": source.path, "revision": hub_commit(_hub(source))}


def read_conversations(source: ChatSourceConfig) -> Iterator[tuple[str, Conversation | RowFault | None]]:
    """Yield for each row its place and what it is: a conversation, a fault, or None where there is nothing to learn.

    Raises:
        UsageError: a data set cannot be opened.
        CorruptDataError: an archive is damaged, or a data set cannot be read to its end.
    """
    for place, row in _rows(source):
        try:
            yield place, row if isinstance(row, RowFault) else conversation_of(row)
        except RowFault as fault:
            yield place, fault


def conversation_of(row: Any) -> Conversation | None:
    """Return the conversation of a row, or None where it holds no answer to learn.

    Raises:
        RowFault: it is none.
    """
    key = next((key for key in ("messages", "conversations") if isinstance(row, dict) and key in row), None)
    if key is None:
        raise RowFault("has neither 'messages' nor 'conversations'")
    if not isinstance(row[key], list):
        raise RowFault(f"'{key}' is no list")
    messages: list[dict[str, str]] = []
    is_learned: list[bool] = []
    for number, message in enumerate(row[key]):
        role, content = _message(message, f"{key}[{number}]")
        if role == "system" and number:
            raise RowFault(f"{key}[{number}]: a system message must be the first")
        if messages and messages[-1]["role"] == role:
            raise RowFault(f"{key}[{number}]: two messages of the {role} in a row")
        messages.append({"role": role, "content": content})
        weight = message.get("weight")
        if weight not in (None, 0, 1):
            raise RowFault(f"{key}[{number}].weight: {weight!r:.40} is neither 0 nor 1")
        is_learned.append(role == "assistant" and bool(content.strip()) and weight != 0)
    first = next((number for number, message in enumerate(messages) if message["role"] != "system"), 0)
    lost = bool(messages) and messages[first]["role"] == "assistant"
    if lost:
        del messages[first], is_learned[first]
    end = len(is_learned) - next((n for n, learned in enumerate(reversed(is_learned)) if learned), len(is_learned))
    return Conversation(messages[:end], is_learned[:end], lost) if end else None


def _message(message: Any, place: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise RowFault(f"{place}: is no object with a role and a text")
    role_key, text_key = ("from", "value") if "from" in message else ("role", "content")
    said, content = message.get(role_key), message.get(text_key)
    if not isinstance(said, str) or said not in ROLES:
        raise RowFault(f"{place}.{role_key}: {said!r:.40} is none of {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)  # OpenAI's parts
    if not isinstance(content, str):
        raise RowFault(f"{place}.{text_key}: is no text")
    return ROLES[said], content


def _rows(source: ChatSourceConfig) -> Iterator[tuple[str, Any]]:
    path = Path(source.path)
    if not path.is_file():
        return _dataset_rows(source)
    return _list_rows(path) if path.name.endswith(".json") else _line_rows(path)


def _line_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with open_lines(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", _parsed(line)
    except ARCHIVE_ERRORS as error:
        raise CorruptDataError(f"{path}: damaged or truncated archive ({error}); fetch it again") from None


def _list_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = _parsed(path.read_bytes())
    if isinstance(rows, RowFault) or not isinstance(rows, list):
        said = f"{rows}" if isinstance(rows, RowFault) else "no list of conversations"
        raise UsageError(f"{path}: {said}; give a list, or a .jsonl file with a conversation on each line")
    for number, row in enumerate(rows, 1):
        yield f"{path}: item {number}", row


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowFault(f"not UTF-8 ({error})")
    except (ValueError, RecursionError) as error:
        return RowFault(f"not valid JSON ({getattr(error, 'msg', error)})")


def _dataset_rows(source: ChatSourceConfig) -> Iterator[tuple[str, Any]]:
    rows, number = hub_dataset(_hub(source)), 0
    try:
        for number, row in enumerate(rows, 1):
            yield f"{source.path}: row {number}", row
    except Exception as error:  # the library raises its own errors, those of every file format and the network's
        raise CorruptDataError(
            f"{source.path}: cannot be read after row {number} ({cause(error)}); fetch it again"
        ) from None


def _hub(source: ChatSourceConfig) -> SourceConfig:
    return SourceConfig(source.path, "huggingface", subset=source.subset, split=source.split, revision=source.revision)
