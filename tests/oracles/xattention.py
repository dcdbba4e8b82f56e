"""XAttention (Xu et al., arXiv:2503.16428): which blocks of keys a block of queries reads, by sums along antidiagonals.

As the authors' code (mit-han-lab/x-attention) does it, per query head, at norm = 1:

- `stride` = S consecutive tokens are a group.  The logit of a query group and a key group is the sum of q[S-1-s] . k[s]
  over s, divided by sqrt(D) and by S.  Each token takes part once in a tile; in the tile on the diagonal future keys do.
- Softmax over the key groups up to the query's own; then the sum over the groups of a block of queries and a block of
  keys.  A row of blocks adds up to the number of its groups that have a token: it is not divided by it.
- Missing tokens are zero vectors.  A group with at least one token counts whole; a group without any counts nothing.
- A block row takes block 0 and its own block, then the largest others while what it has is BELOW tau x the row's sum.
  Blocks of mass 0 are never needed, so tau = 1 gives all blocks of positive mass.
- The FIRST chunk of the authors' code differs, hardly on purpose: writing the diagonal wipes out the mark of block 0, so
  block 0 takes its turn by size, and the sum that is compared with tau lags one block behind.  (Block 0 is taken all the
  same: unused entries of the index list point to it.)  Rows there hold up to two blocks more than needed.  That chunk is
  the whole text up to 16,384 tokens.  `first_chunk` repeats it; the default, 0, is the rule of every later chunk.

The authors' code pads to its chunk (2,048 or more), which changes nothing above: what it adds lies in the future.  Not
copied: their version without Triton masks all earlier chunks where the text is a multiple of the chunk (`-0:` as a slice),
and `keep_sink` forces the first ROW instead of the first column.  Which of two equal blocks comes first is left to
torch's sort there; here it is the earlier.
"""

import math

import numpy as np

from oracles import EMPTY, softmax


def by_position(x, pos, first, count):
    """Return float64 [..., count, D]: the vectors of positions first, first + 1, ...; zeros where there is no token."""
    out = np.zeros((*x.shape[:-2], count, x.shape[-1]))
    places = np.flatnonzero(pos != EMPTY)
    out[..., pos[places] - first, :] = x[..., places, :]
    return out


def extent(q_pos, stride, block):
    """Return (first position, last position + 1) of one row's queries, which must begin a block.  q_pos [T]."""
    if block % stride:
        raise ValueError(f"block={block} is not a multiple of stride={stride}")
    real = q_pos[q_pos != EMPTY]
    first = int(real.min()) if len(real) else 0
    if first % block:
        raise ValueError(f"the queries begin at position {first}, which is not a multiple of block={block}")
    if len(real) and (np.sort(real) != first + np.arange(len(real))).any():
        raise ValueError("the positions of the queries have gaps or repeat")
    return first, first + len(real)


