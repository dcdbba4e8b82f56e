"""Haystacks of the needle tasks: lines of noise, or the prose of a novel cut at a number of words."""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from lcx import texts

NOISE = "The river is wide. The road is long. The bread is warm. We walk on. Nobody waits."
DEPTHS = tuple(int(depth) for depth in np.round(np.linspace(0, 100, 40)))  # percent
# a point after these does not end a sentence
TITLES = frozenset({"Mr.", "Mrs.", "Dr.", "St.", "Messrs.", "&c."})
ENDS = re.compile(r"[.!?][\"'_)\]]*$")


def ends_sentence(word: str) -> bool:
    return ENDS.search(word) is not None and word.lstrip("\"'_([") not in TITLES


@lru_cache
def novel_words() -> tuple[str, ...]:
    return tuple(texts.read("pride_and_prejudice").split())


def prose(num_words: int) -> list[str]:
    """Return sentences of the first `num_words` words of the novel, repeated cyclically; the last one is cut and closed with a point."""
    words = novel_words()
    words = list((words * (num_words // len(words) + 1))[:num_words])
    if not ends_sentence(words[-1]):
        words[-1] = words[-1].rstrip(",;:-—.") + "."
    ends = [i + 1 for i, word in enumerate(words) if ends_sentence(word)]
    if ends[-1:] != [num_words]:
        ends.append(num_words)
    return [" ".join(words[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def in_prose(rng: np.random.Generator, needles: list[str], num_words: int) -> tuple[str, tuple[float, ...]]:
    """Return prose with each needle at a sentence boundary, at depths drawn without replacement from 40 points.

    Returns:
      The text, and the depths in percent of the sentences.
    """
    sentences = prose(num_words)
    depths = sorted(DEPTHS[i] for i in rng.choice(len(DEPTHS), len(needles), replace=False))
    slots = [len(sentences) * depth // 100 for depth in depths]
    return " ".join(insert(sentences, needles, slots)), tuple(float(depth) for depth in depths)


def in_lines(rng: np.random.Generator, needles: list[str], lines: list[str]) -> tuple[str, tuple[float, ...]]:
    """Return distinct random lines with each needle on a line of its own, in this order.

    Returns:
      The text, and the depths in percent of the lines.
    """
    slots = sorted(int(slot) for slot in rng.choice(len(lines), len(needles), replace=False))
    return "\n".join(insert(lines, needles, slots)), tuple(100.0 * slot / len(lines) for slot in slots)


def insert(parts: list[str], needles: list[str], slots: list[int]) -> list[str]:
    """Insert each needle before the part of its slot; slots rise."""
    result = list(parts)
    # the last first, so that the numbers of the parts before it hold
    for needle, slot in list(zip(needles, slots, strict=True))[::-1]:
        result.insert(slot, needle)
    return result
