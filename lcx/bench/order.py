"""Order of the timed rows: those that a run which ends early must have come first."""

from __future__ import annotations

from lcx.bench import model
from lcx.bench.cases import Case
from lcx.bench.rows import Row, row_of
from pallas_kernels.tables import ATTEND_GRAD


def timed_cases() -> tuple[list[Case], list[Case]]:
    """Return the cases that a run which ends early must have, and the others."""
    dense = [Case("forward", n, d, batch=max(1, 65_536 // n)) for d in (128, 64, 256) for n in (16_384, 4_096, 65_536)]
    long = [Case("forward", 131_072, 128)]
    dims = [d for d in (128, 64, 256) if d in ATTEND_GRAD]
    backward = [Case("backward", n, d, batch=max(1, 16_384 // n)) for d in dims for n in (16_384, 4_096)]
    sparse = [Case("forward", n, 128, density=p) for n in (131_072, 65_536, 16_384) for p in (0.1, 0.05, 0.2, 0.5)]
    decode = [Case("decode", n, 128, batch=b) for n in (131_072, 32_768) for b in (1, 8)]
    quantised = [Case("decode", n, 128, payload=p) for n in (131_072, 32_768) for p in ("int4", "int2", "fp8")]
    scores = [Case("antidiagonal", 131_072, queries=16_384, stride=s) for s in (16, 8)]
    scores += [Case("probe", 131_072), Case("minmax", 131_072)]
    first = [*dense, *sparse[:1], *decode[:1], *quantised[:3], *backward[:1], *long, *scores]
    others = [*decode[1:], *quantised[3:], Case("decode_slots", 131_072), *sparse[1:], *backward[1:]]
    # these two run twice, to see the card's drift in between
    return first, [*others, dense[0], decode[0]]


def timed_rows() -> list[Row]:
    """Return all rows, in order."""
    first, others = ([row_of(case) for case in part] for part in timed_cases())
    return [*first, *model.rows(), *others]
