from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import tempfile
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mobillama.data.documents import Piece, Reading, count_lines, passed_over, read_piece, read_texts, source_files
from mobillama.errors import CorruptDataError, UsageError
from mobillama.recipe import SourceConfig

TEXTS = ["first", "zweiter Ä\n\ttab", "", "third 🐢 " * 50]


def lines(texts) -> bytes:
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()


def write(tmp_path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    return Piece(str(tmp_path / name), 3)


def zst(content: bytes) -> bytes:
    """Two frames, as tools that append or compress in parallel write them."""
    compressor, half = zstandard.ZstdCompressor(), len(content) // 2
    return compressor.compress(content[:half]) + compressor.compress(content[half:])


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".zst", zst)],
    ids=["plain", "gz", "xz", "zst"],
)
def test_json_lines_are_read_alike_however_they_are_packed(tmp_path, suffix, pack):
    documents = list(read_piece(write(tmp_path, f"a.jsonl{suffix}", pack(lines(TEXTS))), Reading()))
    assert [d.text for d in documents] == TEXTS
    assert [d.raw for d in documents] == [text.encode() for text in TEXTS]
    assert [(d.file, d.line) for d in documents] == [(3, 1), (3, 2), (3, 3), (3, 4)]


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zst)], ids=["gz", "xz", "zst"]
)
def test_an_archive_cut_anywhere_is_never_read_as_whole(tmp_path, suffix, pack):
    content = pack(lines(random.Random(n).randbytes(99).hex() for n in range(200)))
    for cut in range(1, len(content), len(content) // 40):
        with pytest.raises(CorruptDataError, match=r"damaged or truncated archive|not valid JSON"):
            list(read_piece(write(tmp_path, f"a.jsonl{suffix}", content[:cut]), Reading()))


def test_every_stream_of_an_xz_file_is_read_or_an_error(tmp_path):
    first, second = lzma.compress(lines(["a"])), lzma.compress(lines(["b"]))
    padded = list(read_piece(write(tmp_path, "a.jsonl.xz", first + bytes(8) + second + bytes(4)), Reading()))
    assert [document.text for document in padded] == ["a", "b"]
    for rest in (bytes([second[0] ^ 1]) + second[1:], second[:-3], b"garbage"):
        with pytest.raises(CorruptDataError, match="damaged or truncated archive"):
            list(read_piece(write(tmp_path, "b.jsonl.xz", first + rest), Reading()))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_an_archive_of_no_bytes_is_damaged(tmp_path, suffix):
    with pytest.raises(CorruptDataError, match="an archive of 0 bytes"):
        list(read_piece(write(tmp_path, f"a.jsonl{suffix}", b""), Reading()))


def test_links_to_nothing_and_impossible_patterns_are_told(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UsageError, match=r"sources.s.files: '/abs/\*' is no pattern below"):
        source_files(SourceConfig(str(tmp_path), files="/abs/*"), "s")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"b.jsonl is a link to nothing"):
        source_files(SourceConfig(str(tmp_path)), "s")


def test_a_piece_within_a_long_line_reads_it_in_blocks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * (64 << 20) + b'"}\n' + lines(["after"]))
    tracemalloc.start()
    (document,) = read_piece(Piece(str(path), 0, 1000, path.stat().st_size), Reading())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert document.text == "after" and peak < 16 << 20


def test_only_utf_8_is_read(tmp_path):
    content = "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(5)).encode("utf-16")
    documents = list(read_piece(write(tmp_path, "a.jsonl", content), Reading(skip_bad=True)))
    assert documents and all(document.fault for document in documents)
    (marked,) = read_piece(write(tmp_path, "b.jsonl", b"\xef\xbb\xbf" + lines(["x"])), Reading())
    assert marked.text == "x"


