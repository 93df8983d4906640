"""Messages of other libraries within ours."""

from __future__ import annotations

from mobillama.errors import cause


def test_a_cause_is_one_line_and_ends_at_a_whole_word():
    assert cause(ValueError("short\nand more")) == "short"
    assert cause(ValueError("seven " * 99)) == "seven " * 33 + "…"
    assert cause(ValueError()) == "ValueError"
