"""Checks of what is held: bytes, budgets, and that a long cache is written in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.axes import Codec
from lcx.cache import Leaf, Size, device_bytes, shape_bytes
from lcx.conformance.measure import Failed, Measure, Skipped
from lcx.conformance.small_model import TINY
from lcx.conformance.subject import Subject, size_of
from lcx.programs import block_program
from lcx.recipe import Recipe, Segment

LONG = 131_072  # slots of the programs that are compiled and not run


def bytes_of_arrays(s: Subject, m: Measure) -> None:
    """The bytes that the recipe says are those of the arrays, and a codec writes the entries that its leaves declare."""
    # traced alone, so that a mistake is named before anything is compiled
    _check_entries(s)
    session = s.ragged("small")[2]
    m.same(session.cache_bytes, size_of(session, "decode"), "bytes of the cache beside the recipe's")
    for phase in ("prefill", "decode"):
        for dtype in ("float32", "bfloat16"):
            fresh = s.session(session.recipe, dtype=dtype)
            empty = [fresh.empty(phase, i) for i in range(TINY.num_layers)]
            m.same(device_bytes(empty), size_of(fresh, phase, dtype), f"bytes of a {dtype} cache in {phase}")
    after_prompt = s.session(session.recipe)
    after_prompt.prefill(s.texts[:, : s.prompt], s.lengths)
    m.same(after_prompt.cache_bytes, size_of(session, "decode"), "bytes of the cache after the prompt")
    m.holds(
        after_prompt.cache_bytes <= after_prompt.peak_cache_bytes, "the peak is below what is held after the prompt"
    )


def _check_entries(s: Subject) -> None:
    """Trace every program once with codecs that compare what they write with their leaves."""
    exact = Segment().codec

    def watched(segment: Segment) -> Segment:
        return segment if segment.codec == exact else replace(segment, codec=Watched(segment.codec))

    recipe = s.at("small")
    chains = tuple(tuple(map(watched, chain)) for chain in recipe.chains)
    if chains == recipe.chains:
        return
    session = s.session(replace(recipe, segments=chains))
    for call in session.calls(s.prompt, [1]):
        # a program that is traced already would not be traced again
        program: Any = call.program
        jax.eval_shape(partial(program.__wrapped__, **call.static), *call.args)


@dataclass(frozen=True)
class Watched(Codec):
    """Codec that compares what another one writes with the leaves that it declares, at tracing."""

    codec: Codec

    page = property(lambda self: self.codec.page)  # pyrefly: ignore
    raw = property(lambda self: self.codec.raw)  # pyrefly: ignore
    plain = property(lambda self: self.codec.plain)  # pyrefly: ignore
    needs = property(lambda self: self.codec.needs)  # pyrefly: ignore
    lacks = property(lambda self: self.codec.lacks)  # pyrefly: ignore

    def at(self, phase, layer, model):
        return replace(self, codec=self.codec.at(phase, layer, model))

    def arrays(self, model):
        return self.codec.arrays(model)

    def program(self):
        return replace(self, codec=self.codec.program())

    def data(self):
        return self.codec.data()

    def check(self, size):
        self.codec.check(size)

    def pages(self, payload):
        return self.codec.pages(payload)

    def decode(self, ctx, payload, pick):
        return self.codec.decode(ctx, payload, pick)

    def leaves(self, size):
        return self.codec.leaves(size)

    def encode(self, ctx, tokens, pick):
        payload = self.codec.encode(ctx, tokens, pick)
        size = Size(tokens.k.shape[1], tokens.k.shape[-1], tokens.k.dtype)
        compare_entries(type(self.codec).__name__, self.leaves(size), payload, tokens.pos.shape[-1])
        return payload


def compare_entries(name: str, declared: Mapping[str, Leaf], payload: Mapping[str, Any], tokens: int) -> None:
    """Raise Failed unless encoded entries are those that the leaves declare.

    Args:
      name: of the codec.
      declared: leaf by name.
      payload: what `encode` returned for `tokens` tokens.
      tokens: number of them.
    """
    surplus = sorted(set(payload) - set(declared))
    if surplus:
        raise Failed(f"{name}.encode returns {', '.join(surplus)}, which its leaves do not declare: nothing stores it")
    for leaf_name, leaf in declared.items():
        entry = payload.get(leaf_name)
        if entry is None and leaf.per is None:
            continue
        if entry is None:
            raise Failed(f"{name}.encode returns no {leaf_name}, which its leaves declare")
        entries = () if leaf.per is None else (tokens // leaf.per,)
        shape, want = tuple(entry.shape[2:]), (*leaf.before, *entries, *leaf.after)
        kind, kind_wanted = jnp.dtype(entry.dtype), jnp.dtype(leaf.dtype)
        if shape != want:
            raise Failed(
                f"{name}.encode returns {leaf_name} [B,R,{shape}], its leaf declares [B,R,{want}] for {tokens} tokens"
            )
        floats = jnp.issubdtype(kind, jnp.floating) and jnp.issubdtype(kind_wanted, jnp.floating)
        # an exact value may be rounded to the leaf's float type on the way in; a number cut to an integer is a mistake
        if kind != kind_wanted and not floats:
            raise Failed(f"{name}.encode returns {leaf_name} as {kind}, its leaf declares {kind_wanted}")


def budgets(s: Subject, m: Measure, settings: tuple[str, ...] = ("small", "limit")) -> None:
    """After every step each head holds exactly as many tokens as its budget says, or every token, each once."""
    for setting in settings:
        _, steps, session = s.ragged(setting)
        for since, layers in enumerate(steps):
            for layer, chains in enumerate(layers):
                links_of = session.recipe.at("decode", layer, TINY).chains
                for links, rows in zip(links_of, chains, strict=True):
                    for text, length in zip(rows, s.lengths, strict=True):
                        for pos in text:
                            where = f"layer {layer}, a text of {length} + {since} tokens, {setting} sizes"
                            _check_held(m, links, pos, length, since, where)


def _check_held(m: Measure, links, pos: np.ndarray, length: int, since: int, where: str) -> None:
    """Check the positions that one KV head holds of a prompt of `length` tokens and `since` more."""
    first = links[0]
    m.holds(len(np.unique(pos)) == len(pos), f"a token is held twice: {where}")
    m.holds(len(pos) > 0 and pos.max() < length + since, f"no token, or one that is not there, is held: {where}")
    if first.compress is not None:
        kept = int(np.asarray(first.compress.keep(_Data(first.compress), np.array([length]))).reshape(-1)[0])
        if "every token" in first.policy.lacks:
            most = first.policy.capacity(min(kept, length) + since, first.codec.page)
            m.same(len(pos), min(min(kept, length) + since, most), f"tokens held, {where}")
            return
        m.same(len(pos), min(kept, length) + since, f"tokens held, {where}")
        newest = pos[len(pos) - since :].tolist()
        m.same(newest, list(range(length, length + since)), f"tokens after the prompt, {where}")
    elif "every token" in first.policy.lacks:
        # slots are rounded up in the checks; a run has no more than the capacity
        most = first.policy.capacity(length + since, first.codec.page)
        m.holds(len(pos) <= most, f"{len(pos)} tokens are held, the capacity is {most}: {where}")
        budget = getattr(first.policy, "budget", None)
        if budget is not None:
            m.same(len(pos), min(budget, length + since), f"tokens held, {where}")
    else:
        m.same(pos.tolist(), list(range(length + since)), f"tokens held, {where}")


class _Data:
    """Context of a part outside of a step: its settings as numbers."""

    def __init__(self, part):
        self.data = part.data()


def in_place(s: Subject, m: Measure) -> None:
    """A long cache is written in place: a copy would show in the scratch memory of the compiled step, which reads it tile by tile."""
    recipe: Recipe = replace(s.recipe, rounding=1)
    if recipe.has_budget and recipe.pattern.with_budget(LONG) is None:
        recipe = recipe.with_budget(LONG)
    session = s.session(recipe, prompt=LONG, batch=1)
    layer = TINY.num_layers - 1
    cache = jax.eval_shape(lambda: session.empty("decode", layer))
    args, static = session.block_call("decode", layer, *session.step_shape(1), cache)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        report: Any = block_program.lower(*args, **static).compile().memory_analysis()
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    held = shape_bytes(cache)
    if held < 2**20:
        raise Skipped(f"its cache of {LONG:,} tokens has {held:,} bytes; a copy would not show")
    m.holds(
        report.alias_size_in_bytes >= held,
        f"{held - report.alias_size_in_bytes:,} of {held:,} bytes are not written in place",
    )
    m.holds(
        report.temp_size_in_bytes < held / 3,
        f"a step takes {report.temp_size_in_bytes:,} bytes beside a cache of {held:,}",
    )