def test_which_files_of_a_directory_are_read_and_which_are_passed_over(tmp_path):
    for name in ("a.jsonl", "b.ndjson", "c.json.gz", "d.json", "e.csv", "holdout_x.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "linked").symlink_to(tmp_path)

    def names(source: SourceConfig) -> tuple[list[str], list[str]]:
        return [f.name for f in source_files(source, "s")], [f.name for f in passed_over(source)]

    plain = ["a.jsonl", "b.ndjson", "c.json.gz"]
    assert names(SourceConfig(str(tmp_path))) == ([*plain, "holdout_x.jsonl"], ["d.json", "e.csv", "linked"])
    given = names(SourceConfig(str(tmp_path), "jsonl"))
    assert given == ([*plain, "d.json", "holdout_x.jsonl"], ["e.csv", "linked"])
    assert names(SourceConfig(str(tmp_path), "amber"))[0] == plain
    assert source_files(SourceConfig(str(tmp_path / "e.csv"), "jsonl"), "s") == [tmp_path / "e.csv"]
    with pytest.raises(UsageError, match=r"sources.s.path: .*e.csv is none of .*set format: jsonl"):
        source_files(SourceConfig(str(tmp_path / "e.csv")), "s")
    with pytest.raises(UsageError, match=r"sources.s.files: .*a.jsonl is a file itself"):
        source_files(SourceConfig(str(tmp_path / "a.jsonl"), files="*.jsonl"), "s")
    with pytest.raises(UsageError, match=r"c.json.gz: decompress texts first"):
        source_files(SourceConfig(str(tmp_path), "text", files="c*"), "s")


def test_parquet_columns_are_documents(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    piece = Piece(str(tmp_path / "a.parquet"), 0)
    documents = list(read_piece(piece, Reading(text_field="body")))
    assert [(d.text, d.line) for d in documents] == [(text, n) for n, text in enumerate(TEXTS, 1)]
    with pytest.raises(UsageError, match="no column 'text' among body, n"):
        list(read_piece(piece, Reading()))
    content = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(CorruptDataError, match="damaged Parquet file"):
        list(read_piece(write(tmp_path, "b.parquet", content[: len(content) // 2]), Reading(text_field="body")))


def test_a_directory_of_source_code_is_a_document_a_file(tmp_path):
    (tmp_path / "pkg").mkdir()
    for name in ("b.py", "a.py", "pkg/c.py", "notes.md"):
        (tmp_path / name).write_text(f"# {name}")
    source = SourceConfig(str(tmp_path), "text", files="**/*.py")
    files = source_files(source, "code")
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["a.py", "b.py", "pkg/c.py"]
    (document,) = read_piece(Piece(str(files[2]), 2), Reading("text"))
    assert (document.text, document.file, document.line) == ("# pkg/c.py", 2, 1)
    with pytest.raises(UsageError, match=r"sources.code.path: .* holds no file \*\*/\*.rs"):
        source_files(SourceConfig(str(tmp_path), "text", files="**/*.rs"), "code")


def test_a_hub_data_set_is_streamed_shard_by_shard(tmp_path):
    """A local directory goes the way that a hub's name goes: load_dataset, streaming, shards."""
    from mobillama.data.documents import hub_address, hub_dataset

    for number in range(3):
        (tmp_path / f"part-{number}.jsonl").write_bytes(lines([f"{number}a", f"{number}b"]))
    source = SourceConfig(str(tmp_path), "huggingface")
    shards = hub_dataset(source).num_shards
    path = hub_address(source, shards)
    texts = [d.text for i in range(shards) for d in read_piece(Piece(path, i), Reading("huggingface"))]
    assert texts == ["0a", "0b", "1a", "1b", "2a", "2b"]
    (tmp_path / "part-2.jsonl").write_bytes(lines(["2a"]) + b"{")
    with pytest.raises(CorruptDataError, match=r"cannot be read after row \d of shard 2"):
        list(read_piece(Piece(path, 2), Reading("huggingface")))
    with pytest.raises(UsageError, match="cannot be opened as a data set"):
        hub_dataset(SourceConfig(str(tmp_path / "absent"), "huggingface"))
    (tmp_path / "part-3.jsonl").write_bytes(lines(["3a"]))
    with pytest.raises(CorruptDataError, match="has 4 shards where there were 3"):
        list(read_piece(Piece(path, 0), Reading("huggingface")))


def test_a_hub_sources_revision_is_pinned_to_a_commit(tmp_path, monkeypatch):
    """Asked of a hub on this machine: the library's own client, over HTTP."""
    from mobillama.data.documents import hub_commit

    commit = "0123456789abcdef0123456789abcdef01234567"

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/api/datasets/owner/name/revision/main"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"id": "owner/name", "sha": commit} if found else {"error": "no"}).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        assert hub_commit(SourceConfig("owner/name", "huggingface", revision="main")) == commit
        with pytest.raises(UsageError, match="owner/other: its commit cannot be found"):
            hub_commit(SourceConfig("owner/other", "huggingface", revision="main"))
        hub.shutdown()
    assert hub_commit(SourceConfig("owner/name", "huggingface", revision=commit)) == commit
    assert hub_commit(SourceConfig(str(tmp_path), "huggingface", revision="own")) == "own"


def test_a_directory_that_cannot_be_read_is_an_error():
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # pytest's own is closed to others than root
        Path(directory).chmod(0o755)
        (Path(directory) / "a.jsonl").write_bytes(lines(["a"]))
        (Path(directory) / "closed").mkdir(mode=0)
        user = os.geteuid()
        if user == 0:  # who may read everything
            os.seteuid(65534)
        try:
            with pytest.raises(UsageError, match=r"sources.s.path: .*closed: Permission denied; make it readable"):
                source_files(SourceConfig(directory), "s")
        finally:
            os.seteuid(user)


def test_a_line_too_long_to_be_split_is_a_bad_document(tmp_path):
    (tmp_path / "long.jsonl").write_bytes(lines(["a"]) + lines(["b" * (8 << 20)]) + lines(["c"]))
    piece = Piece(str(tmp_path / "long.jsonl"), 0)
    with pytest.raises(CorruptDataError, match=r"long.jsonl:2: longer than \d+ bytes, too long to be split"):
        list(read_piece(piece, Reading(max_bytes=1024, split_long=True)))
    kept = list(read_piece(piece, Reading(max_bytes=1024, split_long=True, skip_bad=True)))
    assert [(document.fault, document.line) for document in kept] == [("", 1), ("line_too_long", 2), ("", 3)]


BAD = {
    "not_json": b'{"text": \n',
    "no_text": b'{"txt": "x"}\n',
    "not_utf8": b'{"text": "\xff"}\n',
    "half": b'{"text": "\\ud800"}\n',
    "list": b'["text"]\n',
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_lines_stop_with_their_place_or_are_counted(tmp_path, kind):
    piece = write(tmp_path, "a.jsonl", lines(["good"]) + BAD[kind] + b"\n" + lines(["last"]))
    with pytest.raises(CorruptDataError, match=r"a.jsonl:2: .*bad_documents: skip"):
        list(read_piece(piece, Reading()))
    documents = list(read_piece(piece, Reading(skip_bad=True)))
    assert [d.line for d in documents] == [1, 2, 4]
    assert [bool(d.fault) for d in documents] == [False, True, False]
    assert documents[1].raw == BAD[kind] or kind == "half"


def test_long_documents_are_skipped_or_split_and_counted(tmp_path):
    text = "wörter und noch mehr " * 400
    piece = write(tmp_path, "a.jsonl", lines(["short", text]))
    short, long = read_piece(piece, Reading(max_bytes=1024))
    assert (short.fault, long.fault, long.line) == ("", "too_long", 2)
    _, *parts = read_piece(piece, Reading(max_bytes=1024, split_long=True))
    assert "".join(d.text for d in parts) == text
    assert all(len(d.raw) <= 1024 and d.line == 2 and d.text.endswith(" ") for d in parts)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert next(read_piece(Piece(str(tmp_path / "a.txt"), 3), Reading(max_bytes=1024))).fault == "too_long"
    whole = read_piece(Piece(str(tmp_path / "a.txt"), 3), Reading(max_bytes=1024, split_long=True))
    assert "".join(d.text for d in whole) == text


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=400), st.integers(8, 40))
def test_split_documents_join_to_the_text(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("split") / "a.txt"
    path.write_bytes(text.encode())
    parts = list(read_piece(Piece(str(path), 0), Reading("text", max_bytes=size, split_long=True)))
    assert "".join(d.text for d in parts) == text
    assert all(0 < len(d.raw) <= size and not d.fault for d in parts)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_huge_document_is_passed_over_in_little_memory(tmp_path, name):
    """200 MB here stand for any size: memory is bounded by max_document_bytes."""
    with open(tmp_path / name, "wb") as file:
        file.write(b'{"text": "' if name == "a.jsonl" else b"")
        for _ in range(200):
            file.write(b"word " * 200_000)
        file.write(b'"}\n' + lines(["after"]) if name == "a.jsonl" else b"")
    tracemalloc.start()
    documents = list(read_piece(Piece(str(tmp_path / name), 0), Reading(max_bytes=1 << 20)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(d.fault, d.line) for d in documents][:1] == [("too_long", 1)]
    assert [d.text for d in documents[1:]] == (["after"] if name == "a.jsonl" else [])
    assert peak < 40 << 20


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=20), st.integers(1, 60))
def test_pieces_of_a_file_are_its_lines_once_each(tmp_path_factory, texts, size):
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    path.write_bytes(lines(texts).replace(b"\n", b"\n\n", 1))
    total = path.stat().st_size
    pieces = [Piece(str(path), 0, start, min(start + size, total)) for start in range(0, total, size)]
    whole = [(d.text, d.line) for d in read_piece(Piece(str(path), 0), Reading())]
    found, before = [], 0
    for piece in pieces:
        found += [(d.text, before + d.line) for d in read_piece(piece, Reading())]
        before += count_lines(piece)
    assert found == whole


def test_ready_sequences_are_checked(tmp_path):
    def read(row, **settings):
        piece = write(tmp_path, "train_000.jsonl", json.dumps(row).encode() + b"\n")
        return list(read_piece(piece, Reading("amber", sequence_length=3, vocab_size=10, **settings)))

    (document,) = read({"token_ids": [1, 2, 9], "source": "c4"})
    assert (document.ids, document.label, document.fault) == ([1, 2, 9], "c4", "")
    assert read({"token_ids": [1, 2, 9], "source": "c4"}, label="arxiv") == []
    for row, said in (
        ({"token_ids": [1, 2], "source": "c4"}, "a sequence of 2 ids where sequence_length is 3"),
        ({"token_ids": [1, 2, 10], "source": "c4"}, "outside the tokenizer's 10"),
        ({"token_ids": [1, 2, -1], "source": "c4"}, "outside the tokenizer's 10"),
        ({"token_ids": [1, 2, 1.5], "source": "c4"}, "no sequence"),
        ({"token_ids": [1, 2, 3]}, "no sequence"),
        ({"text": "x"}, "no sequence"),
    ):
        with pytest.raises(CorruptDataError, match=said):
            read(row)


def test_texts_of_several_places(tmp_path):
    write(tmp_path, "a.jsonl", lines(TEXTS))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "b.txt").write_text("b")
    assert list(read_texts([tmp_path / "a.jsonl", tmp_path / "d"])) == [text for text in TEXTS if text] + ["b"]


def test_a_bad_line_is_named_by_its_place_in_the_whole_file(tmp_path):
    piece = write(tmp_path, "a.jsonl", lines(["x"] * 40) + b"{\n")
    half = (tmp_path / "a.jsonl").stat().st_size // 2
    with pytest.raises(CorruptDataError, match=r"a.jsonl:41: not valid JSON"):
        list(read_piece(Piece(piece.path, 0, half, 2 * half), Reading()))


def test_a_number_too_long_for_python_is_a_bad_line_like_others(tmp_path):
    piece = write(tmp_path, "a.jsonl", b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n")
    with pytest.raises(CorruptDataError, match=r"a.jsonl:1: not valid JSON"):
        list(read_piece(piece, Reading()))
