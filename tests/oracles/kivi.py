"""KIVI (Liu et al., arXiv:2402.02750): what one KV head holds after every step, keys and values apart.

From the paper, section 3.2, and the authors' code (jy-yuan/KIVI, models/llama_kivi.py); R is the residual length.

- Keys: groups of g neighbouring tokens of one channel.  With T tokens in the cache the newest T % R are exact; the others were
  quantised when a page of R was complete, at the end of the prompt or of a step.
- Values: groups of g neighbouring channels of one token.  The newest R are exact, at the end of the prompt and of every step.
- A group's codes are round((x - minimum) / scale), scale = (maximum - minimum) / (2^bits - 1); float16 scale and minimum.
- A step reads what the cache held before it, and its own tokens as they are.
"""

import numpy as np


def rounded(groups, bits):
    """Return float64 [...,g]: what is read back of groups of numbers that share a scale and a minimum."""
    low = np.float16(groups.min(-1, keepdims=True)).astype(np.float64)
    scale = np.float16((groups.max(-1, keepdims=True) - low) / (2**bits - 1)).astype(np.float64)
    codes = np.clip(np.round((groups - low) / np.where(scale > 0, scale, 1)), 0, 2**bits - 1)
    return codes * scale + low


class Cache:
    """Rounding of one KV head's keys and values as its text grows.

    Args:
      bits, group: of both quantisers.
      residual: R.
    """

    def __init__(self, bits, group, residual):
        self.bits, self.group, self.residual = bits, group, residual
        self.keys = self.values = 0  # tokens quantised so far

    def after_step(self, key, value):
        """Return key and value [T,D] of all tokens after a step; those that were quantised before come back as they are."""
        key, value = key.copy(), value.copy()
        T, D = key.shape
        until = T - T % self.residual
        if until > self.keys:
            new = key[self.keys : until].reshape(-1, self.group, D)
            key[self.keys : until] = np.moveaxis(rounded(np.moveaxis(new, 1, 2), self.bits), 2, 1).reshape(-1, D)
            self.keys = until
        until = T - self.residual
        if until > self.values:
            new = value[self.values : until].reshape(until - self.values, -1, self.group)
            value[self.values : until] = rounded(new, self.bits).reshape(-1, D)
            self.values = until
        return key, value
