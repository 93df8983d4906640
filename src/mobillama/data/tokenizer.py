"""Tokenizers: text to ids and back, byte for byte.

A sentencepiece ``.model`` is encoded by sentencepiece itself, the oracle for LLaMA's ids. It is exported beside as a
``tokenizer.json`` that gives the same ids (transformers' own conversion orders merges by id, LLaMA orders them by score,
and so differs on runs of spaces). What decodes a model reads only ``tokenizer.json``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mobillama.data.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    Vocabulary,
    describe,
    describe_config,
    vocabulary_of,
)
from mobillama.errors import CorruptDataError, UsageError
from mobillama.record.files import json_text, read_json

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    path: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int
    chat_template: str | None
    """Jinja that turns a conversation into text (:mod:`mobillama.data.template`); it is saved with the tokenizer."""

    @property
    def files(self) -> dict[str, bytes]:
        """What it is saved as, by name, but for a chat template: made once, since a run's checkpoints all carry it."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens; text that spells one is ordinary text."""
        ...

    def encode_packed(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text as :func:`id_type` integers: the fast way, for preparing data on one core."""
        ...

    @property
    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for; special tokens stand for none."""
        ...

    @property
    def added_tokens(self) -> dict[str, int]:
        """The spelling and id of tokens that stand beside the vocabulary proper: special tokens and a user's own."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """What defines the tokenizer.

        Raises:
            UsageError: it is of a type that is not known.
        """
        ...


def id_type(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest stored integer type that holds every id of a vocabulary.

    Raises:
        UsageError: the vocabulary is beyond 32 bits.
    """
    for bits, name in ((16, "<u2"), (32, "<u4")):
        if vocab_size <= 1 << bits:
            return np.dtype(name)
    raise UsageError(f"vocab_size: {vocab_size} ids do not fit the 32-bit integers of a chunk")


class SentencePieceTokenizer:
    """A sentencepiece model, encoded by sentencepiece."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = path
        try:
            self.processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise CorruptDataError(f"{path}: not a sentencepiece model; fetch it again") from None
        self.vocab_size = self.processor.get_piece_size()
        self.eos_id = self.processor.eos_id()
        self.bos_id = self.processor.bos_id() if self.processor.bos_id() >= 0 else None
        if self.eos_id < 0:
            raise UsageError(
                f"{path}: has no end-of-sequence piece, which must close every document; train it with one, or take another"
            )
        self.chat_template = _template_beside(path)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return sentencepiece's ids of each text."""
        return list(self.processor.encode(list(texts), num_threads=os.cpu_count() or 1))

    def encode_packed(self, texts: Sequence[str]) -> list[bytes]:
        """Return sentencepiece's ids of each text; each distinct word is encoded once where that gives the same ids."""
        if self._words is not None:
            return self._words.encode(texts)
        dtype = id_type(self.vocab_size)
        return [np.array(ids, dtype).tobytes() for ids in self.processor.encode(list(texts), num_threads=1)]

    @functools.cached_property
    def _words(self) -> WordCache | None:
        pieces = [self.processor.id_to_piece(i) for i in range(self.vocab_size)]
        apart = not any(SPACE in piece.lstrip(SPACE) or ("\n" in piece and piece != "\n") for piece in pieces)
        return WordCache(self) if apart and _is_plain_bpe(self.processor) else None

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for."""
        processor = self.processor
        return [
            b"" if processor.is_control(i) or processor.is_unknown(i) else _piece_bytes(processor.id_to_piece(i))
            for i in range(self.vocab_size)
        ]

    @functools.cached_property
    def added_tokens(self) -> dict[str, int]:
        """The control pieces."""
        processor = self.processor
        control = (i for i in range(self.vocab_size) if processor.is_control(i) or processor.is_unknown(i))
        return {processor.id_to_piece(i): i for i in control}

    @property
    def vocabulary(self) -> Vocabulary:
        """What defines the tokenizer.

        Raises:
            UsageError: the model is of another type (unigram, or one that normalises text).
        """
        return dataclasses.replace(self._vocabulary, chat_template=self.chat_template)

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        processor, ids = self.processor, range(self.vocab_size)
        if not _is_plain_bpe(processor):
            raise UsageError(f"{self.path}: not a LLaMA-type BPE model (it normalises text or is no BPE)")
        kinds = [
            CONTROL
            if processor.is_control(i)
            else UNKNOWN
            if processor.is_unknown(i)
            else BYTE
            if processor.is_byte(i)
            else NORMAL
            for i in ids
        ]
        pieces, scores = [processor.id_to_piece(i) for i in ids], [processor.get_score(i) for i in ids]
        special = self.bos_id, self.eos_id, processor.unk_id()
        return Vocabulary("llama", pieces, kinds, scores, [], "", *special)

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """The model itself, and a ``tokenizer.json`` that gives the same ids for every text."""
        stated = {JSON_FILE: describe(self._vocabulary), CONFIG_FILE: describe_config(self._vocabulary)}
        return {
            MODEL_FILE: self.path.read_bytes(),
            **{name: json_text(value).encode() for name, value in stated.items()},
        }


class WordCache:
    """Exact encoding with a LLaMA-type BPE, in which a word that was met before costs a look-up.

    No piece of such a vocabulary holds a space behind another character, nor a line feed beside one. So no merge ever
    reaches across the border before a run of spaces, or before a line feed, and the text between two borders is encoded
    alike wherever it stands. sentencepiece puts a space before what it encodes; it stands for the first one of the run.
    """

    _WORD = re.compile(f"[ {SPACE}]+[^ {SPACE}\n]*|\n[^ {SPACE}\n]*")
    _MAX_WORDS = 1 << 19
    _MAX_BYTES = 128
    _SLICE = 1 << 22

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._processor = tokenizer.processor
        self._dtype = id_type(tokenizer.vocab_size)
        # A space before a line feed or the end: sentencepiece puts none before nothing.
        lone_space = np.array([tokenizer.processor.piece_to_id(SPACE)], self._dtype).tobytes()
        self._first = {" ": lone_space, SPACE: lone_space}
        self._words = dict(self._first)

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the packed ids of each text."""
        out: list[bytes] = []
        batch: list[str] = []
        size = 0
        for text in texts:
            if len(text) <= self._SLICE:
                batch.append(f" {text}" if text else "")
                size += len(text)
            if len(text) > self._SLICE or size > self._SLICE:
                out += self._encode_batch(batch)
                batch, size = [], 0
            if len(text) > self._SLICE:
                out.append(b"".join(self._encode_batch([part])[0] for part in self._parts(text)))
        return out + self._encode_batch(batch)

    def _parts(self, text: str) -> Iterator[str]:
        """Cut a long text at borders between words, so that the lists of words stay short."""
        text, start = f" {text}", 0
        while len(text) - start > self._SLICE:
            for word in self._WORD.finditer(text, start + self._SLICE):
                # The first match may begin within a run of spaces; the one after it is a word of its own.
                if word.start() > start + self._SLICE:
                    yield text[start : word.start()]
                    start = word.start()
                    break
            else:
                break
        yield text[start:]

    def _encode_batch(self, texts: list[str]) -> list[bytes]:
        words = [self._WORD.findall(text) for text in texts]
        known = self._words
        new = list(set().union(*words).difference(known))
        encoded = self._processor.encode([word if word[0] == "\n" else word[1:] for word in new], num_threads=1)
        for word, ids in zip(new, encoded, strict=True):
            known[word] = np.array(ids[1:] if word[0] == "\n" else ids, self._dtype).tobytes()
        out = [b"".join(map(known.__getitem__, text)) for text in words]
        if len(known) > self._MAX_WORDS:
            self._words = dict(self._first)
        else:
            for word in new:
                if len(word) > self._MAX_BYTES:
                    del known[word]
        return out


class JsonTokenizer:
    """A Hugging Face ``tokenizer.json``: byte-level BPE, or LLaMA-type BPE with byte pieces."""

    def __init__(self, path: Path) -> None:
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise CorruptDataError(f"{path}: not a tokenizer.json ({error})") from None
        self._open(path, description, _config_beside(path), _template_beside(path))

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary, path: Path) -> JsonTokenizer:
        """Return the tokenizer of a vocabulary that the file ``path``, of another kind, states.

        Raises:
            UsageError: it is of a type that is not known.
            CorruptDataError: it contradicts itself.
        """
        try:
            description = describe(vocabulary)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        except Exception as error:  # tokenizers raises bare Exception
            raise CorruptDataError(f"{path}: its vocabulary contradicts itself ({error}); fetch it again") from None
        made = cls.__new__(cls)
        config = describe_config(dataclasses.replace(vocabulary, chat_template=None))
        made._open(path, description, config, vocabulary.chat_template)
        made._vocabulary = vocabulary
        return made

    def _open(self, path: Path, description: dict[str, Any], config: dict[str, Any], template: str | None) -> None:
        from tokenizers import Tokenizer as Backend

        self.path, self._description, self._config, self.chat_template = path, description, config, template
        try:
            self.backend = Backend.from_str(json.dumps(description))
        except Exception as error:  # tokenizers raises bare Exception
            raise CorruptDataError(f"{path}: not a tokenizer.json ({error})") from None
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = 1 + max(self.backend.get_vocab().values(), default=-1)
        self._specials = {t["id"] for t in self._description.get("added_tokens", []) if t.get("special")}
        self.bos_id, eos_id = self._find_special("bos_token"), self._find_special("eos_token")
        if eos_id is None:
            raise UsageError(
                f"{path.with_name(CONFIG_FILE)}: names no eos_token, which must close every document; name one of the "
                'tokenizer\'s tokens there, as {"eos_token": "</s>"}'
            )
        self.eos_id = eos_id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_packed(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text."""
        dtype = id_type(self.vocab_size)
        return [np.array(ids, dtype).tobytes() for ids in self.encode(texts)]

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for."""
        pieces = [self.backend.id_to_token(i) or "" for i in range(self.vocab_size)]
        convert = _byte_level_bytes if '"ByteLevel"' in json.dumps(self._description.get("decoder")) else _piece_bytes
        return [b"" if i in self._specials else convert(piece) for i, piece in enumerate(pieces)]

    @property
    def added_tokens(self) -> dict[str, int]:
        """Special tokens, and those that are found in any text."""
        return {token["content"]: token["id"] for token in self._description.get("added_tokens", [])}

    @property
    def vocabulary(self) -> Vocabulary:
        """What defines the tokenizer.

        Raises:
            UsageError: it is of a type that is not known.
        """
        return dataclasses.replace(self._vocabulary, chat_template=self.chat_template)

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        try:
            return vocabulary_of(self._description, self._config, self.bos_id, self.eos_id)
        except UsageError as error:
            raise UsageError(f"{self.path}: {error}") from None

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """Its files: the same bytes where they were read from such files."""
        if self.path.suffix == ".json":
            beside = {JSON_FILE: self.path, CONFIG_FILE: self.path.with_name(CONFIG_FILE)}
            return {name: path.read_bytes() for name, path in beside.items() if path.is_file()}
        return {JSON_FILE: json_text(self._description).encode(), CONFIG_FILE: json_text(self._config).encode()}

    def _find_special(self, name: str) -> int | None:
        token = self._config.get(name)
        if token is None and name == "eos_token":
            token = next((t for t in ("</s>", "<|endoftext|>") if self.backend.token_to_id(t) is not None), None)
        content = token.get("content") if isinstance(token, dict) else token
        return None if content is None else self.backend.token_to_id(content)


def _config_beside(path: Path) -> dict[str, Any]:
    """Return what ``tokenizer_config.json`` beside a tokenizer states."""
    config = path.with_name(CONFIG_FILE)
    return dict(read_json(config)) if config.is_file() else {}


def _template_beside(path: Path) -> str | None:
    """Return the chat template beside a tokenizer: a file of its own, or a key of ``tokenizer_config.json``.

    Raises:
        CorruptDataError: it is no text.
    """
    file = path.with_name(TEMPLATE_FILE)
    if file.is_file():
        try:
            return file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptDataError(f"{file}: not UTF-8 text ({error}); fetch it again") from None
    template = _config_beside(path).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {its.get("name"): its.get("template") for its in template if isinstance(its, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CorruptDataError(f"{path.with_name(CONFIG_FILE)}: chat_template is no text; fetch it again")
    return template


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a ``.model`` file, a ``.json`` file, or a directory that holds one (the sentencepiece model goes first).

    Raises:
        UsageError: there is no tokenizer at ``path``.
        CorruptDataError: the file is damaged.
    """
    if path.is_dir():
        found = [path / name for name in (MODEL_FILE, JSON_FILE) if (path / name).is_file()]
        if not found:
            raise UsageError(f"{path}: holds neither {MODEL_FILE} nor {JSON_FILE}")
        path = found[0]
    if not path.is_file():
        raise UsageError(f"{path}: no tokenizer there; train one with 'mobillama tokenizer train'")
    return JsonTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return a digest of what the ids mean: sha256 over every id's bytes and the special ids.

    It is the same for a sentencepiece model and for the tokenizer.json exported from it.
    """
    digest = hashlib.sha256(f"{tokenizer.bos_id}/{tokenizer.eos_id}".encode())
    for piece in tokenizer.token_bytes:
        digest.update(len(piece).to_bytes(4, "little") + piece)
    return digest.hexdigest()


def token_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Return the number of bytes of each id (vocabulary,)."""
    return np.array([len(piece) for piece in tokenizer.token_bytes], dtype=np.int64)


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Return the text of ids; bytes that are no UTF-8 (a cut character) become U+FFFD."""
    table = tokenizer.token_bytes
    return b"".join(table[i] for i in ids).decode("utf-8", errors="replace")


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (and ``tokenizer.model`` where there is one).

    A chat template that these do not state is written as ``chat_template.jinja``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files.items():
        (directory / name).write_bytes(content)
    if tokenizer.chat_template is not None and tokenizer.chat_template != _template_beside(directory / JSON_FILE):
        (directory / TEMPLATE_FILE).write_bytes(tokenizer.chat_template.encode())


def _is_plain_bpe(processor: Any) -> bool:
    """Tell whether a model changes no text, puts a space before it, and is a BPE (whose scores are whole ranks)."""
    if processor.normalize("ﬁ Ａ  b") != "▁ﬁ▁Ａ▁▁b":
        return False
    scores = (processor.get_score(i) for i in range(processor.get_piece_size()))
    return all(score == int(score) for score in scores)


def _piece_bytes(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's letters for bytes: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}


def _byte_level_bytes(piece: str) -> bytes:
    alphabet = _byte_level_alphabet()
    return bytes(alphabet[letter] for letter in piece) if all(c in alphabet for c in piece) else piece.encode()
