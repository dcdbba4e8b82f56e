"""Memory that a method needs on one device at one length, and the longest length that fits."""

from __future__ import annotations

from dataclasses import dataclass

from lcx.plan.search import Curve


@dataclass(frozen=True)
class Need:
    """Memory that one device needs at one length.

    Attributes:
      length: tokens of the prompt.
      cache_bytes: the decode cache, as `Recipe.bytes`.
      peak_cache_bytes: the largest sum of caches that are alive together.
      temp_bytes: scratch of the program that needs the most memory.
      peak_bytes: the most memory.
      program: the program that needs this memory.
      peaks: program -> the most memory while it runs.
      source: "compiled" where `program` was compiled for this length, else "interpolated".
    """

    length: int
    cache_bytes: int
    peak_cache_bytes: int
    temp_bytes: int
    peak_bytes: int
    program: str
    peaks: dict[str, int]
    source: str

    @classmethod
    def of(cls, curve: Curve, length: int) -> Need:
        caches, peak = curve.timeline(length), curve.peak(length)
        return cls(
            length,
            caches.cache_bytes,
            caches.peak_cache_bytes,
            peak.temp_bytes,
            peak.bytes,
            peak.part.name,
            peak.by_program,
            "compiled" if peak.compiled else "interpolated",
        )


@dataclass(frozen=True)
class Limit:
    """The longest prompt that fits.

    Attributes:
      tokens: rounded down to a multiple of 1,024; 0 where not even the weights fit.
      need: the memory at that length, or None at 0.
    """

    tokens: int
    need: Need | None
