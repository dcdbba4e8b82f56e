"""Rankings of methods by what they lose to dense attention, as far as the errors carry them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcx.measure.paired import apart
from lcx.sweep.schema import Row
from lcx.text import number

CELL = ("model", "dtype", "batch", "text", "length")
SIGMAS = 2.0

Loss = tuple[float, float | None]


def rankings(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (text at length, ranking) for each cell with two methods or more: `int4 < quest < snapkv, h2o`.

    Losses are NLL - dense's of the first protocol, a mean over seeds with their joint standard error.  `<` stands where each method before
    it loses less than each after it by more than `SIGMAS` of their joint error, that of independent losses; a comma where that is not so.
    """
    cells: dict[tuple, dict[str, list[Loss]]] = {}
    several = [n for n in CELL if len({r[n] for r in rows}) > 1 and n not in ("text", "length")]
    for r in rows:
        if r["status"] == "ok" and r["nll_minus_dense"] is not None:
            share = "" if r["keep_ratio"] is None else f" {number(r['keep_ratio'], '.2g')}"
            losses = cells.setdefault(tuple(r[n] for n in CELL), {})
            losses.setdefault(f"{r['method']}{share}", []).append((r["nll_minus_dense"], r["nll_minus_dense_se"]))
    orders = []
    for cell, losses in cells.items():
        place = dict(zip(CELL, cell, strict=True))
        if len(losses) > 1:
            title = " ".join([str(place["text"]), *(str(place[n]) for n in several), f"at {place['length']:,} tokens"])
            groups = grouped({name: joint(values) for name, values in losses.items()})
            orders.append((title, " < ".join(", ".join(group) for group in groups)))
    return orders


def joint(losses: Sequence[Loss]) -> Loss:
    """Return the mean over seeds and its standard error; None where one is not known."""
    errors = [error for _, error in losses if error is not None]
    mean = float(np.mean([value for value, _ in losses]))
    if len(errors) < len(losses):
        return mean, None
    return mean, float(np.sqrt(np.sum(np.square(errors)))) / len(errors)


def grouped(losses: dict[str, Loss]) -> list[list[str]]:
    """Return the methods, least loss first, split wherever all before lie apart from all after."""
    names = sorted(losses, key=lambda name: losses[name][0])
    groups: list[list[str]] = []
    for i, name in enumerate(names):
        if i and all(apart(losses[a], losses[b], SIGMAS) for a in names[:i] for b in names[i:]):
            groups.append([name])
        elif groups:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups
