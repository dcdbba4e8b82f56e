"""Attention mass of blocks, estimated from sums over antidiagonals, over several sources: what XAttention ranks blocks by."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from lcx.ops.attention import BIG, EMPTY, Source, used_length

Q_GROUPS, KV_GROUPS = 64, 128  # groups of queries and of keys whose logits are held at a time


def antidiagonal_mass(
    q: jax.Array, sources: Sequence[Source], q_pos: jax.Array, *, stride: int, block: int, scale: float
) -> list[jax.Array]:
    """Return the estimated attention mass between blocks of queries and blocks of keys.

    `stride` consecutive tokens are a group; the logit of two groups is the sum of q . k over the antidiagonal of their square, by
    scale / stride; causal softmax over the groups of all sources; sums by block.  A row of blocks adds up to the number of its groups
    that hold a token.  Missing tokens are zero vectors; a group with at least one token counts whole.  `ops.block_scores` has the same
    for one source as the kernel computes it.

    Args:
      q: [B,R,G,T,D]; the first query of every row stands at the beginning of a block, and the others follow without a gap.
      sources: keys in the order of the text, [B,R,D,S] each: slot s of a source holds the s-th token from a beginning of a block on.
      q_pos: int32 [B,T], EMPTY for padding.
      stride: tokens of a group, a divisor of `block`.
      block: tokens of a block.
      scale: of the model's logits.

    Returns:
      For each source float32 [B,R,G,Q,N], N blocks of its slots.
    """
    B, R, G, T, D = q.shape
    per = block // stride
    real = q_pos != EMPTY
    # the first position of a row without tokens does not matter: nothing of it counts
    first = jnp.where(real[:, 0], q_pos[:, 0], 0) // stride
    Q = -(-T // block)
    a = jnp.where(real[:, None, None, :, None], q, 0)
    a = jnp.pad(a, ((0, 0),) * 3 + ((0, Q * block - T), (0, 0)))
    # reversed within a group, so that one product sums over the antidiagonal
    a = rearrange(a, "b r g (t s) d -> b r g t s d", s=stride)[..., ::-1, :]
    a = rearrange(a, "b r g t s d -> b r g t (s d)")
    counts = jnp.pad(real, ((0, 0), (0, Q * block - T))).reshape(B, -1, stride).any(-1)
    n_q = per * max(1, min(Q_GROUPS // per, Q))
    a = jnp.pad(a, ((0, 0),) * 3 + ((0, -a.shape[3] % n_q), (0, 0)))
    own = first[:, None] + jnp.arange(a.shape[3])

    def rows(i):
        """Per group of queries and block of keys: maximum and sum of exp, for one tile of query groups."""
        at = lax.dynamic_slice_in_dim(a, i * n_q, n_q, 3)
        groups = lax.dynamic_slice_in_dim(own, i * n_q, n_q, 1)
        return [_blocks(at, groups, source, stride, per, scale) for source in sources]

    tiles = lax.map(rows, jnp.arange(a.shape[3] // n_q))
    join = lambda x: jnp.moveaxis(x, 0, 3).reshape(B, R, G, a.shape[3], x.shape[-1])[:, :, :, : Q * per]
    tops, sums = zip(*((join(top), join(total)) for top, total in tiles), strict=True)
    top = jnp.max(jnp.stack([t.max(-1, initial=-BIG) for t in tops]), 0)
    weights = [s * jnp.exp(t - top[..., None]) for t, s in zip(tops, sums, strict=True)]
    total = sum(w.sum(-1) for w in weights)
    share = jnp.where(counts[:, None, None], 1 / jnp.where(total > 0, total, 1.0), 0.0)
    return [rearrange(w * share[..., None], "b r g (q p) n -> b r g q p n", p=per).sum(4) for w in weights]


def _blocks(a, own, source: Source, stride: int, per: int, scale: float):
    """(maximum, sum of exp) float32 [B,R,G,n,N] of a tile of query groups a [B,R,G,n,s * D] with each block of a source."""
    B, R, G, n, _ = a.shape
    S = source.pos.shape[-1]
    block = per * stride
    N = -(-S // block)
    width = block * max(1, min(KV_GROUPS // per, N))
    empty = jnp.full((B, R, G, n, N), -BIG), jnp.zeros((B, R, G, n, N))
    if S == 0:
        return empty
    size = min(width, S)
    # a tile that would pass the end is moved back to begin a block, and its slots behind the end are empty
    starts = [min(j * width, (S - size) // block * block) for j in range(-(-S // width))]
    starts = jnp.asarray(starts, jnp.int32)
    first = jnp.min(jnp.where(source.pos == EMPTY, jnp.iinfo(jnp.int32).max, source.pos), axis=-1)  # [B,R|1]
    first = jnp.where(first == jnp.iinfo(jnp.int32).max, 0, first) // stride

    def body(j, carry):
        top, total = carry
        start = starts[j]
        k, _ = source.tile(start, size)
        held = lax.dynamic_slice_in_dim(source.pos, start, size, 2) != EMPTY
        k = jnp.where(held[:, :, None], k, 0).astype(a.dtype)
        pad = -size % block
        k, held = jnp.pad(k, ((0, 0),) * 3 + ((0, pad),)), jnp.pad(held, ((0, 0), (0, 0), (0, pad)))
        groups = rearrange(k, "b r d (c s) -> b r (s d) c", s=stride)
        logits = jnp.einsum("brgne,brec->brgnc", a, groups, preferred_element_type=jnp.float32) * (scale / stride)
        number = first[..., None] + start // stride + jnp.arange(groups.shape[-1])
        some = held.reshape(*held.shape[:2], -1, stride).any(-1)
        seen = (some[:, :, None] & (number[:, :, None] <= own[:, None, :, None]))[:, :, None]
        logits = jnp.where(seen, logits, -BIG).reshape(B, R, G, n, -1, per)
        high = logits.max(-1)
        new = jnp.where(high == -BIG, 0.0, jnp.exp(logits - high[..., None]).sum(-1))
        put = lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start // block, 4)
        return put(top, high), put(total, new)

    # tiles behind the last key in use, or after the last query, add nothing
    used = used_length(source.pos)
    latest = (jnp.max(own) - jnp.min(first) + 1) * stride
    trips = jnp.minimum(-(-jnp.minimum(used, latest) // width), len(starts))
    return lax.fori_loop(0, jnp.maximum(trips, 0), body, empty)
