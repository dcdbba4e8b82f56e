"""MInference (Jiang et al., arXiv:2407.02490): the keys that each block of 64 queries reads, vertical-slash heads of a prefill.

From the paper, section 3.2, and the authors' code (microsoft/MInference, csrc/vertical_slash_index.cu).  Every query head
chooses for itself; q and k are rotated and of the whole prompt.

- The last 64 queries (all of a shorter text) estimate: softmax of their logits over all keys, causal.  The score of a column
  is the sum over these queries of what they give to a key, that of a distance d the sum of what query i gives to key i - d.
- The first 30 columns and the distances below 100 rank first.  `vertical` columns (30 at least) and `slash` distances (50
  at least) are taken; of equal scores the nearer to 0, so that slash below 100 takes the `slash` nearest distances.
- A block of queries whose last place is end - 1 reads, for each chosen d < end, the 64 keys before max(end - d, 64): ranges
  hang on the diagonal, not on a grid of 64.  And the chosen columns before `end`.  A query reads no key after its own.
- authors=False: the union of the above.  authors=True: a range that overlaps or touches the one before it lengthens that by
  a whole 64, as their kernel does, so a block may read up to 63 more keys behind each chain of ranges.

The authors' top-k leaves open which of the 100 nearest distances stay when `slash` is below 100; authors=True refuses that.
"""

import math

import numpy as np

from oracles import real_tokens, softmax, top

PROBE, BLOCK = 64, 64
COLUMNS, DISTANCES = 30, 100  # always in
LEAST_VERTICAL, LEAST_SLASH = 30, 50


def estimate(q, k):
    """Return (columns, distances), float64 [n] each, of one query head.  q, k [n,D], one text without padding."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    n, D = k.shape
    rows = np.arange(max(0, n - PROBE), n)
    distance = rows[:, None] - np.arange(n)
    mass = softmax(np.where(distance < 0, -np.inf, q[rows] @ k.T / math.sqrt(D)))
    seen = distance >= 0
    return mass.sum(0), np.bincount(distance[seen], mass[seen], n)


def choose(scores, forced, num):
    """Return the places of the `num` highest scores, ascending; the first `forced` are in, and count."""
    return top(np.where(np.arange(len(scores)) < forced, np.inf, scores), num)


def chosen(q, k, vertical, slash, authors=False):
    """Return (columns, distances) that one query head reads, ascending int arrays.  q, k [n,D]."""
    n = len(k)
    vertical, slash = min(n, max(vertical, LEAST_VERTICAL)), min(n, max(slash, LEAST_SLASH))
    if authors and slash < min(n, DISTANCES):
        raise ValueError(f"slash={slash} is below {DISTANCES}; which of the nearest distances stay is left open")
    columns, distances = estimate(q, k)
    return choose(columns, COLUMNS, vertical), choose(distances, DISTANCES, slash)


def ranges(distances, end, authors):
    """Return the ranges [first, stop) of keys that a block of queries ending at `end` reads for its distances, ascending."""
    stops = sorted(max(end - int(d), BLOCK) for d in distances if d < end)
    if not authors:
        return [(stop - BLOCK, stop) for stop in stops]
    joined = []
    for stop in stops:
        if joined and stop <= joined[-1][1] + BLOCK:
            first, last = joined[-1]
            joined[-1] = (first, last if stop <= last else last + BLOCK)
        else:
            joined.append((stop - BLOCK, stop))
    return joined


def block_keys(columns, distances, n, end, authors=False):
    """Return bool [n], the keys that the queries end - 64 ... end - 1 read; of later ones than `end` none is visible."""
    reads = np.zeros(n, bool)
    reads[columns] = True
    for first, stop in ranges(distances, end, authors):
        reads[first:stop] = True
    reads[end:] = False
    return reads


def read_keys(q, k, pos, vertical, slash, authors=False):
    """Return the keys that each block of queries reads.

    Args:
      q: [B,K,G,T,D], rotated queries of whole prompts.
      k: [B,K,T,D], rotated keys.
      pos: int [B,T], 0, 1, ... of the tokens, EMPTY for padding.
      vertical, slash: sizes, ints or arrays that broadcast to [K,G].
      authors: join ranges as the authors' kernel does.

    Returns:
      A list of B arrays bool [K,G,Q,n], n the tokens of the row, Q = ceil(n / 64); places are positions.

    Raises:
      ValueError: authors=True and `slash` below 100.
    """
    B, K, G = np.shape(q)[:3]
    vertical, slash = np.broadcast_to(vertical, (K, G)), np.broadcast_to(slash, (K, G))
    rows = []
    for b in range(B):
        order = real_tokens(pos[b])
        n = len(order)
        reads = np.zeros((K, G, -(-n // BLOCK), n), bool)
        for h, g in np.ndindex(K, G) if n else ():
            lines = chosen(q[b, h, g][order], k[b, h][order], int(vertical[h, g]), int(slash[h, g]), authors)
            for i in range(reads.shape[2]):
                reads[h, g, i] = block_keys(*lines, n, (i + 1) * BLOCK, authors)
        rows.append(reads)
    return rows


def visible(reads):
    """Return bool [...,n,n], the pairs of query and key that count: those that are read and not in the future."""
    n = reads.shape[-1]
    return np.repeat(reads, BLOCK, -2)[..., :n, :] & np.tri(n, dtype=bool)


def attend(q, k, v, pos, rows):
    """Return float64 [B,K,G,T,D]: exact attention of each query over what it reads; 0 for padding.  rows: of `read_keys`."""
    out = np.zeros(np.shape(q))
    for b, reads in enumerate(rows):
        order = real_tokens(pos[b])
        if not len(order):
            continue
        queries, keys, values = (np.asarray(x[b], np.float64)[..., order, :] for x in (q, k, v))
        logits = np.einsum("kgtd,ksd->kgts", queries, keys) / math.sqrt(queries.shape[-1])
        weight = softmax(np.where(visible(reads), logits, -np.inf))
        out[b][..., order, :] = np.einsum("kgts,ksd->kgtd", weight, values)
    return out
