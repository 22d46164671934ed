"""Short problems of arithmetic in words, for a chat model: products and sums of numbers from 2 to 12, plain and in stories."""

from __future__ import annotations

import random
from itertools import combinations_with_replacement
from typing import Any

from dqo.demo.rollouts import rng_of

NUMBERS = range(2, 13)
# Before every problem, so that the model answers in few tokens; 4 and 6 are in no problem together
EXAMPLE = [
    {"role": "system", "content": "Solve the problem."},
    {"role": "user", "content": "What is 6 times 4?"},
    {"role": "assistant", "content": "6 * 4 = 24"},
]
NAMES = ("Tom", "Mia", "Ben", "Ana", "Sam", "Lea")
PEOPLE = ("friends", "children", "neighbours", "teachers")
THINGS = ("apples", "books", "pencils", "coins", "stickers", "cups")
# {kind: (share of the problems, wordings, whether the answer is the product; else it is the sum)}
KINDS: dict[str, tuple[float, tuple[str, ...], bool]] = {
    "product": (
        0.2,
        ("What is {a} times {b}?", "Calculate {a} * {b}.", "Multiply {a} by {b}.", "What is the product of {a} and {b}?"),
        True,
    ),
    "sum": (0.2, ("What is {a} plus {b}?", "Calculate {a} + {b}.", "Add {a} and {b}."), False),
    "story of a product": (
        0.3,
        (
            "Each of {a} {people} brings {b} {things}. How many {things} do they bring?",
            "{name} fills {a} boxes with {b} {things} each. How many {things} are in the boxes?",
        ),
        True,
    ),
    "story of a sum": (
        0.3,
        (
            "{name} has {a} {things} and gets {b} more. How many {things} does {name} have?",
            "There are {a} {things} on one table and {b} {things} on another. How many {things} are there?",
        ),
        False,
    ),
}  # fmt: skip


def split(seed: int, train: int, test: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training problems, test problems) with messages, answer, and prompt_id "KIND: TEXT". No two numbers of a test problem
    stand together in a training problem, in either order, in a sum or in a product."""
    rng = rng_of(seed, "real model")
    pairs = [pair for pair in combinations_with_replacement(NUMBERS, 2) if pair != (4, 6)]
    rng.shuffle(pairs)
    held_out = round(0.4 * len(pairs))
    return _problems(rng, pairs[held_out:], train), _problems(rng, pairs[:held_out], test)


def _problems(rng: random.Random, pairs: list[tuple[int, int]], count: int) -> list[dict[str, Any]]:
    """`count` different problems of these pairs of numbers, the kinds by their shares, in a random order."""
    found: dict[str, dict[str, Any]] = {}
    for kind, (share, wordings, product) in KINDS.items():
        wanted = len(found) + round(count * share) if kind != list(KINDS)[-1] else count
        while len(found) < wanted:
            a, b = rng.sample(rng.choice(pairs), 2)
            words = {"name": rng.choice(NAMES), "people": rng.choice(PEOPLE), "things": rng.choice(THINGS)}
            text = rng.choice(wordings).format(a=a, b=b, **words)
            prompt = [*EXAMPLE, {"role": "user", "content": text}]
            answer = str(a * b if product else a + b)
            found[text] = {"prompt": prompt, "answer": answer, "prompt_id": f"{kind}: {text}"}
    made = list(found.values())
    rng.shuffle(made)
    return made
