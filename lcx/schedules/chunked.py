"""Prefill in one step, or in chunks."""

from __future__ import annotations

from dataclasses import dataclass

from lcx.errors import UserError


@dataclass(frozen=True)
class OneShot:
    """The whole prompt in one step."""

    def steps(self, length: int) -> list[tuple[int, int]]:
        """Return (start, stop) of each step, in tokens."""
        return [(0, length)]

    def width(self, length: int) -> int:
        """Return the tokens of the widest step."""
        return length

    def chunk_size(self) -> int | None:
        """Return the tokens of a chunk; None where the prompt is read in one step."""
        return None


@dataclass(frozen=True)
class Chunked:
    """The prompt in chunks; the last one is padded, so that all steps share one program.

    Exact for methods that keep every token exactly; others see this chunk's own tokens whole and the past as they stored it.

    Args:
      size: tokens a step, >= 1.
    """

    size: int = 512

    def __post_init__(self):
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise UserError(f"Chunked: size={self.size!r} must be an integer of at least 1 token")

    def steps(self, length):
        return [(i, min(i + self.size, length)) for i in range(0, length, self.size)]

    def width(self, length):
        return min(self.size, length)

    def chunk_size(self):
        return self.size
