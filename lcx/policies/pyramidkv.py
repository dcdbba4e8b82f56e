"""PyramidKV: SnapKV's votes, and budgets that fall from the first layer to the last."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import jax.numpy as jnp
import numpy as np

from lcx.errors import UserError
from lcx.policies.snapkv import SnapKV

RULES = ("authors", "kvpress")


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Choice of tokens by SnapKV's votes with a budget per layer, once at the end of the prompt.

    PyramidKV, Cai et al. 2024, arXiv:2406.02069, section 4.2: with b tokens to select on average the last layer selects b / beta and the
    first 2 b - b / beta, in equal steps between; window 32, kernel 5 and beta 20 of the authors' runs, budget 2,048.  rule="authors"
    (KVCache-Factory): the window comes on top of b, divisions round down, a prompt shorter than the budget is kept whole and one
    shorter than 2 b is cut alike in every layer.  rule="kvpress" (0.5.5): the window lies within b, shares are rounded half to even, and
    all layers get b where the last would get less than the window.  Differs from the authors: one set per KV head, as `SnapKV`.

    Args:
      budget: tokens kept per KV head on average over the layers, the window included.
      window, kernel, pooling: as in `SnapKV`.
      beta: share of the last layer, 1 / beta of the average; an integer of at least 1.
      rule: "authors" or "kvpress".
      layer, num_layers: filled in by `at`.
    """

    budget: int = 2_048
    window: int = 32
    kernel: int = 5
    pooling: str = "avg"
    beta: int = 20
    rule: str = "authors"
    layer: int = 0
    num_layers: int = 1

    exact = "While the prompt is within the budget."
    small = {"budget": 12, "window": 3, "beta": 2}

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.beta, bool) or not isinstance(self.beta, int) or self.beta < 1:
            raise UserError(f"PyramidKV: beta={self.beta!r} must be an integer of at least 1")
        if self.rule not in RULES:
            raise UserError(f"PyramidKV: rule={self.rule!r}: allowed are {', '.join(RULES)}")

    def at(self, phase, layer, model):
        return replace(self, layer=layer, num_layers=model.num_layers)

    def program(self):
        return replace(super().program(), layer=0)

    def data(self):
        return super().data() | {"layer": self.layer, "plain": _plain(self)}

    def capacity(self, tokens):
        # a prompt that is cut short of the pyramid can ask for more in a late layer than the longest one does
        lengths = np.append(np.arange(1, min(tokens, 2 * self.budget + 2 * self.window) + 1), tokens)
        return int(np.minimum(_kept(self, lengths, self.budget, self.layer, _plain(self), np), lengths).max())

    def keep(self, ctx, length):
        return _kept(self, length, ctx.data["budget"], ctx.data["layer"], ctx.data["plain"], jnp)


@lru_cache
def _plain(method: PyramidKV) -> int:
    """Return the number of tokens that the layer keeps of a prompt long enough for the whole pyramid."""
    steps = max(1, method.num_layers - 1)
    if method.rule == "kvpress":
        most = 2 * method.budget - method.budget / method.beta
        return round(most - method.layer * ((most - method.budget / method.beta) / steps))
    b = method.budget - method.window
    least = b // method.beta
    return 2 * b - least - method.layer * ((2 * b - 2 * least) // steps) + method.window


def _kept(method: PyramidKV, length, budget, layer, plain, np):
    """Return the number of tokens that a layer keeps of prompts of `length` tokens; `np`: numpy or jax.numpy."""
    steps, window = max(1, method.num_layers - 1), method.window
    if method.rule == "kvpress":
        # times beta, so that b / beta is a whole number
        most, least = 2 * budget * method.beta - budget, budget
        short = most >= (length - window) * method.beta
        first = length - window  # the first layer's share of a short prompt
        last = np.where(short, (2 * budget - first) * method.beta, least)
        falls = (length * method.beta >= np.where(short, first * method.beta, most)) & (last >= window * method.beta)
        falls &= np.where(short, first * method.beta, most) >= last
        cut = _round_half_even(first * steps - 2 * layer * (first - budget), steps, np)
        return np.where(falls, np.where(short, cut, plain), budget)
    b = budget - window
    most, first = 2 * b - b // method.beta, length - window
    cut = first - layer * ((2 * first - 2 * b) // steps) + window
    kept = np.where(most >= first, cut, plain)
    return np.where(length < budget, length, np.where(length < 2 * b, budget, kept))


def _round_half_even(numerator, denominator: int, np):
    """Round the fraction as Python and numpy do, in whole numbers."""
    whole, rest = numerator // denominator, numerator % denominator
    up = (2 * rest > denominator) | ((2 * rest == denominator) & (whole % 2 == 1))
    return whole + np.where(up, 1, 0)
