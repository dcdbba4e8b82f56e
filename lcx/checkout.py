"""The git checkout that lcx lies in."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any


def git(*words: str) -> str | None:
    """Return the output of a git command in the checkout; None outside one, or where git is not installed."""
    try:
        done = subprocess.run(  # noqa: S603, words of this package
            ["git", *words],  # noqa: S607
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def revision() -> dict[str, Any] | None:
    """Return the revision and whether files differ from it; None outside a checkout."""
    name = git("rev-parse", "HEAD")
    return None if name is None else {"revision": name, "dirty": bool(git("status", "--porcelain"))}
