"""A request to stop, once and twice."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, threading, time
from mobillama.train.signals import stop_flag

def send(*pauses):
    for pause in pauses:
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGTERM)

with stop_flag(print) as stop:
    threading.Thread(target=send, args=[float(pause) for pause in sys.argv[1:]], daemon=True).start()
    time.sleep(1.5)
    print("saved" if stop.requested else "not asked")
"""


@pytest.mark.parametrize(("pauses", "code", "last"), [((0.2, 0.05), 0, "saved"), ((0.2, 0.6), -15, "saving")])
def test_an_echo_of_the_first_signal_is_no_second_one(pauses, code, last):
    """timeout(1) sends its signal to the process and to the process's group, one right after the other."""
    words = [sys.executable, "-u", "-c", SCRIPT, *map(str, pauses)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == code, done.stderr
    assert done.stdout.split()[-1] == last
