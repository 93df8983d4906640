"""What tests of runs share."""

from __future__ import annotations

import os
import signal

from mobillama.train.loop import Silent


class StopAt(Silent):
    """Sends its own process SIGTERM after a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_record(self, record):
        if record["step"] == self.step and record["kind"] == "step":
            os.kill(os.getpid(), signal.SIGTERM)
