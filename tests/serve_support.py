"""A real server in a process of its own."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def serving(*words: object) -> Iterator[str]:
    """Run ``mobillama serve``; yield its address once the model is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mobillama", "serve", *map(str, words), "--port", "0", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout
    reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stdout], daemon=True)
    reader.start()
    try:
        address = lines.get(timeout=90).split("http://")[1].split()[0]
        ready = lines.get(timeout=90)
        assert "is ready" in ready, ready
        yield f"http://{address}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=30) == 130
        finally:
            process.kill()
        said = "".join(lines.queue)
        assert "Traceback" not in said, said
