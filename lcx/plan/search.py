"""Peak memory as a function of the context: compiled at some lengths, interpolated between them, and searched for the longest that fits."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lcx.ops.attention import FAR
from lcx.plan.programs import ONE_SHOT, Compiler, Part, Report, Timeline
from lcx.plan.targets import GpuTarget

STEP = 1_024  # the longest context is rounded down to a multiple of it
TOLERANCE = 0.03  # of interpolated temp, against what is compiled
MARGIN = 4  # a program is left out where this multiple of its temp and results would not make it the largest
MORE_POINTS = 4  # compiled at most where a check fails
MORE_LIMITS = 8  # limits compiled until one stays


@dataclass(frozen=True)
class Peak:
    """The most memory at one length.

    Attributes:
      bytes: weights, caches, residual stream, and the largest program's temp and results.
      part: the program that needs them.
      temp_bytes: of that program.
      by_program: the most of each kind of program.
      compiled: True where that program was compiled for this length.
    """

    bytes: int
    part: Part
    temp_bytes: int
    by_program: dict[str, int]
    compiled: bool


@dataclass(frozen=True)
class Check:
    """Error of a prediction at one length, compiled afterwards: relative errors of the limiting program's temp and of the peak."""

    tokens: int
    temp_error: float
    peak_error: float

    @property
    def holds(self) -> bool:
        return self.temp_error <= TOLERANCE and self.peak_error <= TOLERANCE


class Curve:
    """Peak memory of one method on one device.

    Args:
      compiler: shared by all curves.
      target: target of the compilations.
      at: length -> its programs.
    """

    def __init__(self, compiler: Compiler, target: GpuTarget | None, at: Callable[[int], Timeline]):
        self._compiler, self._target, self._at = compiler, target, at
        self._timelines: dict[int, Timeline] = {}
        self._knots: dict[int, dict[tuple[str, int], Report]] = {}

    def timeline(self, length: int) -> Timeline:
        if length not in self._timelines:
            self._timelines[length] = self._at(length)
        return self._timelines[length]

    def compile_ends(self, *lengths: int) -> None:
        """Compile every program of these lengths."""
        self._compile({length: self.timeline(length).parts for length in lengths})

    def compile(self, *lengths: int) -> None:
        """Compile the programs of these lengths that can be the largest, judged by the lengths that are compiled already."""
        self._compile({length: self._largest(length) for length in lengths if length not in self._knots})

    def _largest(self, length: int) -> list[Part]:
        parts, extra = self.timeline(length).parts, [r.extra_bytes for r in self._reports(length)]
        largest = max(part.live_bytes + more for part, more in zip(parts, extra, strict=True))
        return [p for p, more in zip(parts, extra, strict=True) if p.live_bytes + MARGIN * more >= largest]

    def _compile(self, wanted: Mapping[int, Sequence[Part]]) -> None:
        waiting = {length: self._compiler.submit(self._target, parts) for length, parts in wanted.items()}
        for length, futures in waiting.items():
            labels = [part.label for part in wanted[length]]
            self._knots[length] = {n: f.result() for n, f in zip(labels, futures, strict=True)}

    def peak(self, length: int) -> Peak:
        """Return the peak, compiled where the length is, else interpolated; at least one length must be compiled."""
        parts = self.timeline(length).parts
        reports = self._reports(length)
        totals = [part.live_bytes + math.ceil(r.extra_bytes) for part, r in zip(parts, reports, strict=True)]
        by_program: dict[str, int] = {}
        for part, total in zip(parts, totals, strict=True):
            by_program[part.name] = max(total, by_program.get(part.name, 0))
        most = int(np.argmax(totals))
        temp = math.ceil(reports[most].temp_bytes)
        compiled = self._compiler.known(self._target, parts[most]) is not None
        return Peak(totals[most], parts[most], temp, by_program, compiled)

    def _reports(self, length: int) -> list[Report]:
        known = ((part, self._compiler.known(self._target, part)) for part in self.timeline(length).parts)
        return [self._between(length, part) if report is None else report for part, report in known]

    def _between(self, length: int, part: Part) -> Report:
        known = sorted((n, knot[part.label]) for n, knot in self._knots.items() if part.label in knot)
        if not known:
            # a prompt shorter than a chunk has a program of its own name
            (report,) = self._compiler.submit(self._target, [part])
            return report.result()
        lengths = [n for n, _ in known]
        temps, results = ([getattr(r, name) for _, r in known] for name in ("temp_bytes", "result_bytes"))
        # scratch of a step of fixed size is a sum of constants and of arrays as long as the context; where one step reads the whole
        # prompt, lists of pages grow with its square until they are full
        between = _power if part.name == ONE_SHOT and min(temps) > 0 else _line
        return Report(between(length, lengths, temps), _line(length, lengths, results))

    def limit(self, budget: int) -> tuple[int | None, bool]:
        """Return the longest compiled context that fits into `budget` bytes, a multiple of STEP, 0 for none, and whether it is certain.

        None: memory does not grow with the context, so that positions end first.  Not certain: it moved with each of MORE_LIMITS
        compilations; it fits, and a longer one might.
        """
        most = (FAR - STEP) // STEP
        for _ in range(MORE_LIMITS):
            steps = _last_that_fits(lambda n: self.peak(n * STEP).bytes - budget, most)
            if steps == most:
                return None, True
            if steps == 0 or steps * STEP in self._knots:
                return steps * STEP, True
            self.compile(steps * STEP)
        return max((n for n in self._knots if n % STEP == 0 and self.peak(n).bytes <= budget), default=0), False

    def check_middle(self, low: int, high: int, seed: str) -> list[Check]:
        """Predict a random length between `low` and `high`, then compile it; try further lengths while the prediction is too far off."""
        chance = random.Random(seed)  # noqa: S311, no secret
        checks = []
        for _ in range(1 + MORE_POINTS):
            length = round(math.exp(chance.uniform(math.log(low), math.log(high))))
            if length in self._knots:
                continue
            predicted = self.peak(length)
            self.compile(length)
            compiled = self.peak(length)
            temp_error = abs(predicted.temp_bytes - compiled.temp_bytes) / max(compiled.temp_bytes, 1)
            checks.append(Check(length, temp_error, abs(predicted.bytes - compiled.bytes) / compiled.bytes))
            if checks[-1].holds:
                break
        return checks


