"""Chat templates: a conversation as the ids that a model was tuned on.

A template is a program in Jinja that travels with the tokenizer (Hugging Face's ``chat_template.jinja``, a key of
``tokenizer_config.json``, or GGUF's ``tokenizer.chat_template``). It comes with a model from anywhere, so it runs in a
sandbox, in a process of its own, with limits on time, memory and output.

It never sees what people say. It is rendered with a private mark in place of each message, and the messages are put in
afterwards, as plain text: a message that spells ``<|im_end|>`` is no end mark. Beyond that, ids are those of transformers'
``apply_chat_template``: text between two special tokens is encoded as one piece, across the borders of messages.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import subprocess
import sys
import threading
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mobillama.data.tokenizer import TEMPLATE_FILE, Tokenizer
from mobillama.data.vocabulary import SPACE
from mobillama.errors import UsageError

ROLES = ("system", "user", "assistant")
DEFAULT = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
"""
"""For models that come without one: it needs no special token but the end mark, which closes every message, so that no
message can pretend to be two."""

Message = Mapping[str, str]
"""``role`` (one of :data:`ROLES`) and ``content``."""

_MOST_SOURCE = 1 << 18
_SECONDS = 2.0
_START_SECONDS = 20.0  # a busy machine is slow to start a process
_SHAPES, _LONGEST_SHAPE = 1024, 64  # conversations of as many shapes, of as many messages at most, are rendered once
# Characters of Unicode's private use, which no template writes, between white space that "trim" cuts and none writes either.
_MARK = re.compile("(\x1f?)\ue000(\\d+)\ue001(\x1f?)")


