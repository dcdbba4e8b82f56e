"""Scores of the tasks of --tasks as tables: one for each context length, a line a task, a column a method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lcx.sweep.schema import Row

COUNTS = ("samples", "cut")  # beside a task's scores
PERPLEXITIES = ("ppl", "longppl")  # lower is better; the others are 0 to 100


@dataclass(frozen=True)
class ScoreTable:
    """Scores at one context length.

    Attributes:
      title: length, and what else the rows share where a sweep has several of it.
      methods: the columns.
      lines: (task, score of each method or None).
      messages: (method, task, why it has no score).
    """

    title: str
    methods: list[str]
    lines: list[tuple[str, list[float | None]]]
    messages: list[tuple[str, str, str]]


def flat(tasks: Any) -> dict[str, float]:
    """Return task -> score: RULER's mean and its 13, the mean of the needle grid; values that are not numbers are left out."""
    values: dict[str, float] = {}
    for name, value in tasks.items() if isinstance(tasks, dict) else ():
        if isinstance(value, dict) and "scores" in value:
            cells = [x for line in _list(value["scores"]) for x in _list(line)]
            if cells and all(map(_is_number, cells)):
                values[f"{name}, mean of {len(cells)} depths"] = sum(cells) / len(cells)
        elif isinstance(value, dict):
            parts = [(k, v) for k, v in value.items() if _is_number(v) and k not in COUNTS]
            values |= {f"{name} {k}": float(v) for k, v in sorted(parts, key=lambda part: part[0] != "mean")}
        elif _is_number(value):
            values[str(name)] = float(value)
    return values


def score_tables(rows: Sequence[Row]) -> list[ScoreTable]:
    """Return the tables of all points that have scores, seeds averaged; points of one model, dtype, batch and length share one."""
    several = [n for n in ("model", "dtype", "batch") if len({r[n] for r in rows}) > 1]
    groups: dict[tuple, list[Row]] = {}
    for r in rows:
        if isinstance(r["tasks"], dict):
            groups.setdefault((r["length"], *(r[n] for n in several)), []).append(r)
    tables = []
    for (length, *rest), group in groups.items():
        by_task: dict[str, dict[str, list[float]]] = {}
        methods = list(dict.fromkeys(str(r["method"]) for r in group))
        for r in group:
            for task, score in flat(r["tasks"]).items():
                by_task.setdefault(task, {}).setdefault(str(r["method"]), []).append(score)
        lines = [(task, [_mean(by.get(method)) for method in methods]) for task, by in by_task.items()]
        messages = [
            (str(r["method"]), str(task), str(value["message"]))
            for r in group
            for task, value in r["tasks"].items()
            if isinstance(value, dict) and "message" in value
        ]
        title = ", ".join([f"{length:,} tokens", *map(str, rest)])
        tables.append(ScoreTable(title, methods, lines, list(dict.fromkeys(messages))))
    return tables


def score_text(task: str, score: float | None) -> str:
    """Format a score: whole, or with three decimals for a perplexity."""
    if score is None:
        return "-"
    return f"{score:.3f}" if task in PERPLEXITIES else f"{score:.1f}"


def _mean(scores: list[float] | None) -> float | None:
    return sum(scores) / len(scores) if scores else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
