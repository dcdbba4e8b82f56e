"""Checks of equality with dense attention, where a method says that it is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from lcx.cache import device_bytes
from lcx.conformance.measure import Failed, Measure, Skipped
from lcx.conformance.small_model import ATOL, TINY, layers
from lcx.conformance.subject import Subject, dense, play, size_of

HEADS = ((1, 1), (3, 3), (3, 1), (8, 8), (8, 1))
SHORT_PROMPTS = ((1, 2), (3, 4), (5, 6), (7, 8), (9, 1))


def _needs_limit(s: Subject) -> None:
    """Raise Skipped where a part is never exact: at its own `at_limit` it still says so."""
    for _, axis, part in s.at("limit").parts():
        if part.exact.lower().startswith("never"):
            raise Skipped(f"{axis} {type(part).__name__} says that it is never exact: {part.exact}")


def _unstated(s: Subject) -> str:
    """Name the parts that say nothing of their limit: the reader of a failure may have to add it."""
    unstated = [type(part).__name__ for _, _, part in s.at("limit").parts() if not part.exact]
    if not unstated:
        return ""
    return f"; {', '.join(unstated)} states no limit: override at_limit(tokens), or set exact = 'Never.'"


def limit(s: Subject, m: Measure) -> None:
    """At its exact limit it equals dense attention: in chunks where it allows them, in a batch with padding, and in decode."""
    _needs_limit(s)
    try:
        m.near(s.ragged("limit")[0], s.dense(), ATOL, "logits and those of dense attention")
    except Failed as failure:
        raise Failed(f"{failure}{_unstated(s)}") from None


def one_by_one(s: Subject, m: Measure) -> None:
    """At its exact limit 24 tokens, read one at a time, equal dense attention over all of them."""
    _needs_limit(s)
    session = s.session(s.at("limit"))
    stream = [session.prefill(s.texts[:, : s.width("limit")], [1, 1], rows="all")[:, :1]]
    stream += [session.step(s.texts[:, i : i + 1], rows="all") for i in range(1, 24)]
    m.near(np.concatenate(stream, 1), s.dense_stream()[:, :24], ATOL, "residual streams [text, token, channel]")


def short_prompts(s: Subject, m: Measure) -> None:
    """Prompts of 1 to 9 tokens, shorter than windows, groups and pages, are finite, and dense at the exact limit."""
    exact = not any(part.exact.lower().startswith("never") for _, _, part in s.at("limit").parts())
    first = jnp.asarray(s.dense_stream()[:, :10].reshape(-1, TINY.d_model))
    want = np.asarray(layers(TINY).logits(first)).reshape(2, 10, -1)
    for setting in ("limit", "small") if exact else ("small",):
        for lengths in SHORT_PROMPTS:
            session = s.session(s.at(setting))
            logits = session.prefill(s.texts[:, : s.width(setting)], lengths)
            after = session.step(np.stack([s.texts[b, n : n + 1] for b, n in enumerate(lengths)]))
            m.finite(logits, f"logits after {lengths} tokens")
            m.finite(after, f"logits of the step after {lengths} tokens")
            for b, n in enumerate(lengths if setting == "limit" else ()):
                m.near(logits[b], want[b, n - 1], ATOL, f"logits after {n} tokens")
                m.near(after[b], want[b, n], ATOL, f"logits of the step after {n} tokens")


def chunk_sizes(s: Subject, m: Measure, sizes: Sequence[int] | None = None) -> None:
    """At its exact limit chunks of any size (1, 7, one more than the usual) give dense attention's logits."""
    _needs_limit(s)
    recipe = s.at("limit")
    if recipe.one_shot:
        raise Skipped("its prompt is read in one step")
    for size in sizes or (1, 7, s.chunk + 1):
        logits, _ = play(s.session(recipe, chunk=size), s.texts, s.lengths)
        m.near(logits, s.dense(), ATOL, f"logits in chunks of {size} and those of dense attention")


def long_steps(s: Subject, m: Measure, sizes: Sequence[int] = (2, 5, 9)) -> None:
    """Steps of many tokens after the prompt are finite, and dense at the exact limit."""
    exact = not any(part.exact.lower().startswith("never") for _, _, part in s.at("limit").parts())
    for size in sizes:
        for setting in ("limit", "small") if exact else ("small",):
            session = s.session(s.at(setting), new_tokens=size)
            session.prefill(s.texts[:, : s.width(setting)], [11, 11])
            stream = session.step(s.texts[:, 11 : 11 + size], rows="all")
            m.finite(stream, f"the residual stream of a step of {size} tokens")
            if setting == "limit":
                m.near(
                    stream, s.dense_stream()[:, 11 : 11 + size], ATOL, f"residual streams of a step of {size} tokens"
                )


def bfloat16(s: Subject, m: Measure) -> None:
    """At its exact limit in bfloat16 it is near dense attention in float32, in the bytes that the recipe says."""
    _needs_limit(s)
    logits, _, session = s.ragged("limit", "bfloat16")
    error = np.abs(logits - s.dense())
    # bfloat16 through 3 layers: 8 bits of each activation; logits have a spread of 7
    m.near(logits, s.dense(), 0.8, "logits and those of float32")
    m.holds(bool(error.mean() < 0.15), f"logits differ by {error.mean():.3g} on average; allowed are 0.15")
    m.same(device_bytes(session.cache), size_of(session, "decode", "bfloat16"), "bytes of the arrays")


def heads(s: Subject, m: Measure, sizes: Sequence[tuple[int, int]] = HEADS) -> None:
    """At its exact limit it equals dense attention for any number of query and KV heads."""
    _needs_limit(s)
    for query, kv in sizes:
        model = replace(TINY, name="heads", num_heads=query, num_kv_heads=kv)
        logits, _ = play(s.session(s.at("limit"), model=model), s.texts, s.lengths)
        m.near(logits, dense(s.prompt, s.short, model), ATOL, f"logits with {query} query and {kv} KV heads")
