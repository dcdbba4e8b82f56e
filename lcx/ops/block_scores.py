"""Scores by which sparse patterns choose blocks, columns and diagonals: plain references of `pallas_kernels.score_*`, same signatures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from lcx.errors import UserError

BLOCK = 128  # queries and keys of a scored block: those of a listed tile
STRIDES = (4, 8, 16)  # the paper's, and those of the kernel
PROBE = 64  # at most: queries of a probe


def score_pooled(
    q: jax.Array, k: jax.Array, *, scale: float, rows: int, size: int, causal: bool = True, q_offset=0
) -> jax.Array:
    """Return the logits of rows of queries (means of blocks, or single queries) with one key for each block of keys.

    Serves FlexPrefill (arXiv:2502.20766, section 3: means by means of 128), MoBA (arXiv:2502.13189: single queries, rows=1, scale=1) and
    learned gates.

    Args:
      q: [B,K,G,Q,D], row r stands for the queries at `q_offset + r * rows` and the `rows - 1` after it.
      k: [B,K,D,N], column n stands for the keys at `n * size` ... `n * size + size - 1`.
      scale: factor on the logits, positive.
      rows, size: in tokens.
      causal: blocks that begin behind a row's last query get -inf.
      q_offset: int32 [B] or one number.

    Returns:
      float32 [B,K,G,Q,N].

    Raises:
      UserError: a shape or number that is not served.
    """
    check_pooled(q, k, scale, rows, size)
    out = jnp.einsum("bkgqd,bkdn->bkgqn", q, k, preferred_element_type=jnp.float32) * scale
    if not causal:
        return out
    first = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (q.shape[0],))
    last = first[:, None] + (jnp.arange(q.shape[3]) + 1) * rows - 1
    seen = jnp.arange(k.shape[3]) * size <= last[..., None]
    return jnp.where(seen[:, None, None], out, -jnp.inf)


def score_minmax(q: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Return upper bounds of q . k over the keys of each page, from the page's element-wise extremes, before any scale.

    Quest, arXiv:2406.10774, section 3.3: the sum over d of max(q * low, q * high).

    Args:
      q: [B,K,G,T,D]; low, high: [B,K,D,N].

    Returns:
      float32 [B,K,G,T,N].

    Raises:
      UserError: shapes that do not fit.
    """
    check_minmax(q, low, high)
    q, low, high = (x.astype(jnp.float32) for x in (q, low, high))
    # the sum over d of max(q * low, q * high) is q+ . high + q- . low
    score = jnp.einsum("bkgtd,bkdn->bkgtn", jnp.maximum(q, 0), high)
    return score + jnp.einsum("bkgtd,bkdn->bkgtn", jnp.minimum(q, 0), low)


