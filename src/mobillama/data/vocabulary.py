"""A tokenizer's vocabulary as plain data: what sentencepiece models, ``tokenizer.json`` and GGUF metadata all state.

Two types are known, by the names that GGUF gives them: ``llama`` (sentencepiece's BPE with byte pieces; the pair whose
product scores best is merged first) and ``gpt2`` (byte-level BPE; merges in order, within words that a pattern cuts).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mobillama.errors import UsageError

SPACE = "▁"
# Kinds of pieces, numbered as sentencepiece and GGUF do.
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How byte-level BPE cuts text into words, by llama.cpp's names: patterns, one applied after another.
WORD_PATTERNS = {
    "gpt-2": (_GPT2_WORDS,),
    "smollm": (r"\p{N}", _GPT2_WORDS),
    "starcoder": (r"\p{N}", _GPT2_WORDS),
    "refact": (r"\p{N}", _GPT2_WORDS),
    "llama-bpe": (_LLAMA3_WORDS,),
    "qwen2": (_LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"),),
}


@dataclass(frozen=True)
class Vocabulary:
    """All that defines a tokenizer."""

    kind: str
    """``llama`` or ``gpt2``."""
    pieces: list[str]
    """The text of each id, in the type's own spelling."""
    kinds: list[int]
    """NORMAL, UNKNOWN, CONTROL, USER, UNUSED or BYTE, for each id."""
    scores: list[float]
    """``llama`` only: the higher, the earlier merged."""
    merges: list[tuple[str, str]]
    """``gpt2`` only: the earlier, the earlier merged."""
    words: str = ""
    """``gpt2`` only: a key of :data:`WORD_PATTERNS`."""
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False
    """Whether a prompt begins with the begin mark."""
    add_space: bool = True
    """``llama`` only: whether a space is put before a text."""
    chat_template: str | None = None
    """Jinja, as Hugging Face has it."""

    def __post_init__(self) -> None:
        counts = {len(self.pieces), len(self.kinds)} | ({len(self.scores)} if self.kind == "llama" else set())
        if self.kind not in ("llama", "gpt2") or len(counts) > 1:
            raise UsageError(f"a vocabulary of type '{self.kind}' with {sorted(counts)} pieces, kinds and scores")
        for name in ("bos_id", "eos_id", "unk_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < len(self.pieces):
                raise UsageError(f"a vocabulary of {len(self.pieces)} pieces whose {name} is {token}")


def describe(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the ``tokenizer.json`` of a vocabulary.

    Raises:
        UsageError: it cuts words in a way that is not known here.
    """
    from tokenizers import AddedToken, processors

    backend = _llama_backend(vocabulary) if vocabulary.kind == "llama" else _gpt2_backend(vocabulary)
    added = {CONTROL: True, UNKNOWN: True, USER: False}
    for kind, special in added.items():
        pieces = [piece for piece, its in zip(vocabulary.pieces, vocabulary.kinds, strict=True) if its == kind]
        add = backend.add_special_tokens if special else backend.add_tokens
        add([AddedToken(piece, special=special, normalized=False) for piece in pieces])
    if vocabulary.add_bos and vocabulary.bos_id is not None:
        bos = vocabulary.pieces[vocabulary.bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, vocabulary.bos_id)]
        )
    return dict(json.loads(backend.to_str()))


def describe_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the ``tokenizer_config.json`` of a vocabulary."""
    names = {"bos_token": vocabulary.bos_id, "eos_token": vocabulary.eos_id, "unk_token": vocabulary.unk_id}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {name: None if token is None else vocabulary.pieces[token] for name, token in names.items()}
    config["clean_up_tokenization_spaces"] = False
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    return config


def _llama_backend(vocabulary: Vocabulary) -> Any:
    """Return the BPE that gives sentencepiece's ids: merges ranked by the score of their product, leftmost first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = vocabulary.pieces
    table = {piece: i for i, piece in enumerate(pieces)}
    ranked: list[tuple[float, int, str, str]] = []
    for i, (piece, kind, score) in enumerate(zip(pieces, vocabulary.kinds, vocabulary.scores, strict=True)):
        if kind in (NORMAL, USER, UNUSED):
            splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
            ranked += [(-score, i, left, right) for left, right in splits if left in table and right in table]
    ranked.sort(key=lambda merge: merge[:2])
    merges = [(left, right) for _, _, left, right in ranked]
    unknown = None if vocabulary.unk_id is None else pieces[vocabulary.unk_id]
    backend = Tokenizer(models.BPE(vocab=table, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prepend = [normalizers.Prepend(SPACE)] if vocabulary.add_space else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.add_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _gpt2_backend(vocabulary: Vocabulary) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if vocabulary.words not in WORD_PATTERNS:
        known = ", ".join(WORD_PATTERNS)
        raise UsageError(
            f"pre-tokenizer '{vocabulary.words}' is not known here (known: {known}); take a model with one of them"
        )
    table = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    whole_words_first = vocabulary.words == "llama-bpe"
    backend = Tokenizer(models.BPE(vocab=table, merges=vocabulary.merges, ignore_merges=whole_words_first))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in WORD_PATTERNS[vocabulary.words]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def vocabulary_of(description: dict[str, Any], config: dict[str, Any], bos_id: int | None, eos_id: int) -> Vocabulary:
    """Return the vocabulary that a ``tokenizer.json`` and its ``tokenizer_config.json`` describe.

    Raises:
        UsageError: it is of no type that is known here.
    """
    model = description["model"]
    if model.get("type") != "BPE":
        raise UsageError(f"tokenizer.json: a {model.get('type')} model; BPE models are known here")
    added = {token["id"]: token for token in description.get("added_tokens", [])}
    table = {**model["vocab"], **{token["content"]: i for i, token in added.items()}}
    size = 1 + max(table.values())
    pieces, kinds = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for piece, i in table.items():
        pieces[i], kinds[i] = piece, NORMAL
    for i, token in added.items():
        kinds[i] = CONTROL if token["special"] else USER
    unk_id = table.get(model["unk_token"]) if model.get("unk_token") else None
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [(left, right) for left, right in pairs]
    facts: dict[str, Any] = {
        "bos_id": bos_id,
        "eos_id": eos_id,
        "unk_id": unk_id,
        "chat_template": config.get("chat_template"),
    }
    post = json.dumps(description.get("post_processor"))
    facts["add_bos"] = bos_id is not None and json.dumps(pieces[bos_id]) in post
    if not model.get("byte_fallback"):
        words = _words_of(description.get("pre_tokenizer"))
        return Vocabulary("gpt2", pieces, kinds, [], merges, words, **facts)
    if unk_id is not None:
        kinds[unk_id] = UNKNOWN
    for byte in range(256):
        if (piece := f"<0x{byte:02X}>") in table:
            kinds[table[piece]] = BYTE
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge), number)
    scores = [
        -float(rank.get(piece, len(merges))) if kind == NORMAL else 0.0
        for piece, kind in zip(pieces, kinds, strict=True)
    ]
    space = '"Prepend"' in json.dumps(description.get("normalizer")) or _is_metaspace_first(description)
    return Vocabulary("llama", pieces, kinds, scores, [], add_space=space, **facts)


def _is_metaspace_first(description: dict[str, Any]) -> bool:
    cut = description.get("pre_tokenizer") or {}
    return cut.get("type") == "Metaspace" and cut.get("prepend_scheme") in ("first", "always")


def _words_of(cut: Any) -> str:
    """Return the name in :data:`WORD_PATTERNS` of a ``pre_tokenizer`` section."""
    parts = cut["pretokenizers"] if cut and cut["type"] == "Sequence" else [cut]
    patterns: list[str] = []
    for part in parts:
        if part and part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
            patterns += [_GPT2_WORDS] if part.get("use_regex", True) else []
        elif part and part["type"] == "Digits" and part.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif part and part["type"] == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
            patterns.append(part["pattern"].get("Regex", ""))
        else:
            patterns.append("")
    name = next((name for name, known in WORD_PATTERNS.items() if known == tuple(patterns)), None)
    if name is None:
        raise UsageError(
            f"tokenizer.json: cuts words in a way that GGUF has no known name for: {json.dumps(cut)[:200]}"
        )
    return name
