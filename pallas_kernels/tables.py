"""Tile sizes and pipeline depths of the kernels, by head_dim: what `autotune` measures on a GPU and writes.

Every entry compiles for the H200 without a spilled register (tests/test_kernel_*.py); none has been timed on a card yet.
"""

from __future__ import annotations

from dataclasses import dataclass

# attend: forward


@dataclass(frozen=True)
class AttendTile:
    """Sizes of `attend`.

    Attributes:
      size: keys of a tile, 64 or 128; divides the 128 of a listed tile.
      stages: tiles of K and of V in flight.
      registers: of a consumer's thread; (168 - registers of the producer) cover them.
      ping_pong: the two consumers take turns on the tensor core, one multiplies while the other takes exponentials.
    """

    size: int
    stages: int
    registers: int = 240
    ping_pong: bool = True


ATTEND = {
    64: AttendTile(size=128, stages=4),
    128: AttendTile(size=128, stages=2),
    256: AttendTile(size=64, stages=2),
}


# attend_bwd: gradients


@dataclass(frozen=True)
class AttendGradTile:
    """Sizes of the two kernels of `attend_bwd`.

    Attributes:
      size: keys of a tile that the kernel of dq reads.
      rows: queries of a tile that the kernel of dk and dv reads.
      dq_stages, dkv_stages: tiles in flight.
      together: dk and dv in one kernel; otherwise one each, where both sums do not fit the registers.
      registers: of a consumer's thread.
    """

    size: int
    rows: int
    dq_stages: int
    dkv_stages: int
    together: bool = True
    registers: int = 240


ATTEND_GRAD = {
    64: AttendGradTile(size=64, rows=64, dq_stages=4, dkv_stages=4),
    128: AttendGradTile(size=64, rows=64, dq_stages=3, dkv_stages=3),
    256: AttendGradTile(size=64, rows=64, dq_stages=1, dkv_stages=1, together=False),
}
