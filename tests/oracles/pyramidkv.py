"""PyramidKV (Cai et al., arXiv:2406.02069): SnapKV's choice with a budget that falls from the first layer to the last.

Two budgets are in use.  kvpress 0.5.5: exact fractions, rounded half to even at the end, the window INSIDE the budget,
mean over the layers = keep_ratio x tokens.  The authors (KVCache-Factory): integers rounded down at each division, the
window ON TOP of what is selected.  The votes are the same, except that kvpress averages over the GQA group (one set a KV
head) where the authors repeat the keys (one set a query head), and that a sum over the window became a mean.
"""

import math

import numpy as np

from oracles import real_tokens, softmax, top


def budgets_kvpress(num_tokens, keep_ratio, window, beta, num_layers):
    """Return the tokens kept per KV head in each layer, window included, as kvpress' `get_layer_budget`.

    With b = keep_ratio x tokens the last layer gets b / beta and the first 2b - b / beta, at most tokens - window (the
    last then gets the rest of 2b).  Where the last layer would get less than the window, all layers get b.
    """
    b = (window + num_tokens * keep_ratio) - window
    least = b / beta
    most = 2 * b - least
    if most >= num_tokens - window:
        most = num_tokens - window
        least = 2 * b - most
    if not num_tokens >= most >= least >= window:
        return [max(1, round(num_tokens * keep_ratio))] * num_layers
    step = (most - least) / (num_layers - 1) if num_layers > 1 else 0.0
    return [round(most - layer * step) for layer in range(num_layers)]


def budgets_authors(num_tokens, capacity, window, beta, num_layers):
    """Return the tokens kept per head in each layer, window included, as KVCache-Factory computes them.

    A text shorter than `capacity` is kept whole; one shorter than 2 x (capacity - window) gets `capacity` in each layer.
    """
    if num_tokens < capacity:
        return [num_tokens] * num_layers
    b = capacity - window
    if num_tokens < 2 * b:
        return [capacity] * num_layers
    least = b // beta
    most = 2 * b - least
    if most >= num_tokens - window:
        most = num_tokens - window
        least = 2 * b - most
    step = (most - least) // (num_layers - 1)
    return [most - layer * step + window for layer in range(num_layers)]


def votes(q, k, kernel):
    """Return float64 [T - W], the score of each token before the window, for one KV head.

    Softmax of the window's queries over ALL keys, causal inside the window; then the window's own columns are cut off,
    the mean over its queries taken, the mean over `kernel` neighbours (zeros beyond the ends count in the divisor), and
    the mean over the group.

    Args:
      q: [G,W,D], rotated queries of the last W tokens.
      k: [T,D], rotated keys, T > W.
      kernel: width of the pooling, odd; 1 for none.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    (_, W, D), T = q.shape, len(k)
    future = np.arange(T) > np.arange(T - W, T)[:, None]
    mass = softmax(np.where(future, -np.inf, q @ k.T / math.sqrt(D)))[..., : T - W].mean(1)
    padded = np.pad(mass, ((0, 0), (kernel // 2, kernel // 2)))
    pooled = sum(padded[:, i : i + T - W] for i in range(kernel)) / kernel
    return pooled.mean(0)


def kept(q, k, pos, num_kept, window, kernel=5):
    """Return the positions that one layer keeps: the window, and the best of the rest.

    Args:
      q: [B,K,G,T,D], rotated queries.
      k: [B,K,T,D], rotated keys.
      pos: int [B,T], EMPTY for padding.
      num_kept: tokens kept per KV head, window included, at least `window`; a row with fewer tokens keeps them all.
      window: last tokens of each row, whose queries vote and which stay.
      kernel: width of the pooling, odd.

    Returns:
      A list of B lists of K int arrays, ascending.

    Raises:
      ValueError: `num_kept` is below `window`; kvpress leaves open which of the window then stays.
    """
    if num_kept < window:
        raise ValueError(f"num_kept={num_kept} is below window={window}; keep at least the window")
    B, K, _, _ = np.shape(k)
    rows = []
    for b in range(B):
        order = real_tokens(pos[b])
        if len(order) <= num_kept:
            rows.append([pos[b][order]] * K)
            continue
        last = order[-window:]
        heads = []
        for h in range(K):
            best = top(votes(q[b, h][:, last], k[b, h, order], kernel), num_kept - window)
            heads.append(pos[b][np.concatenate([order[best], last])])
        rows.append(heads)
    return rows


def kept_by_layer(qs, ks, pos, budgets, window, kernel=5):
    """Return [layer][b][h] of int arrays: `kept` with each layer's own budget.  qs, ks: one array a layer."""
    return [kept(q, k, pos, n, window, kernel) for q, k, n in zip(qs, ks, budgets, strict=True)]
