"""Guessing by look-up: what is guessed, and that answers do not change."""

from __future__ import annotations

import numpy as np
import pytest
from test_native_engine import model_of

from mobillama.engine.lookup import Lookup
from mobillama.engine.native_engine import NativeEngine
from mobillama.engine.sampling import Sampling
from mobillama.engine.stream import Session, stream_tokens


def test_what_followed_the_last_tokens_most_recently_is_guessed():
    lookup = Lookup([1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 1, 2, 3], 8)
    assert lookup.guess(8) == [6, 7, 1, 2]  # four to begin with
    assert lookup.guess(2) == [6, 7]
    assert lookup.guess(0) == []
    lookup.extend([4])
    assert lookup.guess(8) == [5, 1, 2, 3]  # after 2 3 4, though 3 4 alone would say the same
    lookup.extend([9])
    assert lookup.guess(8) == []  # 4 9 has not stood before
    lookup.extend([1, 2])
    assert lookup.guess(8) == [3, 4, 9, 1]  # 9 1 2 has not, 1 2 has


def test_two_tokens_are_enough_and_nothing_is_guessed_where_none_is_asked_for():
    assert Lookup([1, 2, 8, 3, 1, 2], 8).guess(8) == [8, 3, 1, 2]
    assert Lookup([1, 2, 8, 3, 1, 2], 0).guess(8) == []
    assert Lookup([], 8).guess(8) == []


def test_right_guesses_grow_and_wrong_ones_shrink():
    lookup = Lookup([1, 2, *range(10, 40), 1, 2], 8)
    widths = []
    for right in (4, 8, 3, 0, 0, 1, 2, 4):
        guessed = len(lookup.guess(100))
        widths.append(guessed)
        lookup.learn(guessed, min(right, guessed))
    assert widths == [4, 8, 8, 4, 1, 1, 2, 4]


@pytest.fixture(scope="module")
def engine():
    return NativeEngine(model_of("q4_0", head_dim=32, num_key_value_heads=2, max_position_embeddings=120), 1)


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(0.3, 5), Sampling(0.4, 4, repetition_penalty=1.1)], ids=str)
def test_answers_are_the_same_with_guesses_and_take_fewer_feeds(engine, sampling):
    feeds, saved = [], 0
    for method in ("feed", "feed_each"):
        plain = getattr(engine, method)
        setattr(engine, method, lambda ids, plain=plain: feeds.append(len(ids)) or plain(ids))
    for seed in range(6):
        draw = np.random.default_rng(seed)
        ids = draw.integers(0, 333, 7).tolist() * 4 + draw.integers(0, 333, 2).tolist()
        for max_tokens, stop_ids in ((40, ()), (1000, ()), (1, ()), (60, set(range(0, 333, 9)))):
            answers, counts = [], []
            for lookup in (0, 1, 8):
                feeds.clear()
                random = np.random.default_rng(seed)
                answers.append(
                    list(stream_tokens(Session(engine), ids, stop_ids, sampling, max_tokens, random, lookup))
                )
                answers[-1].append(random.random())  # no number more or less was drawn
                counts.append(len(feeds))
            assert answers[0] == answers[1] == answers[2]
            assert counts[2] <= counts[0]
            saved += counts[0] - counts[2]
    # A greedy random model soon goes in circles; what is drawn repeats too little to be sure of a gain.
    assert saved > 100 or sampling.temperature > 0


def test_a_session_with_guesses_left_in_it_goes_on_with_another_text(engine):
    session, ids = Session(engine), [5, 6, 7] * 6
    random = np.random.default_rng(0)
    answer = stream_tokens(session, ids, (), Sampling(0), 50, random, 8)
    begun = [next(answer) for _ in range(9)]
    answer.close()
    alone = NativeEngine(model_of("q4_0", head_dim=32, num_key_value_heads=2, max_position_embeddings=120), 1)
    further = [*ids, *begun[:5], 11, 12]
    assert np.array_equal(session.set(further), alone.feed(further))
