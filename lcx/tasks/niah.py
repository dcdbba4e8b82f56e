"""RULER's eight needle tasks: find the values of keys in noise, prose, or a haystack of other needles."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lcx.tasks.haystack import NOISE, in_lines, in_prose
from lcx.tasks.sizing import Draft, Form
from lcx.tasks.words import ADJECTIVES, NOUNS

ANSWER_TOKENS = 128
MOST_KEYS = len(ADJECTIVES) * len(NOUNS)
LEAST_WORDS = 16


@dataclass(frozen=True)
class Niah:
    """One needle task.

    Attributes:
      haystack: "noise", "prose" or "needles" (only other needles).
      keys, values: "word", "number" or "uuid".
      num_keys: needles with different keys, the distractors of a haystack of needles not counted.
      num_values: values, and so needles, of a key.
      num_asked: requested keys.
    """

    haystack: str
    keys: str = "word"
    values: str = "number"
    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1


NIAH = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("prose"),
    "niah_single_3": Niah("prose", values="uuid"),
    "niah_multikey_1": Niah("prose", num_keys=4),
    "niah_multikey_2": Niah("needles"),
    "niah_multikey_3": Niah("needles", keys="uuid", values="uuid"),
    "niah_multivalue": Niah("prose", num_values=4),
    "niah_multiquery": Niah("prose", num_keys=4, num_asked=4),
}


def distinct(rng: np.random.Generator, kind: str, count: int) -> list[str]:
    """Return different words (adjective-noun), numbers (7 digits, the first not 0) or uuids (version 4).

    The first of them do not depend on `count`, so that a haystack that grows keeps its needles.
    """
    if kind == "word":
        picks = rng.permutation(MOST_KEYS)[:count]
        return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in picks]
    values: dict[str, None] = {}
    while len(values) < count:
        if kind == "number":
            values[str(int(rng.integers(1_000_000, 10_000_000)))] = None
        else:
            values[str(uuid.UUID(bytes=rng.bytes(16), version=4))] = None
    return list(values)


def needle(kind: str, key: str, value: str) -> str:
    """Return the sentence that gives a key its value."""
    return f"One special magic {kind} for {key} is {value}."


def listed(names: Sequence[str]) -> str:
    """Join names by commas, the last by ", and"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


def ask(kind: str, keys: Sequence[str], num_values: int) -> tuple[str, str, str]:
    """Return (instruction, question, answer prefix) for these keys; singular if one value is requested."""
    names = listed(keys)
    if len(keys) * num_values == 1:
        instruction = f"A special magic {kind} is hidden in the text below. Memorize it; a question about it comes after the text."
        question = f"What is the special magic {kind} for {names} in the text above?"
        return instruction, question, f"In the text above, the special magic {kind} for {names} is"
    instruction = f"Some special magic {kind}s are hidden in the text below. Memorize them; a question about them comes after the text."
    question = f"What are all the special magic {kind}s for {names} in the text above?"
    return instruction, question, f"In the text above, the special magic {kind}s for {names} are"


def form(name: str) -> Form:
    """Return the form of a needle task.  Unit of size: lines of noise, words of prose, or other needles."""
    task = NIAH[name]
    num_needles = task.num_keys * task.num_values

    def build(rng, shared, size, plan) -> Draft:
        keys_rng, values_rng, place_rng = rng.spawn(3)
        others = size if task.haystack == "needles" else 0
        keys = distinct(keys_rng, task.keys, task.num_keys + others)
        values = distinct(values_rng, task.values, num_needles + others)
        lines = [needle(task.values, keys[i // task.num_values], values[i]) for i in range(num_needles)]
        # the same order in every sample, as RULER's fixed seed gives it
        needles = [lines[i] for i in shared.permutation(num_needles)]
        if task.haystack == "prose":
            context, depths = in_prose(place_rng, needles, size)
        else:
            pairs = zip(keys[task.num_keys :], values[num_needles:], strict=True)
            hay = [needle(task.values, *pair) for pair in pairs] if others else [NOISE] * size
            context, depths = in_lines(place_rng, needles, hay)
        instruction, question, prefix = ask(task.values, keys[: task.num_asked], task.num_values)
        references = tuple(values[: task.num_asked * task.num_values])
        return Draft(f"{instruction}\n{context}\n{question}", prefix, references, depths, question=question)

    least, most = {
        "noise": (num_needles, 1 << 30),
        "prose": (LEAST_WORDS, 1 << 30),
        "needles": (1, MOST_KEYS - 1 if task.keys == "word" else 1 << 30),
    }[task.haystack]
    return Form(name, ANSWER_TOKENS, "all", build, least, most)
