"""Prompts of the harness's older versions, and benchmarks that lie as plain files."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobillama.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset


def race_version_2(document: dict[str, Any]) -> str:
    """Return RACE's prompt of task version 2 and before.

    It shows a solved gap question as the gap and its answer alone: ``[-5:]`` where version 3 has ``[:-5]``.
    """
    text = "Article: " + document["article"] + "\n\n"
    *solved, last = ast.literal_eval(document["problems"])
    for problem in solved:
        question, answer = problem["question"], problem["options"]["ABCD".index(problem["answer"])]
        if question[-6:] == "  _  .":
            text += question[-5:] + answer + "\n"
        else:
            text += f"Question: {question}\nAnswer: {answer}\n"
    return str(text + last["question"])


def wikitext_pages(path: Path, **unused: Any) -> dict[str, Dataset]:
    """Return WikiText's articles of a raw file, as EleutherAI/wikitext_document_level divides it.

    An article begins at a heading of one ``=``. Equations set on lines of their own look the same, but stand in the midst of
    a sentence, before a number.

    Raises:
        UsageError: the file holds no article.
    """
    from datasets import Dataset

    text = path.read_text(encoding="utf-8")
    starts = [
        found.start()
        for found in re.finditer(r"^ = [^=\n]+ = ?\n(?=\s*(\d?))", text, re.M)
        if not (found[1] and text[: found.start()].rstrip()[-1:].isalnum())
    ]
    if not starts:
        raise UsageError(f"{path}: holds no article (a line ' = Title = '); copy WikiText-2's raw text there again")
    pages = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    return {name: Dataset.from_dict({"page": pages}) for name in ("train", "validation", "test")}


def lambada_documents(path: Path, **unused: Any) -> dict[str, Dataset]:
    """Return LAMBADA's texts of a file of JSON lines with a ``context`` and its last word, the ``continuation``.

    Raises:
        UsageError: a line is something else, or there is none.
    """
    from datasets import Dataset

    texts = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            document = json.loads(line)
            texts.append(f"{document['context']} {document['continuation']}")
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f'{path}: line {number} is no {{"context": …, "continuation": …}}; copy the file again'
            ) from None
    if not texts:
        raise UsageError(f"{path}: is empty; copy the file again")
    return {"test": Dataset.from_dict({"text": texts})}
