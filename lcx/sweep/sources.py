"""Sources of a method: what a row depends on beside its values, so that a changed method is a new point.

The classes of a recipe and what they import from outside of lcx, of Python and of the installed packages: the files of a user's method.
For classes of lcx its version and the class's own file count.
"""

from __future__ import annotations

import hashlib
import site
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lcx
from lcx.recipe import Recipe

LCX = Path(__file__).resolve().parents[1]


def source_files(recipe: Recipe) -> list[Path]:
    """Return the files that define the parts of a recipe, and the user's files that they import, sorted."""
    files: set[Path] = set()
    for _, _, part in recipe.parts():
        for kind in type(part).__mro__:
            for function in _functions(kind):
                _follow(function.__code__.co_filename, function.__globals__, files)
    return sorted(files)


def digest(recipe: Recipe) -> str:
    """Return the sha256 of lcx's version and of the sources of a recipe."""
    total = hashlib.sha256(lcx.__version__.encode())
    for path in source_files(recipe):
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def source_names(recipe: Recipe) -> dict[str, str]:
    """Return the name of each file -> the beginning of its sha256, for the line that says which one changed."""
    return {short(path): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in source_files(recipe)}


def short(path: Path) -> str:
    """Return a file's name as it is shown: inside lcx from its root, else without its folder."""
    return str(path.relative_to(LCX.parent)) if path.is_relative_to(LCX) else path.name


def _functions(kind: type) -> Iterator[types.FunctionType]:
    for value in vars(kind).values():
        inner = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
        if isinstance(inner, types.FunctionType):
            yield inner


def _follow(name: str, names: dict[str, Any], files: set[Path]) -> None:
    """Add a file, and those of a user's that its names come from."""
    path = Path(name)
    # a dataclass's own functions have no file
    if not path.is_file() or path.resolve() in files:
        return
    path = path.resolve()
    inside = path.is_relative_to(LCX)
    if not inside and _installed(path):
        return
    files.add(path)
    if inside:
        return
    for value in list(names.values()):
        module = (
            value if isinstance(value, types.ModuleType) else sys.modules.get(getattr(value, "__module__", "") or "")
        )
        file = getattr(module, "__file__", None)
        if file and not Path(file).resolve().is_relative_to(LCX):
            _follow(file, vars(module), files)


def _installed(path: Path) -> bool:
    """Return True for files of Python and of installed packages."""
    return any(path.is_relative_to(root) for root in _ROOTS)


_ROOTS = {
    Path(p).resolve()
    for p in (*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages())
    # the folder of scripts and data may be the root of everything
    if Path(p).name in ("site-packages", "dist-packages") or Path(p).name.startswith("python")
}
