"""Rules of published methods in float64 numpy, from the papers and the authors' code; nothing of lcx is imported.

Shapes are those of lcx: q [B,K,G,T,D], k and v [B,K,S,D], positions int [B,T] and [B,S] with EMPTY where a batch row has
no token.  Every batch row is computed alone from its real tokens, so padding can not matter.
"""

import numpy as np

EMPTY = -1


def positions(lengths, T):
    """Return int64 [B,T]: 0, 1, ... for the first `lengths[b]` tokens of row b, EMPTY after them."""
    count = np.arange(T)
    return np.where(count < np.asarray(lengths)[:, None], count, EMPTY)


def real_tokens(pos):
    """Return the places of one row's tokens, in the order of their positions.  pos [T]."""
    places = np.flatnonzero(np.asarray(pos) != EMPTY)
    return places[np.argsort(pos[places], kind="stable")]


def top(scores, num):
    """Return the places of the `num` highest scores, ascending; of equal scores the earlier stays.  scores [N]."""
    return np.sort(np.argsort(-scores, kind="stable")[:num])


def softmax(logits):
    """Softmax over the last axis; -inf is never seen, and every row sees something."""
    # initial: there may be no row at all
    weight = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
    return weight / weight.sum(-1, keepdims=True)
