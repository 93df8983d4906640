"""The command line, with a rest after each of many small batches: time for a test to kill it between them."""

from __future__ import annotations

import sys
import time

from mobillama.cli import main
from mobillama.evaluate.samples import Samples
from mobillama.evaluate.scorer import Scorer

flush, create = Samples.flush, Scorer.__init__


def flush_and_rest(self: Samples) -> None:
    flush(self)
    time.sleep(0.1)


def create_small(self: Scorer, model, precision, longest, packs) -> None:
    create(self, model, precision, longest, batch_tokens=32, packs=packs)


Samples.flush, Scorer.__init__ = flush_and_rest, create_small
import mobillama.evaluate.scorer as scorer  # noqa: E402

scorer.ROW_TOKENS = 32
sys.exit(main(sys.argv[1:]))
