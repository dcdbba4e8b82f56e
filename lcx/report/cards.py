"""What a page says of each recipe: paper, choice on each axis, settings, exact limit.

Sources are read, never run: a sweep names the configs it was made from, and a config is code.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lcx.report.source import Source

PACKAGE = Path(__file__).parent.parent
LARGEST = 1 << 20  # bytes of a source that is looked into
AXES = ("patterns", "policies", "codecs", "schedules")
# what parsing a text from elsewhere can raise
BAD_SOURCE = (SyntaxError, ValueError, RecursionError, MemoryError)


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
    """One a method, in the sweep's order."""
    points: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for job, row in zip(source.jobs, source.rows, strict=True):
        spec = job.spec if isinstance(job.spec, Mapping) else {}
        points.setdefault(str(row["method"]), []).append((spec, row))
    return [_card(method, mine) for method, mine in points.items()]


def _card(method: str, points: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Card:
    specs = [spec for spec, _ in points]
    config = str(specs[0].get("config") or "")
    tree = _tree(_config_file(config))
    choices: dict[str, dict[str, list[int]]] = {}
    for spec, row in points:
        for axis, choice in [*axes_of(str(spec.get("recipe") or "")), ("schedule", row["schedule"] or "")]:
            if choice:
                choices.setdefault(axis, {}).setdefault(choice, []).append(row["length"] or 0)
    changes = specs[0].get("changes")
    settings = [
        (n, str(specs[0].get(n))) for n in ("budget", "keep_ratio", "chunk_size") if specs[0].get(n) is not None
    ]
    settings += [(f"config.{n}", str(v)) for n, v in changes.items()] if isinstance(changes, Mapping) else []
    return Card(
        method=method,
        config=config,
        about=" ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split()) if tree else "",
        axes=[(axis, _by_length(found)) for axis, found in choices.items()],
        settings=settings,
        paper=_paper(tree) if tree else [],
        exact=exact_limit(" ".join(str(spec.get("recipe") or "") for spec in specs)),
        statuses=Counter(str(row["status"]) for _, row in points),
    )


def _by_length(found: Mapping[str, Sequence[int]]) -> str:
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{choice} at {', '.join(f'{n:,}' for n in sorted(set(at)))}" for choice, at in found.items())


def axes_of(recipe: str) -> list[tuple[str, str]]:
    """(axis, choice) of a recipe's repr; the whole text as one choice where it cannot be read."""
    text = recipe[: recipe.rfind(")") + 1]
    try:
        call = ast.parse(text[:LARGEST], mode="eval").body
        if _name(call) != "Recipe":
            raise ValueError("not a recipe")
        found = [("pattern", ast.unparse(_field(call, "pattern") or ast.Constant("Causal()")))]
        for segment in (n for n in ast.walk(call) if _name(n) == "Segment"):
            name = ast.literal_eval(_field(segment, "name") or ast.Constant("all"))
            where = "" if name == "all" else f" of {name}"
            for axis in ("policy", "compress", "codec", "heads", "slots"):
                value = _field(segment, axis)
                text = "" if value is None else ast.unparse(value)
                if text not in ("", "None", "'all'"):
                    found.append((axis + where, text))
        return found
    except BAD_SOURCE:
        return [("recipe", recipe)] if recipe else []


def _name(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _field(call: ast.AST, name: str) -> ast.expr | None:
    keywords = call.keywords if isinstance(call, ast.Call) else []
    return next((k.value for k in keywords if k.arg == name), None)


def exact_limit(recipe: str) -> list[str]:
    """What the docstrings of a recipe's parts say of when they are exact."""
    known = _parts()
    found = []
    always = True
    for name in dict.fromkeys(re.findall(r"\b([A-Z]\w*)\(", recipe)):
        if name not in known:
            continue
        axis, said = known[name]
        if said == "Exact.":
            continue
        always = False
        if said:
            found.append(f"{name}: {said[0].lower()}{said[1:]}")
        elif axis == "codecs":
            found.append(f"{name}: not exact, values are rounded")
        elif re.search(rf"\b{name}\([^()]*\bbudget=", recipe):
            found.append(f"{name}: equal to dense while the budget covers the context (conformance suite)")
    if found:
        return found
    return ["always: every token is kept as it is, and read"] if always and "Recipe(" in recipe else ["not stated"]


@cache
def _parts() -> dict[str, tuple[str, str]]:
    """Class -> (axis, the sentence of its docstring that begins with Exact, or an empty text)."""
    found = {}
    for axis in AXES:
        for path in sorted((PACKAGE / axis).glob("*.py")):
            for node in ast.walk(_tree(path) or ast.Module([], [])):
                if isinstance(node, ast.ClassDef):
                    doc = " ".join((ast.get_docstring(node) or "").split())
                    said = re.search(r"(?:^|\. +)(Exact\b[^.]*\.)", doc)
                    found[node.name] = (axis, said.group(1) if said else "")
    # the parts that change nothing say so elsewhere
    return found | {"Exact": ("codecs", "Exact."), "OneShot": ("schedules", "Exact."), "Causal": ("patterns", "Exact.")}


def _config_file(name: str) -> Path:
    """Where a config lies: relative to the working folder, else to the checkout."""
    path = Path(name)
    try:
        return path if path.is_file() else PACKAGE.parent / path
    except (OSError, ValueError):
        return PACKAGE


def _tree(path: Path) -> ast.Module | None:
    """The parsed source; None where there is none, or one that is not Python."""
    try:
        if path.suffix != ".py" or not path.is_file() or path.stat().st_size > LARGEST:
            return None
        return ast.parse(path.read_text())
    except (OSError, *BAD_SOURCE):
        return None


def _paper(tree: ast.Module) -> list[tuple[str, Any]]:
    """The figures that a config gives as `paper=`, where they are literals."""
    names = {
        t.id: n.value for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
    }
    for value in _given(tree, "paper"):
        value = names.get(value.id, value) if isinstance(value, ast.Name) else value
        try:
            found = ast.literal_eval(value)
        except BAD_SOURCE:
            continue
        if isinstance(found, dict):
            return list(found.items())
    return []


def _given(tree: ast.Module, keyword: str) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        value = _field(node, keyword)
        if value is not None:
            yield value
