"""The rows of the benchmark: shapes, the kernel's work on them, its least cost, and a float32 reference at small sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.backends.choose import attend as attend_by
from lcx.ops.attention import Partial, Source
from lcx.ops.attention import attend as reference_attend
from lcx.ops.masks import Near
from pallas_kernels.attend import attend
from pallas_kernels.attend_bwd import attend_with_gradient
from pallas_kernels.lists import ROWS, SIZE, BlockList, from_blocks
from pallas_kernels.mask import Mask
from pallas_kernels.payloads import PAGE, Payload, page_bytes
from pallas_kernels.tables import ATTEND_GRAD

# relative to the largest value: bfloat16 P, and dS in a gradient
CHECKED = {"backward": 1.5e-2} | dict.fromkeys(
    ("forward", "decode_slots", "decode", "antidiagonal", "probe", "minmax"), 1e-2
)
SCORES = ("antidiagonal", "probe", "minmax")
EXTREMES = 16  # tokens of a page of `minmax`


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    Attributes:
      kernel: a name of CHECKED: "decode" reads pages, "decode_slots" plain arrays through `lcx.backends.choose`.
      tokens: keys; of prefill queries too.
      head_dim, heads, kv_heads, batch: shapes.
      density: share of the causal tiles that a list holds; None: no list.
      window, sink: of the mask, None and 0: only causal.
      queries: T; None: 1 in decode and minmax, 64 in a probe, all tokens else.  They are the last ones.
      payload, by: of the pages of "decode", see `payloads.Payload`.
      stride: of "antidiagonal".
    """

    kernel: str
    tokens: int
    head_dim: int = 128
    heads: int = 32
    kv_heads: int = 8
    batch: int = 1
    density: float | None = None
    window: int | None = None
    sink: int = 0
    queries: int | None = None
    payload: str = "bf16"
    by: str = "channel"
    stride: int = 16

    @property
    def name(self) -> str:
        shape = f"{self.tokens:,} D {self.head_dim} {self.heads}/{self.kv_heads} x{self.batch}"
        if self.kernel == "decode":
            by = " by token" if self.by == "token" else ""
            return f"decode {self.payload}{by} {shape}" + (f" T {self.T}" if self.T > 1 else "")
        if self.kernel in SCORES:
            detail = {"antidiagonal": f" stride {self.stride}", "minmax": f" page {EXTREMES}"}.get(self.kernel, "")
            return f"score {self.kernel}{detail} {shape} last {self.T:,} queries"
        mask = "causal" if self.window is None else f"window {self.window} + {self.sink}"
        what = mask if self.density is None else f"{mask}, list {self.density:.0%}"
        return f"{self.kernel} {shape} {what}"

    @property
    def T(self) -> int:
        return self.queries or {"decode": 1, "decode_slots": 1, "minmax": 1, "probe": 64}.get(self.kernel, self.tokens)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of q, k and v in the layout of the kernels."""
        B, K, S, D = self.batch, self.kv_heads, self.tokens, self.head_dim
        return (B, K, self.heads // K, self.T, D), (B, K, D, S), (B, K, S, D)

    @property
    def mask(self) -> Mask:
        return Mask(window=self.window, sink=self.sink)

    @property
    def flops(self) -> float:
        """Operations that the mask and the list need: 4 D a pair of query and visible key, 2.5 times as many more for a gradient.

        Scores: of their products; a probe makes them twice, page extremes have twice the channels.
        """
        T, S = self.T, self.tokens
        if self.kernel == "minmax":
            return 4 * self.batch * self.heads * self.head_dim * T * (S // EXTREMES)
        if self.density is not None:
            # tiles on the diagonal are half visible
            pairs = int(self.chosen().sum()) / self.heads * ROWS * SIZE - -(-T // ROWS) * ROWS * (ROWS - 1) / 2
        elif self.window is not None:
            pairs = sum(min(S - T + t + 1, self.window + self.sink) for t in range(T))
        else:
            pairs = T * S - T * (T - 1) / 2
        # a row of gradients has its forward pass in it
        times = {"backward": 3.5, "antidiagonal": 0.5 / self.stride}.get(self.kernel, 1)
        return 4 * self.batch * self.heads * self.head_dim * pairs * times

    @property
    def bytes(self) -> float:
        """Bytes of keys and values, read once: whole pages with their scales, or 16 bits each."""
        if self.kernel == "decode":
            pages = self.batch * self.kv_heads * -(-self.tokens // PAGE)
            return pages * page_bytes(Payload(self.payload, self.by), self.head_dim)
        return 2 * 2 * self.batch * self.kv_heads * self.tokens * self.head_dim

    def arrays(self, seed: int = 0, dtype=jnp.bfloat16):
        keys = jax.random.split(jax.random.key(seed), 3)
        return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, self.shapes, strict=True))

    def chosen(self, seed: int = 0) -> np.ndarray:
        """Return bool [1,H,Q,N]: random causal tiles of the density; the diagonal and the first are always among them."""
        Q, N = -(-self.T // ROWS), -(-self.tokens // SIZE)
        rng = np.random.default_rng(seed)
        first = N - Q
        tiles = rng.random((1, self.heads, Q, N)) < (self.density or 0)
        rows = np.arange(Q)
        tiles[:, :, rows, rows + first] = True
        tiles[..., 0] = True
        return tiles & (np.arange(N) <= (rows + first)[:, None])

    def blocks(self) -> BlockList | None:
        """Return the list of tiles, made in XLA outside of the timed program."""
        if self.density is None:
            return None
        offset = self.tokens - self.T
        chosen = jnp.asarray(self.chosen())
        width = max(1, int(chosen.sum(-1).max()))
        return from_blocks(chosen, self.mask, self.T, self.tokens, q_offset=offset, width=width)


def ours(case: Case, blocks: BlockList | None = None, tile=None) -> Callable:
    """Return the kernel as a function of (q, k, v); `blocks` are arguments of the program, not constants.  `tile`: of other sizes."""
    scale, offset = case.head_dim**-0.5, case.tokens - case.T
    if case.kernel == "decode_slots":
        near = None if case.window is None else Near(case.window, case.sink)

        def decode(q, k, v):
            source = Source(
                jnp.arange(case.tokens, dtype=jnp.int32)[None, None].repeat(case.batch, 0), _tiles(k, v), plain=True
            )
            pos = jnp.arange(offset, case.tokens, dtype=jnp.int32)[None].repeat(case.batch, 0)
            return attend_by(q, [source], pos, scale=scale, mask=near, implementation="pallas")

        return decode
    settings: dict[str, Any] = {"scale": scale, "mask": case.mask, "q_offset": offset, "blocks": blocks, "tile": tile}
    if case.kernel == "forward":
        return partial(attend, out_dtype=jnp.bfloat16, **settings)

    def loss(q, k, v):
        return attend_with_gradient(q, k, v, out_dtype=jnp.bfloat16, **settings).out.astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))


def _tiles(k, v):
    return lambda start, size: (
        jax.lax.dynamic_slice_in_dim(k, start, size, 3),
        jax.lax.dynamic_slice_in_dim(v, start, size, 2),
    )


def reference(case: Case) -> Callable:
    """Return the float32 reference by `lcx.ops.attention`, or through a dense mask where there is a list."""
    scale, offset = case.head_dim**-0.5, case.tokens - case.T

    def forward(q, k, v):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        if case.density is None:
            mask = None if case.window is None else Near(case.window, case.sink)
            pos = jnp.arange(case.tokens, dtype=jnp.int32)[None].repeat(case.batch, 0)
            source = Source(pos[:, None], _tiles(k, v), held=False, plain=True)
            return reference_attend(q, source, pos[:, offset:], scale=scale, mask=mask)
        B, K, G, T, D = q.shape
        logits = jnp.einsum("bkgtd,bkds->bkgts", q, k) * scale
        tiles = jnp.asarray(case.chosen()).reshape(1, K, G, *case.chosen().shape[2:])
        seen = jnp.repeat(jnp.repeat(tiles, ROWS, 3), SIZE, 4)[..., :T, : case.tokens]
        seen &= jnp.arange(case.tokens) <= jnp.arange(offset, case.tokens)[:, None]
        logits = jnp.where(seen, logits, -jnp.inf)
        return Partial(jnp.einsum("bkgts,bksd->bkgtd", jax.nn.softmax(logits, -1), v), jax.nn.logsumexp(logits, -1))

    if case.kernel != "backward":
        return forward
    return lambda *qkv: jax.grad(lambda q, k, v: forward(q, k, v).out.sum(), (0, 1, 2))(
        *(x.astype(jnp.float32) for x in qkv)
    )


def error(got, want) -> float:
    """Return the largest difference of any result, over the largest value of that result; lse is held to a tenth of this."""
    if isinstance(want, Partial):
        got, want = (got.out, 10 * got.lse), (want.out, 10 * want.lse)
    largest = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        both = np.isneginf(a) & np.isneginf(b)
        a, b = np.where(both, 0, a), np.where(both, 0, b)
        if not np.isfinite(a).all():
            return float("inf")
        largest = max(largest, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)))
    return largest


SMALL = {"heads": 4, "kv_heads": 2}
WIDE = {"heads": 8, "kv_heads": 1}  # GQA 8
# checks that run before anything is timed; on a CPU they are interpreted, so they have few tiles
CHECKS = (
    Case("forward", 256, **SMALL),
    *(Case("forward", 256, D, heads=2, kv_heads=1) for D in (64, 256)),
    Case("forward", 300, window=90, sink=4, heads=2, kv_heads=1),
    Case("forward", 512, density=0.1, heads=2, kv_heads=1, queries=256),
    *(Case("backward", 128, D, heads=2, kv_heads=1) for D in ATTEND_GRAD),
    Case("decode_slots", 700, window=200, sink=4, **SMALL),
    *(Case("decode", 200, queries=4, payload=p, **WIDE) for p in ("bf16", "fp8", "int4", "int2")),
    Case("decode", 200, payload="int4", by="token", **WIDE),
    *(Case("antidiagonal", 640, 64, heads=2, kv_heads=1, queries=256, stride=s) for s in (16, 8)),
    Case("probe", 300, heads=2, kv_heads=1),
    Case("minmax", 640, 64, heads=2, kv_heads=1, queries=2),
)


def checks(on_gpu: bool) -> list[Case]:
    """Return the checks; on a GPU they have 2,048 tokens."""
    return [replace(c, tokens=c.tokens + 2_048 - 256) if on_gpu else c for c in CHECKS]
