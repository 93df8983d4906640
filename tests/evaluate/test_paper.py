"""The paper's tables as printed: their averages, and the cells that cannot be right."""

from __future__ import annotations

import json

import pytest

from mobillama.cli import main
from mobillama.evaluate.paper import QUESTIONS, TABLES, doubts, is_attainable


def marked(number: int) -> dict[tuple[str, str], str]:
    table = TABLES[number]
    return {
        (row.name, column): reason.split(":")[0] for row in table.rows for column, reason in doubts(table, row).items()
    }


def test_all_printed_averages_are_the_rows_means_cut_to_two_decimals():
    assert sum(len(table.rows) for table in TABLES.values()) == 34
    assert not [place for number in TABLES for place in marked(number) if place[1] == "average"]


def test_cells_that_cannot_be_right_are_named_with_the_reason():
    assert marked(5) == {
        ("baseline1", "ARC-C"): "not attainable",
        ("baseline2", "ARC-C"): "not attainable",
        ("baseline3", "MMLU"): "below chance",
        ("baseline3", "ARC-C"): "below chance",
        ("MobiLlama", "ARC-C"): "not attainable",
    }
    sliced = {place for place, reason in marked(7).items() if reason == "other protocol"}
    assert len(sliced) == 12 and ("OPT-6.7B, 30 % sliced", "PIQA") not in sliced


@pytest.mark.parametrize("k", [0, 1, 308, 1171, 1172])
def test_every_share_is_attainable_rounded_and_cut(k):
    share = 100 * k / 1172
    assert is_attainable(round(share, 2), 1172) and is_attainable(int(100 * share) / 100, 1172)


def test_our_rows_stand_in_the_table_and_only_whole_evaluations_do(tmp_path, capsys):
    columns = TABLES[3].columns
    result = {"format": "mobillama-evaluation-1", "status": "done", "model": {"name": "mine"}}
    scores = {name: {"score": 12.345, "stderr": 0.5, "questions": QUESTIONS[name]} for name in columns}
    result |= {"key": {"suite": "paper", "limit": 0}, "benchmarks": scores}
    result |= {"precision": "float32", "context_length": 2048, "truncated": {"contexts": 2080, "continuations": 0}}
    path = tmp_path / "mine" / "result.json"
    path.parent.mkdir()
    path.write_text(json.dumps(result))
    assert main(["table", "3", "--ours", str(path)]) == 0
    shown = capsys.readouterr()
    assert "ours: mine" in shown.out and shown.out.count("12.35") + shown.out.count("12.34") == 10
    assert "13 of 13 averages" in shown.err
    assert "mine: float32, 2,080 contexts cut to 2,048 tokens; standard errors HellaSwag 0.50" in shown.err
    for change, said in (
        ({"key": {"suite": "quick", "limit": 0}}, "evaluated in suite quick; evaluate it with --suite paper"),
        ({"key": {"suite": "paper", "limit": 1}}, "evaluated with --limit 1; evaluate again without it"),
        (
            {"benchmarks": scores | {"PIQA": {"score": 50.0, "questions": 9}}},
            "answered 9 questions of PIQA, which has 1,838",
        ),
        ({"status": "failed"}, "failed; run it again"),
    ):
        path.write_text(json.dumps({**result, **change}))
        assert main(["table", "3", "--ours", str(path.parent)]) == 2
        assert said in capsys.readouterr().err
    for damage in ('{"format": ', json.dumps(result | {"benchmarks": {}}), json.dumps(result | {"model": 3})):
        path.write_text(damage)
        assert main(["table", "3", "--ours", str(path.parent)]) == 4
        assert "its result.json is damaged or cut short" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("model", "is a model; evaluate it with --suite paper"),
        ("no", "no such directory"),
        ("empty", "holds no result.json"),
        (".", "holds evaluations, but is none itself; name them: mine"),
    ):
        assert main(["table", "3", "--ours", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    assert main(["table", "4"]) == 2


def test_scores_are_shown_as_the_paper_prints_them(capsys):
    assert main(["table", "7"]) == 0
    shown = capsys.readouterr().out
    assert "54.7 " in shown and "54.70" not in shown and "52.90" in shown
