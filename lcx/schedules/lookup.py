"""Drafting by prompt lookup: the tokens that followed the same n-gram earlier in the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lcx.checks import whole


class Draft(Protocol):
    """Rule that drafts at most `num_tokens` tokens."""

    @property
    def num_tokens(self) -> int: ...

    def draft(self, ids: np.ndarray, most: int) -> np.ndarray:
        """Return int [n] of drafted tokens, n from 0 to `most`, after the text `ids` [N]."""
        ...


@dataclass(frozen=True)
class Lookup:
    """Draft of the tokens after the first earlier place at which the text's last tokens stand; the longest n-gram that occurs decides.

    Prompt lookup decoding, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding, with the defaults of transformers'
    `prompt_lookup_num_tokens` (10 tokens there) and `max_matching_ngram_size` (2).  Looks through prompt and new tokens alike.

    Args:
      num_tokens: drafted at most, >= 1.
      max_ngram: tokens of the longest n-gram that is looked for, >= 1; shorter ones follow, down to a single token.
    """

    num_tokens: int = 10
    max_ngram: int = 2

    def __post_init__(self):
        whole("Lookup: num_tokens", self.num_tokens, 1)
        whole("Lookup: max_ngram", self.max_ngram, 1)

    def draft(self, ids: np.ndarray, most: int) -> np.ndarray:
        ids = np.asarray(ids)
        most = min(most, self.num_tokens)
        for size in range(min(self.max_ngram, len(ids) - 1), 0, -1):
            if most < 1:
                break
            # the last window is the text's own end, which nothing follows
            same = (sliding_window_view(ids, size)[:-1] == ids[-size:]).all(-1)
            if same.any():
                start = int(same.argmax()) + size
                return ids[start : start + most]
        return ids[:0]
