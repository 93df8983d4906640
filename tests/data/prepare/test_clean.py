from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobillama.data.prepare.clean import Cleaner, SpacedWords, repair
from mobillama.recipe import CleanConfig

ENGLISH = (
    "The committee met in the town hall on Tuesday, and with one voice they agreed to have the old bridge mended. "
    "It will be closed for repairs until the end of the month. Those who live across the river are to use the ferry. "
    "A notice of the decision was posted on every door of the village, so that nobody could say they had not known. "
    "The mayor thanked the members for their patience and wished them a safe journey home that evening. "
    "Nobody spoke against it, and the meeting came to an end before the bells of the church had struck nine."
)
GERMAN = (
    "Der Ausschuss trat am Dienstag im Rathaus zusammen und beschloss einstimmig, die alte Brücke instand zu setzen. "
    "Sie bleibt bis zum Ende des Monats gesperrt. Wer jenseits des Flusses wohnt, nimmt solange die Fähre."
)


def test_encoding_is_repaired():
    assert repair("\ufeffa\r\nb\rc\td\x00\x1b e\u0301 \x85z") == "a\nb\nc\td \u00e9 z"
    assert repair("plain\n\ttext") == "plain\n\ttext"


@given(st.text())
def test_repairing_twice_changes_nothing(text):
    assert repair(repair(text)) == repair(text)


def test_by_default_nothing_is_changed_or_dropped():
    clean = Cleaner(CleanConfig())
    for text in ("\ufeffraw\r\n", " ", "{", GERMAN):
        assert clean(text) == (text, "")
    assert clean("") == ("", "empty")
    assert Cleaner(CleanConfig(repair=True))("\ufeff\x00") == ("", "empty")


@pytest.mark.parametrize(
    ("config", "text", "verdict"),
    [
        (CleanConfig(language="en"), GERMAN, "other_language"),
        (CleanConfig(language="en"), "0x1f 7 7 7", "uncertain_language"),
        (CleanConfig(language="de"), GERMAN, ""),
        (CleanConfig(language="en"), ENGLISH, ""),
        (CleanConfig(gopher_repetition=True), "same line again\n" * 20, "dup_para_frac|dup_line_frac"),
        (CleanConfig(gopher_repetition=True), ENGLISH, ""),
        (CleanConfig(gopher_quality=True), "too short", "gopher_short_doc"),
        (CleanConfig(gopher_quality=True), ENGLISH, ""),
        (CleanConfig(gopher_quality=True), "12 " * 99, "gopher_below_avg_threshold"),
        (CleanConfig(c4_quality=True), ENGLISH + "\nint main() {return 0;}.", "curly_bracket"),
        (CleanConfig(c4_quality=True), "One line only.", "too_few_sentences"),
    ],
    ids=range(11),
)
def test_rules_drop_what_they_should(config, text, verdict):
    assert Cleaner(config)(text)[1] in verdict.split("|")


def test_c4_keeps_only_lines_that_end_a_sentence():
    text, verdict = Cleaner(CleanConfig(c4_quality=True))(f"Home | About | Contact\n{ENGLISH}")
    assert (text, verdict) == (ENGLISH, "")


def test_sentences_are_found():
    assert SpacedWords().sent_tokenize('He said: "No." She left! Why? 3.5 m. tail') == [
        'He said: "No."',
        "She left!",
        "Why?",
        "3.5 m.",
        "tail",
    ]
