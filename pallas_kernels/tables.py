"""Tile sizes and pipeline depths of the kernels, by head_dim, as `autotune` measures them on a GPU and writes them.

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
      size: keys of a tile that the kernel of dq reads, 32 or 64.
      rows: queries of a tile that the kernel of dk and dv reads, 32 or 64.
      dq_stages, dkv_stages: tiles in flight.
      together: dk and dv in one kernel; otherwise one each, where both sums do not fit the registers.
      registers, producer_registers: of a thread of a consumer and of the producer; 2 x registers + producer_registers <= 504.
    """

    size: int
    rows: int
    dq_stages: int
    dkv_stages: int
    together: bool = True
    registers: int = 232
    producer_registers: int = 40


ATTEND_GRAD = {
    64: AttendGradTile(size=64, rows=64, dq_stages=4, dkv_stages=4),
    128: AttendGradTile(size=64, rows=64, dq_stages=4, dkv_stages=4),
    256: AttendGradTile(size=32, rows=32, dq_stages=3, dkv_stages=3, together=False),
}


# decode


@dataclass(frozen=True)
class DecodeTile:
    """Sizes of `decode`.

    Attributes:
      pages: of a slot; the warps of a consumer agree on a maximum once a slot.
      stages: slots in flight, a multiple of `consumers`.
      consumers: warpgroups that compute.
      registers: of a consumer's thread.
      per_core: blocks that run on a core at a time.
    """

    pages: int
    stages: int
    consumers: int = 2
    registers: int = 240
    per_core: int = 1


# (payload, head_dim) -> for up to 8, 16 and 32 rows of queries (heads of a group times tokens); f16 is as bf16.  None, and more rows:
# registers would be spilled (12 to 104 bytes a thread), and `decode` reads the pages once for each part of the group
DECODE = {
    ("bf16", 64): (DecodeTile(pages=2, stages=6), DecodeTile(pages=2, stages=4), DecodeTile(pages=1, stages=4)),
    ("bf16", 128): (DecodeTile(pages=1, stages=6), DecodeTile(pages=1, stages=4), DecodeTile(pages=1, stages=4)),
    ("bf16", 256): (DecodeTile(pages=1, stages=2), DecodeTile(pages=1, stages=2), DecodeTile(pages=1, stages=2)),
    ("fp8", 64): (DecodeTile(pages=2, stages=6), DecodeTile(pages=2, stages=4), DecodeTile(pages=1, stages=4)),
    ("fp8", 128): (DecodeTile(pages=2, stages=4), DecodeTile(pages=1, stages=6), DecodeTile(pages=1, stages=4)),
    ("fp8", 256): (DecodeTile(pages=1, stages=4), DecodeTile(pages=1, stages=4), None),
    ("int8", 64): (DecodeTile(pages=2, stages=6), DecodeTile(pages=2, stages=4), DecodeTile(pages=1, stages=4)),
    ("int8", 128): (DecodeTile(pages=2, stages=4), DecodeTile(pages=1, stages=6), DecodeTile(pages=1, stages=4)),
    ("int8", 256): (DecodeTile(pages=1, stages=4), DecodeTile(pages=1, stages=4), None),
    ("int4", 64): (DecodeTile(pages=2, stages=6), DecodeTile(pages=2, stages=6), DecodeTile(pages=1, stages=6)),
    ("int4", 128): (DecodeTile(pages=4, stages=4), DecodeTile(pages=2, stages=6), DecodeTile(pages=1, stages=6)),
    ("int4", 256): (DecodeTile(pages=2, stages=4), DecodeTile(pages=1, stages=6), None),
    ("int2", 64): (DecodeTile(pages=2, stages=6), DecodeTile(pages=2, stages=6), DecodeTile(pages=1, stages=6)),
    ("int2", 128): (DecodeTile(pages=2, stages=6), DecodeTile(pages=2, stages=6), DecodeTile(pages=1, stages=6)),
    ("int2", 256): (DecodeTile(pages=1, stages=6), DecodeTile(pages=1, stages=6), None),
}


def decode_entry(kind: str, head_dim: int) -> tuple[DecodeTile, DecodeTile, DecodeTile | None]:
    """Return the table's tiles for a payload."""
    return DECODE["bf16" if kind == "f16" else kind, head_dim]


def decode_rows(kind: str, head_dim: int) -> int:
    """Return the upper bound on rows of queries that one of a payload's tiles takes."""
    return 16 if decode_entry(kind, head_dim)[2] is None else 32


def decode_tile(kind: str, head_dim: int, rows: int) -> DecodeTile:
    """Return the tile for a payload and `rows` of queries, at most `decode_rows` of them."""
    narrow, middle, wide = decode_entry(kind, head_dim)
    return narrow if rows <= 8 else middle if rows <= 16 or wide is None else wide


# score_blocks: products of rows by columns


@dataclass(frozen=True)
class ScoreTile:
    """Sizes of `score_blocks`.

    Attributes:
      columns: of a tile, 128 or 256.
      stages: slices of 64 channels in flight.
      run: tiles of columns that a block of the grid takes one after the other.
    """

    columns: int
    stages: int
    run: int


SCORE = {
    64: ScoreTile(columns=256, stages=4, run=4),
    128: ScoreTile(columns=256, stages=4, run=4),
    256: ScoreTile(columns=256, stages=4, run=4),
}


# score_probe: the last queries by all keys


@dataclass(frozen=True)
class ProbeTile:
    """Sizes of `score_probe`.

    Attributes:
      stages: tiles of 64 keys in flight.
      run: tiles that a block of the grid takes.
    """

    stages: int
    run: int


PROBE = {
    64: ProbeTile(stages=6, run=64),
    128: ProbeTile(stages=6, run=64),
    256: ProbeTile(stages=2, run=64),
}
