"""Comparisons of a check: each keeps the largest difference so far, and the first that fails ends the check."""

from __future__ import annotations

from typing import Any

import numpy as np


class Failed(Exception):
    """Failure of a check, in one line."""


class Skipped(Exception):
    """Reason that a check says nothing of this method, in one line."""


class Measure:
    """Record of one check.

    Attributes:
      largest: the largest difference that was measured; None where nothing is a number.
    """

    def __init__(self):
        self.largest: float | None = None

    def _difference(self, got, want) -> np.ndarray:
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        if got.shape != want.shape:
            raise Failed(f"shape {got.shape} instead of {want.shape}")
        if not got.size:
            return np.zeros(())
        difference = np.abs(got - want)
        # nan in one place alone is as far away as can be; in both it is none
        same = np.isnan(got) & np.isnan(want)
        difference = np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))
        self.largest = max(self.largest or 0.0, float(difference.max()))
        return difference

    def near(self, got, want, atol: float, words: str) -> None:
        """Raise Failed unless two arrays agree within `atol`; `words` says what they are."""
        difference = self._difference(got, want)
        if difference.max() > atol:
            place = [int(i) for i in np.unravel_index(difference.argmax(), difference.shape)]
            raise Failed(f"{words} differ by {difference.max():.3g} at {place}; allowed are {atol:.0e}")

    def equal(self, got, want, words: str) -> None:
        """Raise Failed unless two arrays are the same, bit for bit."""
        self.near(got, want, 0.0, words)

    def finite(self, array, words: str) -> None:
        """Raise Failed unless every entry is finite."""
        bad = np.argwhere(~np.isfinite(np.asarray(array)))
        if len(bad):
            raise Failed(f"{words} are not finite at {[int(i) for i in bad[0]]}, and {len(bad) - 1} places more")

    def apart(self, got, want, least: float, words: str) -> None:
        """Raise Failed unless two arrays differ by more than `least` somewhere."""
        if self._difference(got, want).max() <= least:
            raise Failed(words)

    def same(self, got: Any, want: Any, words: str) -> None:
        """Raise Failed unless two values are equal."""
        if got != want:
            raise Failed(f"{words}: {got} instead of {want}")

    def holds(self, fact: bool, words: str) -> None:
        """Raise Failed unless a fact holds."""
        if not fact:
            raise Failed(words)
