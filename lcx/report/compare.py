"""Two sweeps cell by cell: changed columns, the interval of each change, and whether it is a regression.

Rule for times: rows hold the median and the 10th and 90th percentile of n runs.  The interval of the ratio B / A is from p10 of B over
p90 of A to p90 of B over p10 of A.  It needs no distribution, and runs of one process, which drift together, do not make it too narrow.
A time is a regression when its interval lies above 1 and its ratio above 1 + threshold; with fewer than 3 runs there is no interval
and no verdict.  Times of different machines are not compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcx.errors import UserError
from lcx.report.axes import bytes_text, seconds_text
from lcx.report.source import Source
from lcx.sweep.schema import Row, leaves
from lcx.sweep.store import Job

CELL = ("method", "model", "dtype", "batch", "length", "seed")
TIMES = ("ttft_s", "decode_s")
CACHES = ("cache_bytes", "peak_cache_bytes", "weight_bytes")
COMPILED = ("temp_bytes", "peak_bytes")  # depend on the device that was compiled for
QUALITY = ("nll", "kl")
LEAST_RUNS = 3

RULE = (
    "ratio B / A of medians; interval: p10 of B / p90 of A to p90 of B / p10 of A.  A regression: a time whose interval is above 1 and "
    "whose ratio is above 1 + threshold; any byte more; NLL or KL more than the tolerance higher; a point that was ok and is not any more"
)

Cell = tuple[Any, ...]


@dataclass(frozen=True)
class Change:
    """One column of one cell in both sweeps.

    Attributes:
      name: of the column.
      before, after: its values.
      ratio: after / before, of times and bytes.
      interval: of the ratio, of times.
      verdict: "regression", "better", "same", or why there is none.
    """

    name: str
    before: Any
    after: Any
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    verdict: str = "same"

    @property
    def text(self) -> str:
        """Return the change as one line."""
        if self.name == "status":
            return f"{self.before} -> {self.after}"
        if self.name in QUALITY:
            return f"{self.before:.6g} -> {self.after:.6g} ({self.after - self.before:+.3g})"
        show = seconds_text if self.name in TIMES else bytes_text
        return f"{show(self.before)} -> {show(self.after)} {self._ratio(3)}"

    @property
    def short(self) -> str:
        """Return the change as a cell of a table."""
        if self.name == "status":
            return self.text
        if self.before == self.after:
            return "="
        if self.ratio is None:
            return f"{self.after - self.before:+.3g}"
        return self._ratio(2)

    def _ratio(self, digits: int) -> str:
        """Return the ratio with its interval."""
        span = "" if self.interval is None else f" [{self.interval[0]:.{digits}f}, {self.interval[1]:.{digits}f}]"
        return "" if self.ratio is None else f"x{self.ratio:.{digits}f}{span}"


@dataclass(frozen=True)
class Comparison:
    """Comparison of two sweeps.

    Attributes:
      cells: cell -> changes of its columns, of cells in both.
      only_before, only_after: cells of only one sweep.
      notes: omitted comparisons, and settings that differ.
    """

    cells: dict[Cell, list[Change]]
    only_before: list[Cell]
    only_after: list[Cell]
    notes: list[str]

    @property
    def regressions(self) -> list[tuple[Cell, Change]]:
        return [(cell, c) for cell, changes in self.cells.items() for c in changes if c.verdict == "regression"]


def cell_of(row: Mapping[str, Any]) -> Cell:
    return tuple(row[n] for n in CELL)


def compare(before: Source, after: Source, threshold: float = 0.05, quality_tolerance: float = 1e-6) -> Comparison:
    """Compare B, `after`, with A, `before`.

    Args:
      before, after: sweeps.
      threshold: by how much a time's ratio may be above 1.
      quality_tolerance: by how much NLL and KL may be higher, nats a token.

    Raises:
      UserError: they share no cell.
    """
    a, b = _by_cell(before), _by_cell(after)
    shared = [cell for cell in a if cell in b]
    if not shared:
        raise UserError(
            "A and B share no cell of method, model, dtype, batch, length and seed; nothing can be compared"
        )
    cells = {cell: list(_changes(a[cell][1], b[cell][1], threshold, quality_tolerance)) for cell in shared}
    return Comparison(
        cells=cells,
        only_before=[cell for cell in a if cell not in b],
        only_after=[cell for cell in b if cell not in a],
        notes=[*_machine_notes(a, b, shared), *_setting_notes(a, b, shared)],
    )


def _by_cell(source: Source) -> dict[Cell, tuple[Job, Row]]:
    return {cell_of(row): (job, row) for job, row in zip(source.jobs, source.rows, strict=True)}


def _changes(a: Row, b: Row, threshold: float, tolerance: float) -> Iterator[Change]:
    if a["status"] != b["status"]:
        verdict = "regression" if a["status"] == "ok" else "better" if b["status"] == "ok" else "same"
        yield Change("status", a["status"], b["status"], verdict=verdict)
    if a["status"] != "ok" or b["status"] != "ok":
        return
    same_device = a["device"] == b["device"]
    for name in TIMES if same_device and a["host"] == b["host"] else ():
        if a[name] and b[name]:
            yield _time_change(a, b, name, threshold)
    for name in (*CACHES, *(COMPILED if same_device else ())):
        if a[name] and b[name] is not None:
            yield Change(name, a[name], b[name], b[name] / a[name], verdict=_verdict(b[name] - a[name], 0))
    for name in QUALITY:
        if a[name] is not None and b[name] is not None:
            yield Change(name, a[name], b[name], verdict=_verdict(b[name] - a[name], tolerance))


def _verdict(more: float, tolerance: float) -> str:
    return "regression" if more > tolerance else "better" if more < -tolerance else "same"


def _time_change(a: Row, b: Row, name: str, threshold: float) -> Change:
    stem = name.removesuffix("_s")
    ratio = b[name] / a[name]
    ends = [r[f"{stem}_{p}_s"] for r in (a, b) for p in ("p10", "p90")]
    runs = [r[f"{stem}_n"] or 0 for r in (a, b)]
    if min(runs) < LEAST_RUNS or not all(ends):
        return Change(name, a[name], b[name], ratio, verdict=f"fewer than {LEAST_RUNS} runs")
    a10, a90, b10, b90 = ends
    low, high = b10 / a90, b90 / a10
    slower, faster = low > 1 and ratio > 1 + threshold, high < 1 and ratio < 1 / (1 + threshold)
    return Change(
        name, a[name], b[name], ratio, (low, high), "regression" if slower else "better" if faster else "same"
    )


def _machine_notes(
    a: Mapping[Cell, tuple[Job, Row]], b: Mapping[Cell, tuple[Job, Row]], shared: Sequence[Cell]
) -> list[str]:
    pairs: dict[tuple[str, str], int] = {}
    for cell in shared:
        one, two = a[cell][1], b[cell][1]
        if one["status"] == two["status"] == "ok" and (one["host"], one["device"]) != (two["host"], two["device"]):
            names = tuple(f"{r['host']} ({r['device']})" for r in (one, two))
            pairs[names[0], names[1]] = pairs.get((names[0], names[1]), 0) + 1
    return [f"times of {n} cells are not compared: A ran on {x}, B on {y}" for (x, y), n in pairs.items()]


def _setting_notes(
    a: Mapping[Cell, tuple[Job, Row]], b: Mapping[Cell, tuple[Job, Row]], shared: Sequence[Cell]
) -> list[str]:
    """Return the settings that differ where cells of the same name are not the same point."""
    changed = [cell for cell in shared if a[cell][0].key != b[cell][0].key]
    counts: dict[str, int] = {}
    for cell in changed:
        old, new = leaves(a[cell][0].spec), leaves(b[cell][0].spec)
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                text = f"{name} {old.get(name)!r} -> {new.get(name)!r}"
                counts[text] = counts.get(text, 0) + 1
    notes = [f"set differently in {n} cells: {text}" for text, n in list(counts.items())[:10]]
    if len(counts) > 10:
        notes.append(f"set differently: {len(counts) - 10} more")
    if changed and not counts:
        notes.append(
            f"{len(changed)} cells are other points with the same settings: the model's file or a method's arrays changed"
        )
    return notes
