"""Times of a point, measured in turns with dense attention, so that what slows the machine slows both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from lcx.measure.latency import summary, timed
from lcx.session import Session
from lcx.sweep.points import Point
from lcx.sweep.schema import Row

UNSTEADY = 1.5  # p90 / p10 above which a time is called unsteady
BUSY = 1.5  # load for each core above which the machine is called busy


@dataclass
class Times:
    """Seconds of every repetition, by whom: "method", and "dense" where both were timed.

    Attributes:
      ttft, decode: name -> seconds of each.
      continuation: one step that reads the whole continuation, of the method.
      load: of the machine before, for each core; None where the system does not tell.
      alone: why dense attention was not timed in turns, in words; None where it was, or where the point is dense attention.
    """

    ttft: dict[str, list[float]] = field(default_factory=dict)
    decode: dict[str, list[float]] = field(default_factory=dict)
    continuation: float = 0.0
    load: float | None = None
    alone: str | None = None

    def columns(self, point: Point) -> Row:
        """Return the columns of time."""
        ttft, decode = summary(self.ttft["method"]), summary(self.decode["method"])
        row: Row = {"continuation_s": self.continuation, "warmups": point.settings.warmups, "load": self.load}
        for name, figures in (("ttft", ttft), ("decode", decode)):
            row |= {f"{name}_s": figures["median"], f"{name}_p10_s": figures["p10"], f"{name}_p90_s": figures["p90"]}
            row[f"{name}_n"] = figures["n"]
        row["prefill_tokens_per_s"] = point.batch * point.prompt / ttft["median"]
        if "dense" in self.ttft:
            row |= {
                "dense_ttft_s": summary(self.ttft["dense"])["median"],
                "dense_decode_s": summary(self.decode["dense"])["median"],
            }
        return row

    def notes(self) -> list[str]:
        """Return what makes the times doubtful, in words."""
        notes = [] if self.alone is None else [self.alone]
        for name, seconds in (("TTFT", self.ttft["method"]), ("decode", self.decode["method"])):
            spread = summary(seconds)["p90"] / summary(seconds)["p10"]
            if spread > UNSTEADY:
                notes.append(f"unsteady times: p90 of {name} is {spread:.1f} times its p10")
        if self.load is not None and self.load > BUSY:
            notes.append(f"busy machine: load {self.load:.1f} a core before the times")
        return notes


def measure(sessions: Mapping[str, Session], ids, point: Point, alone: str | None) -> Times:
    """Time prefills and decode steps of sessions in turns: the first of one, the first of the other, the second of one, ...

    Args:
      sessions: name -> session; their programs are compiled.
      ids: int [B,text_tokens], one batch of passages.
      point: sizes and counts.
      alone: see `Times`.
    """
    settings, prompt, end = point.settings, point.prompt, point.length
    times = Times(load=_load(), alone=alone)
    for i in range(settings.warmups + settings.repeats):
        for name, session in sessions.items():
            session.reset()
            _, seconds = timed(lambda s=session: s.prefill(ids[:, :prompt]))
            if i >= settings.warmups:
                times.ttft.setdefault(name, []).append(seconds)
    for name, session in sessions.items():
        _, seconds = timed(lambda s=session: s.step(ids[:, prompt:end], rows="all"))
        if name == "method":
            times.continuation = seconds
    steps = range(end, point.text_tokens - 1)
    for i, t in enumerate(steps):
        for name, session in sessions.items():
            _, seconds = timed(lambda s=session, t=t: s.step(ids[:, t : t + 1]))
            if i >= len(steps) - settings.decode_steps:
                times.decode.setdefault(name, []).append(seconds)
    for session in sessions.values():
        session.reset()
    return times


def _load() -> float | None:
    """Return the load of the last minute for each core; None where the system has no such number."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (OSError, AttributeError):
        return None
