"""RULER's variable tracing: a chain of assignments scattered over noise."""

from __future__ import annotations

import string

import numpy as np

from lcx.tasks.haystack import NOISE, in_lines
from lcx.tasks.sizing import Draft, Form, generator

ANSWER_TOKENS = 30
NUM_NAMES = 5  # 4 hops
EXAMPLE_TOKENS = 500


def _names(rng: np.random.Generator, length: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < NUM_NAMES:
        names["".join(string.ascii_uppercase[i] for i in rng.integers(0, 26, length))] = None
    return list(names)


def _value(rng: np.random.Generator, other: str = "") -> str:
    while (value := str(int(rng.integers(10_000, 99_999)))) == other:
        pass
    return value


def _chain(
    rng: np.random.Generator, names: list[str], value: str, num_lines: int
) -> tuple[str, str, tuple[float, ...]]:
    """Return (text and question, answer prefix, depths)."""
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {name} = VAR {before}" for before, name in zip(names, names[1:], strict=False)]
    hay = [NOISE] * num_lines
    # an example without noise is only the chain
    context, depths = in_lines(rng, lines, hay) if hay else ("\n".join(lines), ())
    body = (
        "The lines below hide assignments to variables. Memorize which variables end up with the same value.\n"
        f"{context}\nQuestion: Which variables hold the value {value}, directly or through other variables?"
    )
    return body, f"Answer: {NUM_NAMES} variables hold the value {value}. They are", depths


def _example(rng: np.random.Generator, num_lines: int, other: str = "") -> str:
    """Return a worked chain of three-letter names."""
    names, value = _names(rng, 3), _value(rng, other)
    body, prefix, _ = _chain(rng, names, value, num_lines)
    return f"{body}\n{prefix} {' '.join(names)}\n\n"


def _plans(budget: int, count) -> list[int]:
    """Return the lines of noise in the worked example: the most that keep it within min(500, budget // 3) tokens, else none."""
    limit = min(EXAMPLE_TOKENS, budget // 3)
    lines = NUM_NAMES
    while lines < 100 and count(_example(generator(0), lines)) <= limit:
        lines += 1
    return [lines - 1, 0] if lines > NUM_NAMES else [0]


def _build(rng, shared, size, plan) -> Draft:
    example_rng, names_rng, place_rng = rng.spawn(3)
    names, value = _names(names_rng, 5), _value(names_rng)
    body, prefix, depths = _chain(place_rng, names, value, size)
    question = body[body.rindex("Question:") :]
    return Draft(_example(example_rng, plan, value) + body, prefix, tuple(names), depths, question=question)


def form(name: str) -> Form:
    """Build variable tracing: 5 variables, 4 hops, the first assigned a number, the order of the chain kept.  Unit of size: lines of noise.

    The worked example has three-letter names and a haystack such that it takes at most min(500, budget // 3) tokens; where the five
    lines of its chain and five of noise take more, it is only the chain.
    """
    return Form(name, ANSWER_TOKENS, "all", _build, NUM_NAMES, 1 << 30, _plans)
