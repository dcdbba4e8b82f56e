"""Sizes of a recipe's caches: capacities per layer, empty arrays, their bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lcx.axes import Aux, Pattern
from lcx.cache import LayerCache, Size, Slots, Store
from lcx.model_config import ModelConfig
from lcx.ops.attention import EMPTY
from lcx.segments import Chain, num_rows


@dataclass(frozen=True)
class Shape:
    """Settings that the arrays of a session depend on, beside its recipe.

    Attributes:
      model: its sizes.
      prompt: tokens of the longest prompt.
      new_tokens: tokens that there is room for after it.
      batch: texts side by side.
      dtype: of exact values.
    """

    model: ModelConfig
    prompt: int
    new_tokens: int = 0
    batch: int = 1
    dtype: Any = jnp.float32


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def kept_width(chain: Chain, shape: Shape, rounding: int) -> int:
    """Return the upper bound on the prompt tokens that a chain keeps, per KV head."""
    compress = chain[0].compress
    return shape.prompt if compress is None else min(round_up(compress.capacity(shape.prompt), rounding), shape.prompt)


def capacities(chain: Chain, now: Chain, phase: str, shape: Shape, rounding: int) -> dict[str, int]:
    """Return the slots per KV head of the segments of one chain in one layer.

    Args:
      chain: as the recipe has it in this layer.
      now: as it is in this phase: while the prompt is read, a chain that compresses is one segment that holds all of it.
      phase: "prefill" or another.
      shape: prompt and new tokens.
      rounding: slots are a multiple of it where a part keeps fewer tokens than there are, so that layers of near budgets share a program.
    """
    sizes = {}
    compresses = chain[0].compress is not None
    tokens = kept_width(now, shape, rounding)
    # a chain that compresses has caches of its own in both phases; every other cache lives through both
    tokens += 0 if phase == "prefill" and compresses else shape.new_tokens
    for s in now:
        slots, whole = s.policy.capacity(tokens, s.codec.page), round_up(tokens, s.codec.page)
        sizes[s.name] = slots if slots >= whole else min(round_up(slots, math.lcm(rounding, s.codec.page)), whole)
        tokens = s.policy.handed(tokens)
    return sizes


def empty_chain(chain: Chain, pattern: Pattern, sizes: Mapping[str, int], rows: int, shape: Shape) -> dict[str, Slots]:
    """Return the segments of one chain before their first token."""
    compress = chain[0].compress
    one_set = compress is None or compress.shared
    segments = {}
    for s in chain:
        size = Size(rows, shape.model.head_dim, shape.dtype)
        pos_rows = min(1, rows) if s.policy.shared and one_set else rows
        slots = Store(s.codec, size).empty(shape.batch, pos_rows, sizes[s.name], s.policy.state)
        for name, (after, kind) in pattern.layout(sizes[s.name], size).items():
            slots.state[name] = jnp.zeros((shape.batch, rows, *after), kind)
        segments[s.name] = slots
    return segments


def empty_layer(
    chains: Sequence[Chain], pattern: Pattern, sizes: Mapping[str, int], layer: int, aux: Aux | None, shape: Shape
) -> LayerCache:
    """Return one layer's cache before its first token, without a probe."""
    segments: dict[str, Slots] = {}
    for chain in chains:
        segments |= empty_chain(chain, pattern, sizes, num_rows(shape.model, chain[0].heads, aux, layer), shape)
    return LayerCache(segments)


def empty_probe(width: int, raw: bool, shape: Shape) -> dict[str, jax.Array]:
    """Return the last `width` queries of a prompt that has not begun; before RoPE as well where `raw`."""
    model = shape.model
    q = jnp.zeros((shape.batch, model.num_kv_heads, model.group, width, model.head_dim), shape.dtype)
    probe = {"q": q, "pos": jnp.full((shape.batch, width), EMPTY, jnp.int32)}
    return probe | ({"q_raw": jnp.zeros_like(q)} if raw else {})
