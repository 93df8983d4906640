"""README says what the recorded results say, and its commands exist."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_quickstart_table_is_generated_from_the_recorded_result():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "tools" / "update_readme.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    result = json.loads(tool.RESULT.read_text(encoding="utf-8"))
    assert tool.quickstart_block(result) in readme
    assert tool.replace_block(readme, tool.quickstart_block(result)) == readme


def test_the_two_commands_are_targets_and_the_links_lead_somewhere():
    readme, makefile = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("quickstart", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.M)
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (ROOT / link).exists(), link
