"""README and docs say what the recorded results say, and its commands exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tool():
    spec = importlib.util.spec_from_file_location("update_docs", ROOT / "tools" / "update_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", tool().BLOCKS)
def test_tables_are_generated_from_the_recorded_results(name):
    path, block = tool().BLOCKS[name]
    text = path.read_text(encoding="utf-8")
    assert tool().replaced(text, name, block()) == text


def test_scores_of_suites_stand_in_one_table_only_if_they_are_of_one_model(monkeypatch):
    docs = tool()
    load = docs.load
    rows = docs.evaluation_scores().splitlines()[:12]
    assert "`paper` | `today` | `quick`" in rows[0] and {row.count("|") for row in rows} == {9}
    monkeypatch.setattr(docs, "load", lambda name: load(name) | {"key": {"model": name}})
    with pytest.raises(SystemExit, match="of different models"):
        docs.evaluation_scores()


def test_the_two_commands_are_targets_and_the_links_lead_somewhere():
    readme, makefile = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("quickstart", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.M)
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (ROOT / link).exists(), link
