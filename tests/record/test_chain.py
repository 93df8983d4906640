from __future__ import annotations

import random

import pytest

from mobillama.errors import CorruptDataError
from mobillama.record.chain import START, Chain, read_chain


@pytest.fixture
def path(tmp_path):
    chain = Chain(tmp_path / "ledger.jsonl")
    for number in range(20):
        chain.append({"step": number, "loss": 1 / (number + 1)})
    chain.close()
    return tmp_path / "ledger.jsonl"


def test_records_come_back_and_a_chain_goes_on_after_it_was_closed(path):
    before = Chain(path)
    before.append({"step": 20})
    assert before.sync() == path.stat().st_size
    before.close()
    records = list(read_chain(path))
    assert [record["step"] for record in records] == list(range(21))
    assert records[3]["loss"] == 0.25 and records[0]["previous"] == START
    again = Chain(path)
    assert again.head == before.head
    again.close()


def test_every_change_shows(path):
    content, numbers = path.read_bytes(), random.Random(0)
    last = content.rindex(b"\n", 0, -1) + 1  # a change in the last line shows to who knows the head
    for _ in range(300):
        changed = bytearray(content)
        changed[numbers.randrange(last)] ^= 1 << numbers.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(CorruptDataError):
            list(read_chain(path))
    lines = content.splitlines(keepends=True)
    for damaged in (
        lines[1:],
        lines[:4] + lines[5:],
        [*lines[:4], lines[5], lines[4], *lines[6:]],
        [*lines[:4], *lines[3:]],
    ):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(CorruptDataError, match=r"ledger.jsonl:\d+: does not follow"):
            list(read_chain(path))


def test_a_line_cut_short_is_told(path):
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CorruptDataError, match=r"ledger.jsonl:20: does not follow"):
        list(read_chain(path))
    with pytest.raises(CorruptDataError, match="its last line is cut short"):
        Chain(path)
