"""Cards of a page: paper, choice on each axis, settings and exact limit of each recipe.

Everything comes from the point's spec, where the sweep has put it as data (`Recipe.describe`): no config is read or run.  A spec of an
older sweep has no such data; its card shows the recipe as one text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcx.report.source import Source


@dataclass(frozen=True)
class Card:
    """A recipe.

    Attributes:
      method: name.
      config: its path.
      about: first paragraph of the config's docstring, or an empty text.
      axes: (axis, choice); where the choice differs between points, with the lengths.
      settings: (name, value) of what its points were run with.
      paper: (name, figure) that the config quotes.
      exact: when it equals dense attention, part by part.
      statuses: status -> number of points.
    """

    method: str
    config: str
    about: str
    axes: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    paper: list[tuple[str, Any]]
    exact: list[str]
    statuses: Counter


def cards(source: Source) -> list[Card]:
    """Return one card a method, in the sweep's order."""
    points: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for job, row in zip(source.jobs, source.rows, strict=True):
        spec = job.spec if isinstance(job.spec, Mapping) else {}
        points.setdefault(str(row["method"]), []).append((spec, row))
    return [_card(method, mine) for method, mine in points.items()]


def _card(method: str, points: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Card:
    specs = [spec for spec, _ in points]
    choices: dict[str, dict[str, list[int]]] = {}
    exact: dict[str, None] = {}
    for spec, row in points:
        for axis, choice, limit in [*choices_of(spec), ("schedule", str(row["schedule"] or ""), "")]:
            if choice:
                choices.setdefault(axis, {}).setdefault(choice, []).append(row["length"] or 0)
            if limit:
                exact[limit] = None
    first, stated = specs[0], _mapping(specs[0].get("card"))
    settings = [(n, str(first.get(n))) for n in ("budget", "keep_ratio", "chunk_size") if first.get(n) is not None]
    settings += [(f"config.{n}", str(v)) for n, v in _mapping(first.get("changes")).items()]
    return Card(
        method=method,
        config=str(first.get("config") or ""),
        about=str(stated.get("about") or ""),
        axes=[(axis, _by_length(variants)) for axis, variants in choices.items()],
        settings=settings,
        paper=list(_mapping(stated.get("paper")).items()),
        exact=list(exact) or ["not stated"],
        statuses=Counter(str(row["status"]) for _, row in points),
    )


def choices_of(spec: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Return (axis, choice with its settings, exact limit) for each choice of a point's recipe."""
    stated = _mapping(spec.get("card")).get("choices")
    if not isinstance(stated, Sequence) or isinstance(stated, str):
        yield "recipe", str(spec.get("recipe") or ""), ""
        return
    for choice in map(_mapping, stated):
        name = str(choice.get("name") or "")
        settings = ", ".join(f"{n}={v}" for n, v in _mapping(choice.get("settings")).items())
        heads = str(choice.get("axis") or "").startswith("heads")
        limit = str(choice.get("exact") or "")
        limit = f"{name}: {limit[0].lower()}{limit[1:]}" if limit else ""
        yield str(choice.get("axis") or "?"), name if heads else f"{name}({settings})", limit


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return the value where it is a mapping, else an empty one; specs come from a file, in which anything may be."""
    return value if isinstance(value, Mapping) else {}


def _by_length(variants: Mapping[str, Sequence[int]]) -> str:
    if len(variants) == 1:
        return next(iter(variants))
    return "; ".join(f"{choice} at {', '.join(f'{n:,}' for n in sorted(set(at)))}" for choice, at in variants.items())
