"""Places in a user's own files that an exception passed through."""

from __future__ import annotations

import os
import site
import sysconfig
import traceback
from pathlib import Path

# frames of the library, of installed packages and of Python itself tell a user nothing that the message does not
_LIBRARY = Path(__file__).resolve().parent
_INSTALLED = {Path(p).resolve() for p in (*sysconfig.get_paths().values(), *site.getsitepackages()) if p}


def _is_own(filename: str) -> bool:
    """Return True for a file that is neither of lcx, nor of an installed package, nor generated."""
    if filename.startswith("<"):
        return False
    folders = Path(filename).resolve().parents
    # a checkout may lie in a virtual environment's folder, and lcx in site-packages
    return _LIBRARY not in folders and not any(folder in _INSTALLED for folder in folders)


def frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of the user's own files that the exception passed through, the deepest last."""
    return [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]


def shown(filename: str) -> str:
    """Return a path relative to the working folder where it lies inside of it."""
    path = Path(os.path.abspath(filename))
    return str(path.relative_to(Path.cwd())) if Path.cwd() in path.parents else str(path)


def place(error: BaseException) -> str | None:
    """Return `file:line` of the deepest frame outside of lcx and of installed packages; None where there is no such frame."""
    own = frames(error)
    return f"{shown(own[-1].filename)}:{own[-1].lineno}" if own else None