def _last_that_fits(over: Callable[[int], float], most: int) -> int:
    """Return the largest n of 1 ... most with over(n) <= 0, 0 if there is none; `over` grows, nearly as a line."""
    low, high, over_low, over_high = 1, most, over(1), over(most)
    if over_low > 0:
        return 0
    if over_high <= 0:
        return most
    turn = 0
    while high - low > 1:
        # where a line through both would cross, its neighbour, and half way between so that it ends whatever the curve is
        cross = low + int(-over_low * (high - low) / (over_high - over_low))
        middle = min(max((cross, cross + 1, (low + high) // 2)[turn % 3], low + 1), high - 1)
        value, turn = over(middle), turn + 1
        if value <= 0:
            low, over_low = middle, value
        else:
            high, over_high = middle, value
    return low


def _power(x: int, xs: list[int], ys: list[float]) -> float:
    """Interpolate as `_line`, in logarithms."""
    return float(np.exp(_line(np.log(x), list(np.log(xs)), list(np.log(ys)))))


def _line(x: float, xs: Sequence[float], ys: list[float]) -> float:
    """Interpolate between the points; beyond them along the last two, never below 0."""
    if len(xs) == 1:
        return ys[0]
    if x < xs[0] or x > xs[-1]:
        i = 0 if x < xs[0] else len(xs) - 2
        slope = (ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i])
        return max(0.0, ys[i] + slope * (x - xs[i]))
    return float(np.interp(x, xs, ys))
