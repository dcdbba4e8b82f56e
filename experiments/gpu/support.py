"""Test support that dry runs use: the interpreter with its gaps filled, and the compiler's reports.  Needs a checkout."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from lcx.errors import UserError

TESTS = Path(__file__).parent.parent.parent / "tests"


@cache
def from_tests(name: str) -> Any:
    """A module of tests/, loaded from its file."""
    path = TESTS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UserError(f"dry_run: tests/{path.name} is not beside the package; run it in a checkout")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