def score_antidiagonal(q: jax.Array, k: jax.Array, *, stride: int, scale: float, q_offset=0, kv_len=None) -> jax.Array:
    """Return the estimated attention mass of blocks of 128 queries x 128 keys from sums over antidiagonals.

    XAttention, arXiv:2503.16428, section 2.1: the logit of `stride` successive queries and as many keys is the sum of q . k over the
    antidiagonal of their square, by `scale / stride`; causal softmax over the squares of a row; sums by block.  Here the rows of a block
    are averaged, so that a row of blocks sums to 1.  Exact at stride 1.

    Args:
      q: [B,K,G,T,D]; k: [B,K,D,S], key s at position s.
      stride: divides 128; the paper has 4, 8 and 16.
      scale: of the model's logits, positive.
      q_offset: int32 [B] or one number, a multiple of `stride`: position of the first query.
      kv_len: int32 [B] or one number, keys in use, at most S; None: S.  Those behind it must be finite.

    Returns:
      float32 [B,K,G,Q,N], blocks of 128; a row that sees no key is 0.

    Raises:
      UserError: a shape or number that is not served.
    """
    check_antidiagonal(q, k, stride, scale, q_offset)
    B, K, G, T, _ = q.shape
    S, per_block = k.shape[3], BLOCK // stride
    q = jnp.pad(q, ((0, 0),) * 3 + ((0, -T % stride), (0, 0)))
    k = jnp.pad(k, ((0, 0),) * 3 + ((0, -S % BLOCK),))
    a = rearrange(q, "b k g (r s) d -> b k g r s d", s=stride)
    b = rearrange(k, "b k d (c s) -> b k s d c", s=stride)[:, :, ::-1]
    logits = jnp.einsum("bkgrsd,bksdc->bkgrc", a, b, preferred_element_type=jnp.float32) * (scale / stride)
    first = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,)) // stride
    held = jnp.broadcast_to(jnp.clip(jnp.asarray(S if kv_len is None else kv_len, jnp.int32), 0, S), (B,))
    R, C = logits.shape[3:]
    row, column = first[:, None, None] + jnp.arange(R)[:, None], jnp.arange(C)
    seen = ((column <= row) & (column < -(-held // stride)[:, None, None]))[:, None, None]
    p = jax.nn.softmax(jnp.where(seen, logits, -1e30), -1) * seen
    p = p.reshape(B, K, G, R, C // per_block, per_block).sum(-1)
    Q = -(-R // per_block)
    p = jnp.pad(p, ((0, 0),) * 3 + ((0, Q * per_block - R), (0, 0))).reshape(B, K, G, Q, per_block, -1).sum(4)
    return p / jnp.minimum(R - jnp.arange(Q) * per_block, per_block)[:, None]


def score_probe(
    q: jax.Array,
    k: jax.Array,
    *,
    scale: float,
    q_offset,
    kv_len=None,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the attention mass of a text's last queries by key and by distance.

    MInference, arXiv:2407.02490, section 3.2 and the authors' code: the last 64 queries, causal softmax in float32, summed over queries.

    Args:
      q: [B,K,G,T,D], T at most PROBE; query t at position `q_offset + t`, those at negative positions do not count.
      k: [B,K,D,S], key s at position s.
      scale: factor on the logits, positive.
      q_offset: int32 [B] or one number.
      kv_len: int32 [B] or one number, keys in use, at most S; None: S.
      window: only the most recent tokens, the query's own included; None: all.

    Returns:
      (columns, diagonals), float32 [B,K,G,S] both: by position of the key, and by distance from the query.

    Raises:
      UserError: a shape or number that is not served.
    """
    check_probe(q, k, scale, window)
    B, T, S = q.shape[0], q.shape[3], k.shape[3]
    logits = jnp.einsum("bkgtd,bkds->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    first = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
    held = jnp.broadcast_to(jnp.asarray(S if kv_len is None else kv_len, jnp.int32), (B,))
    q_pos = first[:, None] + jnp.arange(T)
    distance = q_pos[..., None] - jnp.arange(S)  # [B,T,S]
    seen = (distance >= 0) & (jnp.arange(S) < held[:, None, None]) & (q_pos >= 0)[..., None]
    if window is not None:
        seen &= distance < window
    seen = seen[:, None, None]
    p = jax.nn.softmax(jnp.where(seen, logits, -1e30), -1) * seen
    far = jnp.where((distance >= 0) & (distance < S), distance, S)
    by_distance = jax.vmap(  # over B: distances are shared by the heads
        lambda p, d: jnp.zeros((*p.shape[:2], S)).at[:, :, d].add(p, mode="drop")
    )(p, far)
    return p.sum(3), by_distance


def _check_heads(q, k, name: str = "k"):
    if q.ndim != 5 or k.ndim != 4 or k.shape[:3] != (*q.shape[:2], q.shape[4]):
        raise UserError(f"q {q.shape}, {name} {k.shape}: allowed are [B,K,G,T,D] and [B,K,D,N]")


def _check_scale(scale: float):
    if not 1e-6 <= scale <= 1e6:
        raise UserError(f"scale={scale}: allowed are 1e-6 to 1e6")


def check_pooled(q, k, scale: float, rows: int, size: int):
    """Raise UserError for a call that `score_pooled` does not serve."""
    _check_heads(q, k)
    _check_scale(scale)
    if rows < 1 or size < 1:
        raise UserError(f"rows={rows} and size={size}: allowed are at least 1 token")


def check_minmax(q, low, high):
    """Raise UserError for a call that `score_minmax` does not serve."""
    _check_heads(q, low, "low")
    if high.shape != low.shape:
        raise UserError(f"low {low.shape}, high {high.shape}: allowed are equal shapes")


def check_antidiagonal(q, k, stride: int, scale: float, q_offset):
    """Raise UserError for a call that `score_antidiagonal` does not serve."""
    _check_heads(q, k)
    _check_scale(scale)
    if stride < 1 or BLOCK % stride:
        raise UserError(f"stride={stride}: allowed are divisors of {BLOCK}")
    if isinstance(q_offset, int) and (q_offset % stride or q_offset < 0):
        raise UserError(f"q_offset={q_offset}: allowed are multiples of stride={stride}")


def check_probe(q, k, scale: float, window: int | None):
    """Raise UserError for a call that `score_probe` does not serve."""
    _check_heads(q, k)
    _check_scale(scale)
    if q.shape[3] > PROBE:
        raise UserError(f"q of {q.shape}: allowed are at most {PROBE} queries")
    if window is not None and window < 1:
        raise UserError(f"window={window}: allowed are at least 1 token, or None")
