"""Needle grid, passkey and key-value retrieval: one fact at a chosen depth.  Fact sheet, section 2; wording of our own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

from lcx.errors import UserError
from lcx.tasks import niah
from lcx.tasks.haystack import NOISE, insert, prose
from lcx.tasks.sample import Sample
from lcx.tasks.sizing import Draft, Encode, Form, counter, fit_samples

GRID_ANSWER_TOKENS, PASSKEY_ANSWER_TOKENS, KV_ANSWER_TOKENS = 200, 8, 50
GRID, PASSKEY, KV = 100, 101, 102  # numbers of the tasks, as RULER's have theirs


def needle_lengths(shortest: int = 1_000, longest: int = 16_000, points: int = 35) -> list[int]:
    """Return the lengths of the grid in tokens, evenly spaced and rounded."""
    return [int(length) for length in np.round(np.linspace(shortest, longest, points))]


def needle_depths(points: int = 35, sigmoid: bool = False) -> list[float]:
    """Return the depths of the grid, 0 to 100 percent: evenly spaced, or denser at both ends along a logistic curve."""
    depths = np.linspace(0, 100, points)
    if sigmoid:
        inner = 100 / (1 + np.exp(-0.1 * (depths - 50)))
        depths = np.where((depths == 0) | (depths == 100), depths, inner)
    return [float(depth) for depth in np.round(depths, 3)]


def needle_grid(
    encode: Encode,
    lengths: Iterable[int],
    depths: Iterable[float],
    *,
    needles: int = 1,
    seed: int = 42,
    template: Callable[[str], str] | None = None,
) -> list[Sample]:
    """Return a sample for each length and depth, lengths first.

    The needle goes to token floor(length of the prose * depth), moved back to the end of the sentence before; 100 appends it.  Several
    needles, values of one key, follow at distances of (100 - depth) / needles percent.  A length is a budget that includes
    the question and 200 tokens for the answer.  The score is the share of values found; the original has a model judge.

    Args:
      encode, seed, template: as in `generate`.
      lengths: tokens.
      depths: 0 to 100 percent.
      needles: at least 1.

    Raises:
      UserError: a number out of range, or a length that is too small.
    """
    lengths, depths = list(lengths), list(depths)
    if needles < 1 or not all(0 <= depth <= 100 for depth in depths):
        raise UserError(f"needles={needles} must be at least 1, and depths={depths} 0 to 100")
    count = lru_cache(maxsize=1 << 14)(counter(encode))
    samples = []
    for length in lengths:
        for depth in depths:
            places = tuple(depth + i * (100 - depth) / needles for i in range(needles))
            form = Form("needle_grid", GRID_ANSWER_TOKENS, "all", _grid_build(count, places), niah.LEAST_WORDS, 1 << 30)
            samples += fit_samples(form, encode, length, [(seed, GRID, length, round(1_000 * depth))], (), template)
    return samples


def _grid_build(count: Callable[[str], int], depths: tuple[float, ...]):
    def build(rng, shared, size, plan) -> Draft:
        (key,) = niah.distinct(rng, "word", 1)
        values = niah.distinct(rng, "number", len(depths))
        sentences = prose(size)
        # sentence by sentence, because counting every prefix of every size would cost more than all the rest
        ends = np.cumsum([count(sentence if i == 0 else f" {sentence}") for i, sentence in enumerate(sentences)])
        targets = [int(ends[-1]) if depth >= 100 else math.floor(ends[-1] * depth / 100) for depth in depths]
        slots = [int(slot) for slot in np.searchsorted(ends, targets, side="right")]
        lines = [niah.needle("number", key, value) for value in values]
        instruction, question, prefix = niah.ask("number", [key], len(depths))
        context = " ".join(insert(sentences, lines, slots))
        return Draft(f"{instruction}\n{context}\n{question}", prefix, tuple(values), depths, question=question)

    return build


def passkey(
    encode: Encode,
    budget: int,
    *,
    positions: int = 59,
    keys: int = 10,
    seed: int = 42,
    template: Callable[[str], str] | None = None,
) -> list[Sample]:
    """Build lines of noise around one that states a 5-digit key twice; the first integer of the output must equal the key.

    InfiniteBench, arXiv:2402.13718: `positions` evenly spaced places with `keys` random keys each, positions first.

    Args:
      encode, budget, seed, template: as in `generate`.

    Raises:
      UserError: a number out of range, or a budget that is too small.
    """

    def make(depth: float) -> Form:
        def build(rng, shared, size, plan) -> Draft:
            key = int(rng.integers(10_000, 100_000))
            line = f"The pass key is {key}. Remember it: {key} is the pass key."
            text = "\n".join(insert([NOISE] * size, [line], [int(size * depth / 100)]))
            question = "What is the pass key?"
            body = f"The text below hides a pass key among other lines. Find and memorize it.\n{text}\n{question}"
            return Draft(body, "The pass key is", (str(key),), (depth,), question=question)

        return Form("passkey", PASSKEY_ANSWER_TOKENS, "first_integer", build, 1, 1 << 30)

    return _sweep(make, PASSKEY, encode, budget, positions, keys, seed, template)


def kv_retrieval(
    encode: Encode,
    budget: int,
    *,
    positions: int = 500,
    keys: int = 1,
    seed: int = 42,
    template: Callable[[str], str] | None = None,
) -> list[Sample]:
    """Build a JSON object of uuid pairs; the value of one key must be a word of the output.  The requested pair sweeps the object.

    InfiniteBench, arXiv:2402.13718.  Arguments and errors are those of `passkey`.
    """

    def make(depth: float) -> Form:
        def build(rng, shared, size, plan) -> Draft:
            names, values = (niah.distinct(stream, "uuid", size) for stream in rng.spawn(2))
            asked = min(int(size * depth / 100), size - 1)
            text = json.dumps(dict(zip(names, values, strict=True)))
            question = f'Which value belongs to the key "{names[asked]}"?'
            body = f"Memorize the JSON object below.\n{text}\n{question}"
            return Draft(body, f'The value of "{names[asked]}" is "', (values[asked],), (depth,), question=question)

        return Form("kv_retrieval", KV_ANSWER_TOKENS, "token", build, 1, 1 << 30)

    return _sweep(make, KV, encode, budget, positions, keys, seed, template)


def _sweep(make: Callable[[float], Form], task: int, encode, budget, positions, keys, seed, template) -> list[Sample]:
    if positions < 1 or keys < 1 or seed < 0:
        raise UserError(f"positions={positions} and keys={keys} must be at least 1, and seed={seed} at least 0")
    samples = []
    for number, depth in enumerate(np.linspace(0, 100, positions)):
        draws = [(seed, task, number, i) for i in range(keys)]
        samples += fit_samples(make(float(depth)), encode, budget, draws, (seed, task), template)
    return samples
