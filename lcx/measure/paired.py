"""Paired differences to dense attention, with their standard errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """Mean of method - dense over the same tokens, nats a token.

    Attributes:
      mean: over all tokens.
      se_tokens: standard error if tokens were independent; None below two tokens.
      se_passages: standard error over the passages' means, which are what a new text would draw again; None below two passages.
      largest: largest absolute difference of a token.
    """

    mean: float
    se_tokens: float | None
    se_passages: float | None
    largest: float

    @property
    def se(self) -> float | None:
        """Return the larger of the two: tokens of a passage are not independent, and two passages say little of their spread."""
        return max((e for e in (self.se_tokens, self.se_passages) if e is not None), default=None)


def difference(method, dense, counted=None) -> Difference | None:
    """Return the paired difference of NLLs.

    Args:
      method, dense: [P,M] in nats, passages by tokens.
      counted: bool [P,M], tokens that count; None: all.

    Returns:
      None where no token counts.
    """
    d = np.asarray(method, np.float64) - np.asarray(dense, np.float64)
    counted = np.ones(d.shape, bool) if counted is None else np.asarray(counted, bool)
    values = d[counted]
    if not len(values):
        return None
    means = [row[take].mean() for row, take in zip(d, counted, strict=True) if take.any()]
    return Difference(float(values.mean()), _se(values), _se(np.array(means)), float(np.abs(values).max()))


def _se(values: np.ndarray) -> float | None:
    return None if len(values) < 2 else float(values.std(ddof=1) / len(values) ** 0.5)


def apart(a: tuple[float, float | None], b: tuple[float, float | None], sigmas: float = 2.0) -> bool:
    """Return True where two (mean, standard error) differ by more than `sigmas` of their joint error; False where an error is unknown."""
    if a[1] is None or b[1] is None:
        return False
    return abs(a[0] - b[0]) > sigmas * float(np.hypot(a[1], b[1]))
