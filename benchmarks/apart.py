"""Measuring each contender of a benchmark in a process of its own, which leaves nothing behind for the next one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from mobillama.console import note


def measure_apart(title: str, name: str, limit: int) -> dict[str, Any]:
    """Run this script again with ``--one NAME``; return the JSON object that it printed, or ``{"error": its last line}``."""
    note(f"{title}: {name} …")
    command = [sys.executable, sys.argv[0], *sys.argv[1:], "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        found = json.loads(lines[-1]) if lines else {"error": done.stderr.strip().splitlines()[-1:]}
    except subprocess.TimeoutExpired:
        found = {"error": [f"took longer than {limit} s"]}
    note(f"  {found.get('tokens_per_second', found)}")
    return dict(found)
