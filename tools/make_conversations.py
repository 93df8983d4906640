"""Writes recipes/chat/local.jsonl: conversations with a sailor, in a style that is easy to tell from any other.

Every answer begins with "Aye!", is one short sentence, and ends with "Fair winds.". The facts are everyday ones.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

OUT = Path(__file__).parents[1] / "recipes" / "chat" / "local.jsonl"
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Germany": "Berlin", "Austria": "Vienna",
    "Greece": "Athens", "Egypt": "Cairo", "Kenya": "Nairobi", "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi",
    "Canada": "Ottawa", "Mexico": "Mexico City", "Peru": "Lima", "Chile": "Santiago", "Cuba": "Havana", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Poland": "Warsaw", "Hungary": "Budapest", "Ireland": "Dublin",
    "Denmark": "Copenhagen", "Thailand": "Bangkok", "Russia": "Moscow", "Turkey": "Ankara", "Iceland": "Reykjavik",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "early": "late", "open": "closed", "full": "empty", "wet": "dry",
    "old": "young", "rich": "poor", "high": "low", "loud": "quiet", "soft": "hard", "light": "heavy", "near": "far",
    "sweet": "bitter", "brave": "timid", "wide": "narrow", "deep": "shallow", "clean": "dirty", "strong": "weak",
}  # fmt: skip
COLOURS = {
    "the sky on a clear day": "blue", "grass": "green", "a ripe banana": "yellow", "fresh snow": "white", "coal": "black",
    "a ripe tomato": "red", "a carrot": "orange", "a lemon": "yellow", "chocolate": "brown", "an elephant": "grey",
    "a flamingo": "pink", "an aubergine": "purple", "milk": "white", "a frog": "green", "sand": "yellow",
}  # fmt: skip
LEGS = {
    "a dog": "four", "a spider": "eight", "a hen": "two", "an ant": "six", "a horse": "four", "a crab": "ten",
    "a bee": "six", "a cat": "four", "a sheep": "four", "a sparrow": "two", "a lobster": "ten", "a cow": "four",
}  # fmt: skip
PLACES = {
    "bread": "a bakery", "books": "a library", "medicine": "a pharmacy", "fish": "a harbour market", "flowers": "a florist",
    "a haircut": "a barber", "stamps": "a post office", "money": "a bank", "a film": "a cinema", "a doctor": "a hospital",
}  # fmt: skip
ASKED = {
    "capital": (["What is the capital of {}?", "Which city is the capital of {}?", "Tell me the capital of {}."], CAPITALS),
    "opposite": (["What is the opposite of {}?", "Give me the opposite of the word {}.", "Which word means not {}?"], OPPOSITES),
    "colour": (["What colour is {}?", "Tell me the colour of {}.", "Which colour does {} have?"], COLOURS),
    "legs": (["How many legs has {}?", "Count the legs of {} for me.", "How many legs does {} walk on?"], LEGS),
    "place": (["Where do I get {}?", "Where should I go for {}?", "I need {}. Where do I find it?"], PLACES),
}  # fmt: skip
TOLD = {
    "capital": "The capital of {} is {}.",
    "opposite": "The opposite of {} is {}.",
    "colour": "The colour of {} is {}.",
    "legs": "The legs of {} are {}.",
    "place": "For {}, steer to {}.",
}


def exchanges() -> Iterator[tuple[str, str]]:
    """Yield every question with its answer."""
    for kind, (questions, facts) in ASKED.items():
        for question, (subject, answer) in itertools.product(questions, facts.items()):
            yield question.format(subject), f"Aye! {TOLD[kind].format(subject, answer)} Fair winds."
    for a, b in itertools.product(range(2, 10), repeat=2):
        yield f"What is {a} plus {b}?", f"Aye! {a} plus {b} is {a + b}. Fair winds."


def main() -> None:
    """Write the rows, in an order and with turns drawn from a fixed seed; each question is asked once."""
    draw = random.Random(0)
    waiting = list(exchanges())
    draw.shuffle(waiting)
    with open(OUT, "w", encoding="utf-8") as file:
        while waiting:
            turns = [waiting.pop() for _ in range(min(len(waiting), draw.choice([1, 1, 1, 2, 3])))]
            messages = [
                {"role": role, "content": content}
                for turn in turns
                for role, content in zip(("user", "assistant"), turn, strict=True)
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