@dataclass(frozen=True)
class Encoded:
    """A conversation in ids."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """For each message where it stands in ``ids``, as a range: its text, and the end mark where one follows at once. For an
    assistant's message it is exactly what the model must learn to say: with white space before it where the prompt for an
    answer ends earlier (Vicuna's ends with ``ASSISTANT:``, and a space follows)."""


class _Piece(NamedTuple):
    text: str
    message: int | None  # whose text it is; None: the template's own


class _Place(NamedTuple):
    """Where the template puts a message, and on which sides it cuts white space."""

    message: int
    cuts_left: bool
    cuts_right: bool

    def filled(self, content: str) -> _Piece:
        content = content.lstrip() if self.cuts_left else content
        return _Piece(content.rstrip() if self.cuts_right else content, self.message)


class ChatTemplate:
    """The template of a tokenizer.

    Args:
        source: Jinja, at most 256 KiB.
        tokenizer: which it is for: its special tokens are those that the template may write.
        place: what to call the template in errors.

    Raises:
        UsageError: it is no valid template, breaks a limit, or leaves out what a user or the assistant says.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, place: str) -> None:
        if len(source) > _MOST_SOURCE:
            raise UsageError(
                f"{place}: a chat template of {len(source):,} characters; {_MOST_SOURCE:,} are the most that is taken"
            )
        self.source, self.place = source, place
        self._tokenizer, self._worker = tokenizer, _Worker(source)
        self._added = tokenizer.added_tokens
        self._lengths = [len(piece) for piece in tokenizer.token_bytes]
        names = {token: text for text, token in self._added.items()}
        bos = "" if tokenizer.bos_id is None else names.get(tokenizer.bos_id, "")
        self._variables = {"bos_token": bos, "eos_token": names.get(tokenizer.eos_id, "")}
        self._find_added = _any_of(self._added)
        # Tokens that a tokenizer finds in any text; the others it takes from the template alone.
        encoded = tokenizer.encode(list(self._added))
        found = (text for text, ids in zip(self._added, encoded, strict=True) if self._added[text] in ids)
        self._find_forged = _any_of(found)
        self._cached_skeleton = functools.lru_cache(_SHAPES)(self._render_skeleton)
        self._leads: dict[tuple[str, str], str] = {}
        probe = self.encode([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}])
        last = probe.ids[probe.spans[1][1] - 1]
        self.stop_ids = frozenset({tokenizer.eos_id} | ({last} & names.keys()))
        """Ids that end an answer: the end mark of a text, and what the template closes the assistant's messages with."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """Return the template that came with a tokenizer; None where there is none.

        Raises:
            UsageError: see the class.
        """
        source = tokenizer.chat_template
        if source is None:
            return None
        file = tokenizer.path.with_name(TEMPLATE_FILE)
        return cls(source, tokenizer, str(file) if file.is_file() else f"{tokenizer.path}: its chat template")

    @classmethod
    def default(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """Return this project's template, :data:`DEFAULT`."""
        return cls(DEFAULT, tokenizer, "the default chat template")

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Return a conversation as text, for people to read.

        Raises:
            UsageError: see :meth:`encode`.
        """
        return "".join(piece.text for piece in self._pieces(messages, add_generation_prompt))

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Encoded:
        """Return a conversation in ids.

        Args:
            messages: at least one.
            add_generation_prompt: end with what makes the model answer.

        Raises:
            UsageError: a message has no text or an unknown role, or the template refuses the conversation, fails, breaks a
                limit, or has no place for a message.
        """
        stretches, specials = self._stretches(self._pieces(messages, add_generation_prompt))
        encoded = self._tokenizer.encode(["".join(piece.text for piece in stretch) for stretch in stretches])
        ids: list[int] = []
        spans = [(0, 0)] * len(messages)
        ended: list[int] = []  # messages whose text ends where the ids end now
        for stretch, of_stretch, special in zip(stretches, encoded, [*specials, None], strict=True):
            of_stretch, borders = self._borders(stretch, of_stretch)
            ended = [] if of_stretch else ended
            for piece, (start, end) in zip(stretch, itertools.pairwise(borders), strict=True):
                if piece.message is not None and start < end:
                    first = spans[piece.message][0] if spans[piece.message][1] else len(ids) + start
                    spans[piece.message] = first, len(ids) + end
                    if end == len(of_stretch):
                        ended.append(piece.message)
            ids += of_stretch
            if special is not None:
                ids.append(special)
                for message in ended:
                    spans[message] = spans[message][0], len(ids)
        return Encoded(ids, spans)

    def _pieces(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[_Piece]:
        check_messages(messages)
        roles = tuple(message["role"] for message in messages)
        skeleton = self._skeleton(roles, add_generation_prompt)
        return [
            part if isinstance(part, _Piece) else part.filled(messages[part.message]["content"]) for part in skeleton
        ]

    def _skeleton(self, roles: tuple[str, ...], add_generation_prompt: bool) -> list[_Piece | _Place]:
        render = self._cached_skeleton if len(roles) <= _LONGEST_SHAPE else self._render_skeleton
        return render(roles, add_generation_prompt)

    def _render_skeleton(self, roles: tuple[str, ...], add_generation_prompt: bool) -> list[_Piece | _Place]:
        """Return the template's own text, cut where messages stand."""
        marked = [{"role": role, "content": f"\x1f\ue000{number}\ue001\x1f"} for number, role in enumerate(roles)]
        variables = {**self._variables, "messages": marked, "add_generation_prompt": add_generation_prompt}
        try:
            text = self._worker.render(variables)
        except _TemplateFault as error:
            raise UsageError(f"{self.place}: {error}") from None
        literal, *rest = _MARK.split(text)
        parts: list[_Piece | _Place] = []
        for left, number, right, following in zip(rest[0::4], rest[1::4], rest[2::4], rest[3::4], strict=True):
            message = int(number)
            lead = self._lead(roles[:message], literal) if roles[message] == "assistant" else ""
            parts += [_Piece(literal.removesuffix(lead), None), _Piece(lead, message)]
            parts.append(_Place(message, left == "", right == ""))
            literal = following
        parts.append(_Piece(literal, None))
        found = {part.message for part in parts if isinstance(part, _Place)}
        if missing := sorted(set(range(len(roles))) - found):
            role = roles[missing[0]]
            raise UsageError(f"{self.place}: has no place for messages[{missing[0]}], of the role '{role}'")
        return parts

    def _lead(self, roles: tuple[str, ...], literal: str) -> str:
        """Return the white space that the model says before an answer: what of the text before it is not in the prompt.

        It is found out once for each text between a message and an answer: a rendering more for each answer of a long
        conversation would take many seconds.
        """
        place = (roles[-1] if roles else "", literal)
        if place not in self._leads:
            if len(self._leads) == _SHAPES:  # a template that writes the time
                self._leads.clear()
            self._leads[place] = self._find_lead(roles, literal)
        return self._leads[place]

    def _find_lead(self, roles: tuple[str, ...], literal: str) -> str:
        try:
            prompt = self._skeleton(roles, True)[-1] if roles else _Piece(literal, None)
        except UsageError:  # it refuses a conversation that ends there
            return ""
        assert isinstance(prompt, _Piece)
        rest = literal.removeprefix(prompt.text)
        return rest if rest != literal and rest.isspace() else ""

    def _stretches(self, pieces: Iterable[_Piece]) -> tuple[list[list[_Piece]], list[int | None]]:
        """Return the stretches of text that are encoded whole, and the special token that stands after each but the last."""
        stretches: list[list[_Piece]] = [[]]
        specials: list[int | None] = []
        for text, message in pieces:
            if message is not None:
                cuts = [found.start() + 1 for found in self._find_forged.finditer(text)]
                for start, end in itertools.pairwise([0, *cuts, len(text)]):
                    if start:
                        stretches.append([])
                        specials.append(None)
                    stretches[-1].append(_Piece(text[start:end], message))
                continue
            start = 0
            for found in self._find_added.finditer(text):
                stretches[-1].append(_Piece(text[start : found.start()], None))
                stretches.append([])
                specials.append(self._added[found[0]])
                start = found.end()
            stretches[-1].append(_Piece(text[start:], None))
        return stretches, specials

    def _borders(self, stretch: list[_Piece], ids: list[int]) -> tuple[list[int], list[int]]:
        """Return a stretch's ids, and the borders of its pieces in them; a token is of the piece of its first byte."""
        starts = list(itertools.accumulate(map(self._lengths.__getitem__, ids), initial=0))
        total = starts.pop()
        for spelling in (SPACE, " "):  # sentencepiece takes the one for the other
            ends = list(itertools.accumulate(len(piece.text.replace(SPACE, spelling).encode()) for piece in stretch))
            before = total - ends[-1]
            if before in (0, 1):  # a space that the tokenizer puts in front
                return ids, [0, *(bisect_left(starts, end + before) if end else 0 for end in ends[:-1]), len(ids)]
        # The text has bytes that the vocabulary has no token for.
        parts = self._tokenizer.encode([piece.text for piece in stretch])
        return list(itertools.chain(*parts)), list(itertools.accumulate(map(len, parts), initial=0))


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse what is no conversation.

    Raises:
        UsageError: no messages, or one without text or with an unknown role.
    """
    if not messages:
        raise UsageError("messages: is empty; give at least one")
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UsageError(f"messages[{number}].role: {role!r:.40} is none of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UsageError(f"messages[{number}].content: is no text")
        if not _is_unicode(content):
            raise UsageError(f"messages[{number}].content: holds half a surrogate pair, which is no character")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


class _TemplateFault(Exception):
    """What a template did wrong."""


class _Worker:
    """The process that renders a template: started when it is first needed, and again after it was killed."""

    def __init__(self, source: str) -> None:
        self._source, self._lock = source, threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(self, variables: Mapping[str, object]) -> str:
        """Return what the template makes of its variables.

        Raises:
            _TemplateFault: it fails, or breaks a limit.
        """
        with self._lock:
            answer = self._ask(variables)
        if "error" in answer:
            raise _TemplateFault(answer["error"])
        return answer["text"]

    def _ask(self, request: object) -> dict[str, str]:
        if self._process is None:
            self._process = self._start()
            answer = self._exchange(self._source, _START_SECONDS)
            if "error" in answer:
                return answer
        return self._exchange(request, _SECONDS)

    def _exchange(self, request: object, seconds: float) -> dict[str, str]:
        process = self._process
        assert process and process.stdin and process.stdout
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return dict(json.loads(line))
        self._process = None
        _end(process)
        return {"error": f"takes more than {_SECONDS:.0f} s, or more memory than a template may have"}

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))]
        process = subprocess.Popen(  # noqa: S603  this file's neighbour
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in the terminal is not meant for it
        )
        weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
