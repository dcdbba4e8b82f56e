"""Rows of whole models, composed from measured parts, in the shapes of Llama-3-8B; weights and inputs are synthetic.

Prefill of 1,048,576 tokens in chunks of 16,384, each query attending to 10 % of the tiles that it may see:

    seconds = layers * sum over all chunks of (index + choose + list + attend + layer)

where index is the antidiagonal score at stride 16, choose a threshold for each row of blocks, list `from_blocks`, and layer all of a layer
but its attention: norms, products, gate.  Parts that depend on the chunk are measured at SAMPLED chunks and read off straight lines between
them.  RoPE, the embedding, and the head for the last token are left out.

A decode step over 4,194,304 tokens, half of the KV heads full and in int4, half streaming (64 sinks, 256 recent) in bfloat16; scales of K
by token (73.0 GB in total), as those by channel would take 75.2 GB:

    milliseconds = layers * (full heads + streaming heads + layer) + head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.bench import decode
from lcx.bench.cases import Case
from lcx.bench.rows import Row, abstract_list
from pallas_kernels.attend import attend
from pallas_kernels.lists import ROWS, SIZE, from_blocks
from pallas_kernels.mask import Mask
from pallas_kernels.payloads import PAGE, Payload, page_bytes
from pallas_kernels.score_blocks import score_antidiagonal

LAYERS, H, K, D, E, F, V = 32, 32, 8, 128, 4_096, 14_336, 128_256
PREFILL, CHUNK, DENSITY, STRIDE = 1_048_576, 16_384, 0.1, 16
SAMPLED = (0, 31, 63)  # of 64 chunks
BITS = 30  # of a float32 above 0 that choose the threshold: all but the last
SPARE = 8  # places of a list beyond its density, for scores that are alike
CONTEXT, SINK, RECENT = 4_194_304, 64, 256
FULL_HEADS = K // 2
PREFILL_S, STEP_MS, KV_BYTES = 100.0, 29.0, 75e9  # goals, at most
COUNTED = f"model decode {CONTEXT:,}: bytes of KV"
PREFILL_PARTS = ("index", "choose", "list", "attend")
FULL = Case("decode", CONTEXT, D, heads=H // K * FULL_HEADS, kv_heads=FULL_HEADS, payload="int4", by="token")
STREAMING = Case("decode", SINK + RECENT, D, heads=H // K * FULL_HEADS, kv_heads=FULL_HEADS)
STREAMING_CALLS = 4  # enough to see one call's time; its pages are few, and come from the L2 cache here

bf16 = jnp.bfloat16
shape = jax.ShapeDtypeStruct


def rows() -> list[Row]:
    """Return the rows of every part."""
    return [
        *(_prefill(part, i) for i in SAMPLED for part in PREFILL_PARTS),
        _row("model prefill: layer", (), layer, lambda: (shape((CHUNK, E), bf16), _weights())),
        _decode("model decode: full heads int4", FULL, decode.calls(FULL)),
        _decode("model decode: streaming heads bf16", STREAMING, STREAMING_CALLS),
        _row("model decode: layer", (), layer, lambda: (shape((1, E), bf16), _weights())),
        _row("model decode: head", (), lambda x, w: x @ w, lambda: (shape((1, E), bf16), shape((E, V), bf16))),
    ]


def _row(name: str, kernels: tuple[str, ...], program: Callable, abstract: Callable[[], tuple]) -> Row:
    return Row(name, kernels, program, abstract, lambda: filled(abstract()))


def _decode(name: str, case: Case, calls: int) -> Row:
    make = lambda: decode.arrays(case, calls)
    return Row(name, ("decode",), decode.program(case), lambda: decode.abstract(case, calls), make, calls)


def filled(shapes: tuple) -> tuple:
    """Return random arrays of these shapes, of floats or bools."""

    def one(key, x):
        if x.dtype == bool:
            return jax.random.bernoulli(key, DENSITY, x.shape)
        return jax.random.normal(key, x.shape, x.dtype)

    leaves, tree = jax.tree.flatten(shapes)

    def make(key):
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(tree, [one(keys[i], x) for i, x in enumerate(leaves)])

    return jax.jit(make)(jax.random.key(0))


# prefill


def choose(scores, offset: int):
    """Return bool like `scores` [b,K,G,Q,N] as heads [b,H,Q,N]: in each row the largest, DENSITY of the tiles that it may see.

    The threshold is found bit by bit, in passes that count; a sort would cost many times as much.
    """
    scores = scores.reshape(scores.shape[0], -1, *scores.shape[-2:])
    row = offset // SIZE + jnp.arange(scores.shape[2])[:, None]
    visible = jnp.arange(scores.shape[3]) <= row
    # floats above 0 are in the order of their bits
    bits = jnp.where(visible, jax.lax.bitcast_convert_type(jnp.maximum(scores, 0), jnp.int32), -1)
    want = jnp.ceil(DENSITY * (row + 1)).astype(jnp.int32)

    def narrow(i, least):
        more = least | (1 << (BITS - i))
        enough = (bits >= more).sum(-1, keepdims=True, dtype=jnp.int32) >= want
        return jnp.where(enough, more, least)

    least = jax.lax.fori_loop(0, BITS, narrow, jnp.zeros((*bits.shape[:-1], 1), jnp.int32))
    return bits >= least


def _width(keys: int) -> int:
    return min(keys // SIZE, int(-(-DENSITY * keys // SIZE)) + SPARE)


def _prefill(part: str, i: int) -> Row:
    """Return the row of a part at a chunk, whose queries see `keys` keys."""
    offset, keys = i * CHUNK, (i + 1) * CHUNK
    tiles = (CHUNK // ROWS, keys // SIZE)
    scale, name = D**-0.5, f"model prefill: {part} chunk {i}"
    q, k, v = (shape(s, bf16) for s in ((1, K, H // K, CHUNK, D), (1, K, D, keys), (1, K, keys, D)))
    scores = shape((1, K, H // K, *tiles), jnp.float32)

    def index(q, k):
        return score_antidiagonal(q, k, stride=STRIDE, scale=scale, q_offset=offset)

    def listed(blocks):
        return from_blocks(blocks, Mask(), CHUNK, keys, q_offset=offset, width=_width(keys))

    def sparse(q, k, v, blocks):
        return attend(q, k, v, scale=scale, blocks=blocks, q_offset=offset, out_dtype=bf16)

    def make():
        # from random scores, so that a row has as many tiles as a real one
        return *filled((q, k, v)), jax.jit(lambda s: listed(choose(s, offset)))(*filled((scores,)))

    if part == "index":
        return _row(name, ("antidiagonal",), index, lambda: (q, k))
    if part == "choose":
        return _row(name, (), lambda scores: choose(scores, offset), lambda: (scores,))
    if part == "list":
        return _row(name, (), listed, lambda: (shape((1, H, *tiles), bool),))
    return Row(name, ("forward",), sparse, lambda: (q, k, v, abstract_list((1, H, tiles[0], _width(keys)))), make)


def _weights() -> dict[str, Any]:
    sizes = {"qkv": (E, (H + 2 * K) * D), "o": (H * D, E), "up": (E, 2 * F), "down": (F, E)}
    return {name: shape(size, bf16) for name, size in sizes.items()}


def layer(x, weights):
    """Compute a layer without its attention, in whose place the queries stand: all products, norms without gains, gate."""

    def norm(x):
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-5)).astype(x.dtype)

    qkv = norm(x) @ weights["qkv"]
    x = x + qkv[:, : H * D] @ weights["o"]
    gate, up = jnp.split(norm(x) @ weights["up"], 2, -1)
    # keys and values are a result, as a cache would take them
    return x + (jax.nn.silu(gate) * up) @ weights["down"], qkv[:, H * D :]


def prefill_s(ms: dict[str, float]) -> float | None:
    """Return the seconds by the formula of the module, from the parts' milliseconds by name; None where one is missing."""
    chunks = np.arange(PREFILL // CHUNK)
    names = {part: [f"model prefill: {part} chunk {i}" for i in SAMPLED] for part in PREFILL_PARTS}
    if not {"model prefill: layer", *sum(names.values(), [])} <= set(ms):
        return None
    lines = sum(np.interp(chunks, SAMPLED, [ms[n] for n in labels]).sum() for labels in names.values())
    return float(LAYERS * (lines + len(chunks) * ms["model prefill: layer"]) / 1e3)


# decode


def kv_bytes() -> int:
    """Return the cache bytes of the decode row, in whole pages, all layers; weights are not included."""
    full = CONTEXT // PAGE * page_bytes(Payload(FULL.payload, FULL.by), D)
    streaming = -(-(SINK + RECENT) // PAGE) * page_bytes(Payload("bf16"), D)
    return LAYERS * (FULL_HEADS * full + (K - FULL_HEADS) * streaming)


def step_ms(ms: dict[str, float]) -> float | None:
    """Return the milliseconds of a token by the formula of the module; None where a part is missing."""
    parts = [f"model decode: {n}" for n in ("full heads int4", "streaming heads bf16", "layer", "head")]
    if not set(parts) <= set(ms):
        return None
    return LAYERS * sum(ms[n] for n in parts[:3]) + ms[parts[3]]


def counted() -> dict[str, Any]:
    """Return the figures that need no clock."""
    return {"kv_bytes": kv_bytes(), "kv_goal": KV_BYTES, "met": kv_bytes() <= KV_BYTES}


def composed(ms: dict[str, float]) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, row) for each row that can be composed from the parts' milliseconds by name."""
    parts = {name: time for name, time in ms.items() if name.startswith("model ")}
    totals = (
        (f"model prefill {PREFILL:,} at {DENSITY:.0%}", "prefill", "seconds", prefill_s(ms), PREFILL_S),
        (f"model decode {CONTEXT:,} int4, half of the heads streaming", "decode", "ms_a_token", step_ms(ms), STEP_MS),
    )
    return [
        (
            name,
            {unit: value, "goal": goal, "met": value <= goal, "composed": "from measured parts, see lcx/bench/model.py"}
            | {"parts": {n: t for n, t in parts.items() if n.startswith(f"model {kind}")}},
        )
        for name, kind, unit, value, goal in totals
        if value is not None
    ]  # fmt: skip
