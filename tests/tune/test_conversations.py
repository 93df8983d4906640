"""Rows of every form become the same conversations, and what is none is named with its place."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mobillama.errors import CorruptDataError, UsageError
from mobillama.tune.conversations import RowFault, conversation_of, describe_source, read_conversations
from mobillama.tune.recipe import ChatSourceConfig

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
]


def row(*turns: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_both_forms_and_lists_of_parts_are_the_same_conversation():
    sharegpt = {
        "conversations": [{"from": f, "value": v} for f, v in (("system", "Be brief."), ("human", "Hi"), ("gpt", "Ho"))]
    }
    parts = row(("developer", "Be brief."), ("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]))
    parts["messages"].append({"role": "assistant", "content": "Ho"})
    for form in ({"messages": MESSAGES}, sharegpt, parts):
        found = conversation_of(form)
        assert found.messages == MESSAGES
        assert found.is_learned == [False, False, True]


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [("user", "Hi")],
        [("user", "Hi"), ("assistant", "")],
        [("user", "Hi"), ("assistant", " \n")],
        [("assistant", "Ho")],
        [("system", "Be brief.")],
    ],
)
def test_rows_without_an_answer_hold_nothing_to_learn(turns):
    assert conversation_of(row(*turns)) is None


def test_what_stands_behind_the_last_answer_is_left_out_and_so_is_an_answer_without_question():
    found = conversation_of(row(("assistant", "Well?"), ("user", "Hi"), ("assistant", "Ho"), ("user", "And?")))
    assert [message["content"] for message in found.messages] == ["Hi", "Ho"]
    assert found.has_lost_answer


def test_an_answer_of_weight_0_is_read_but_not_learned():
    given = row(("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"))
    given["messages"][1]["weight"] = 0
    assert conversation_of(given).is_learned == [False, False, False, True]
    given["messages"][3]["weight"] = 0
    assert conversation_of(given) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "has neither 'messages' nor 'conversations'"),
        ({"text": "Hi"}, "has neither 'messages' nor 'conversations'"),
        ({"messages": "Hi"}, "'messages' is no list"),
        ({"messages": ["Hi"]}, r"messages\[0\]: is no object with a role and a text"),
        (row(("tool", "Hi")), r"messages\[0\]\.role: 'tool' is none of system, .*assistant"),
        (row(("user", None)), r"messages\[0\]\.content: is no text"),
        (row(("user", [{"type": "image_url"}])), r"messages\[0\]\.content: is no text"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]\.value: is no text"),
        (row(("user", "a"), ("user", "b"), ("assistant", "c")), r"messages\[1\]: two messages of the user in a row"),
        ({"messages": [{**MESSAGES[0], "weight": "0"}]}, r"messages\[0\]\.weight: '0' is neither 0 nor 1"),
        (row(("user", "a"), ("system", "b")), r"messages\[1\]: a system message must be the first"),
    ],
)
def test_what_is_no_conversation_is_a_fault(given, said):
    with pytest.raises(RowFault, match=said):
        conversation_of(given)


def test_files_name_the_line_and_archives_and_lists_are_read(tmp_path):
    lines = [json.dumps({"messages": MESSAGES}), "", "{", json.dumps({"a": 1}), '"\\ud800"']
    plain, packed, listed = (tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.json"))
    plain.write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    packed.write_bytes(gzip.compress(lines[0].encode()))
    listed.write_text(f"[{lines[0]}, 7]")
    found = dict(read_conversations(ChatSourceConfig(str(plain))))
    assert found[f"{plain}:1"].messages == MESSAGES
    assert [str(found[f"{plain}:{n}"]).split("(")[0] for n in (3, 4, 6)] == [
        "not valid JSON ",
        "has neither 'messages' nor 'conversations'",
        "not UTF-8 ",
    ]
    assert next(read_conversations(ChatSourceConfig(str(packed))))[1].messages == MESSAGES
    assert [place for place, _ in read_conversations(ChatSourceConfig(str(listed)))] == [
        f"{listed}: item 1",
        f"{listed}: item 2",
    ]
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(CorruptDataError, match="damaged or truncated archive"):
        list(read_conversations(ChatSourceConfig(str(packed))))
    listed.write_text('{"a": 1}')
    with pytest.raises(UsageError, match="no list of conversations"):
        list(read_conversations(ChatSourceConfig(str(listed))))


def test_a_data_set_of_the_hub_is_read_through_its_library(tmp_path):
    """A local directory in the hub's layout: the same code as for a name."""
    folder = tmp_path / "owner" / "set"
    folder.mkdir(parents=True)
    rows = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": answer}]} for answer in "ab"]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    source = ChatSourceConfig(str(folder))
    found = list(read_conversations(source))
    assert [place for place, _ in found] == [f"{folder}: row 1", f"{folder}: row 2"]
    assert [conversation.messages[1]["content"] for _, conversation in found] == ["a", "b"]
    before = describe_source(source, "x")
    assert before["files"].keys() == {"train.parquet"}
    pq.write_table(pa.Table.from_pylist(rows[:1]), folder / "train.parquet")
    assert describe_source(source, "x") != before


def test_sources_that_are_none_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.jsonl").write_text("")
    for path, options, said in (
        ("a.txt", {}, r"sources\.x\.path: .*a\.txt is none of \.jsonl"),
        ("b.jsonl", {}, r"sources\.x\.path: .*b\.jsonl does not exist"),
        ("a.jsonl", {"split": "test"}, r"sources\.x\.split: has no effect on a file"),
    ):
        with pytest.raises(UsageError, match=said):
            describe_source(ChatSourceConfig(str(tmp_path / path), **options), "x")
