"""KeyDiff (Park et al., arXiv:2504.15364): keep the keys that differ most from the mean direction of all keys.

Score of a key: minus its cosine with the anchor, the mean of the keys after each is scaled to length 1.  One set a KV
head; keys are rotated; no query takes part and nothing is protected, neither sinks nor the newest token.
"""

import numpy as np

from oracles import real_tokens, top

# of kvpress' two calls (torch's normalize, cosine_similarity); they matter for keys of length 0 alone
NORM_EPS, COSINE_EPS = 1e-12, 1e-8


def scores(keys):
    """Return float64 [N], higher stays.  keys [N,D], the keys of one KV head that compete, and no others."""
    keys = np.asarray(keys, np.float64)
    length = np.linalg.norm(keys, axis=-1, keepdims=True)
    anchor = (keys / np.maximum(length, NORM_EPS)).mean(0)
    lengths = np.maximum(length[:, 0], COSINE_EPS) * max(np.linalg.norm(anchor), COSINE_EPS)
    return -(keys @ anchor) / lengths


def kept(k, pos, num_kept):
    """Return the positions kept by one choice among all tokens, as kvpress makes it at the end of a prompt.

    Args:
      k: [B,K,S,D], rotated keys.
      pos: int [B,S], EMPTY for padding.
      num_kept: tokens kept per KV head; a row with fewer tokens keeps them all.

    Returns:
      A list of B lists of K int arrays, ascending.
    """
    return kept_in_steps(k, pos, num_kept, [np.shape(k)[2]])


def kept_in_steps(k, pos, num_kept, widths):
    """Return the positions kept when the text arrives in steps and each step ends with a choice.

    The anchor of a choice is the mean over what is held and what is new.  The paper: a prompt in blocks (128), then one
    token a step.  `BlockPress` of kvpress is widths [num_kept, block, block, ...].

    Args:
      k, pos, num_kept: as in `kept`.
      widths: tokens of each step, of all batch rows alike; padding counts.

    Returns:
      A list of B lists of K int arrays, ascending.

    Raises:
      ValueError: the widths do not add up to S.
    """
    B, K, S, _ = np.shape(k)
    if sum(widths) != S:
        raise ValueError(f"widths={list(widths)} add up to {sum(widths)}, not to the {S} keys")
    ends = np.cumsum(widths)
    rows = []
    for b in range(B):
        order = real_tokens(pos[b])
        heads = []
        for h in range(K):
            held = order[:0]
            for start, end in zip(ends - widths, ends, strict=True):
                held = np.concatenate([held, order[(order >= start) & (order < end)]])
                if len(held) > num_kept:
                    held = held[top(scores(k[b, h, held]), num_kept)]
            heads.append(pos[b][held])
        rows.append(heads)
    return rows