def block_scores(q, k, q_pos, kv_pos, stride, block):
    """Return the mass that each block of queries gives to each block of keys.

    Args:
      q: [B,K,G,T,D], rotated queries: the whole text, or a chunk that begins a block.
      k: [B,K,N,D], rotated keys of the text up to the end of the chunk at least; later ones are not looked at.
      q_pos, kv_pos: int [B,T], [B,N], EMPTY for padding.
      stride: S, tokens of a group.
      block: tokens of a block, a multiple of S.

    Returns:
      A list of B pairs (first, scores): the first block of queries, and float64 [K,G,Q,M] for the Q blocks that the row's
      queries fill (the last perhaps in part) and the M = first + Q blocks of keys up to them.

    Raises:
      ValueError: `block` is no multiple of `stride`, or a row's queries do not begin a block or have gaps.
    """
    D = q.shape[-1]
    rows = []
    for b in range(len(q)):
        start, end = extent(q_pos[b], stride, block)
        M = -(-end // block)
        first, Q = start // block, M - start // block
        key_place = np.where(kv_pos[b] < end, kv_pos[b], EMPTY)
        queries = by_position(q[b], q_pos[b], start, Q * block)
        keys = by_position(k[b], key_place, 0, M * block)
        tiles = queries.reshape(*queries.shape[:2], -1, stride, D)[..., ::-1, :]
        groups = keys.reshape(len(keys), 1, -1, stride, D)
        logits = np.einsum("kgisd,kxjsd->kgij", tiles, groups) / math.sqrt(D) / stride
        own = start // stride + np.arange(logits.shape[2])
        mass = softmax(np.where(np.arange(logits.shape[3]) > own[:, None], -np.inf, logits))
        mass = np.where((own * stride < end)[:, None], mass, 0.0)
        blocks = mass.reshape(*mass.shape[:2], Q, block // stride, M, block // stride).sum((3, 5))
        rows.append((first, blocks))
    return rows


def choose_row(mass, own, tau):
    """Return bool [M], the smallest set with block 0 and `own` that reaches tau x the row's sum.  mass [M]."""
    chosen = np.zeros(len(mass), bool)
    chosen[[0, own]] = True
    # by what is left out, which is exactly 0 at the end; sums of what is taken differ in their last bit at tau = 1
    allowed = (1 - tau) * math.fsum(mass)
    for place in np.argsort(-mass, kind="stable"):
        if math.fsum(mass[~chosen]) <= allowed:
            break
        chosen[place] = True
    return chosen


def choose_row_of_first_chunk(mass, own, tau):
    """Return bool [M], what the authors' code takes in its first chunk.  mass [M]."""
    chosen = np.zeros(len(mass), bool)
    chosen[[0, own]] = True
    # block 0 among them, in its turn
    others = np.argsort(-mass[:own], kind="stable")
    for i, place in enumerate(others):
        if i and mass[own] + math.fsum(mass[others[: i - 1]]) >= tau * math.fsum(mass):
            break
        chosen[place] = True
    return chosen


def chosen_blocks(q, k, q_pos, kv_pos, stride, block, tau, first_chunk=0):
    """Return the blocks read, as a list of B pairs (first, bool [K,G,Q,M]); arguments as in `block_scores`.

    tau: share of a row's mass to reach, a number or an array that broadcasts to [K,G].
    first_chunk: tokens, a multiple of `block`, whose rows are chosen as in the first chunk of the authors' code.
    """
    rows = []
    for first, scores in block_scores(q, k, q_pos, kv_pos, stride, block):
        K, G, Q, _ = scores.shape
        share = np.broadcast_to(tau, (K, G))
        chosen = np.zeros(scores.shape, bool)
        for h, g, i in np.ndindex(K, G, Q):
            choose = choose_row_of_first_chunk if (first + i) * block < first_chunk else choose_row
            chosen[h, g, i] = choose(scores[h, g, i], first + i, share[h, g])
        rows.append((first, chosen))
    return rows


def density(first, chosen):
    """Return the share of causal blocks that are read, over all heads.  chosen [K,G,Q,M]."""
    K, G, Q, _ = chosen.shape
    return chosen.sum() / (K * G * sum(first + i + 1 for i in range(Q)))


def attend(q, k, v, q_pos, kv_pos, block, rows):
    """Return float64 [B,K,G,T,D]: exact causal attention of each query over its block row's blocks; 0 for padding.

    rows: what `chosen_blocks` gave.
    """
    out = np.zeros(q.shape)
    for b, (first, chosen) in enumerate(rows):
        keys = np.flatnonzero(kv_pos[b] != EMPTY)
        for t in np.flatnonzero(q_pos[b] != EMPTY):
            at = q_pos[b, t]
            seen = keys[kv_pos[b, keys] <= at]
            visible = chosen[:, :, at // block - first, kv_pos[b, seen] // block]
            logits = np.einsum("kgd,ksd->kgs", q[b, :, :, t].astype(np.float64), k[b][:, seen]) / math.sqrt(q.shape[-1])
            weight = softmax(np.where(visible, logits, -np.inf))
            out[b, :, :, t] = np.einsum("kgs,ksd->kgd", weight, v[b][:, seen])
    return out
