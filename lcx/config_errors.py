"""One line for whatever goes wrong in a config file: the file, the line, the error, and what is allowed."""

from __future__ import annotations

import inspect
import os
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcx.errors import UserError, nearest
from lcx.tracebacks import place, shown

# "KNorm.__init__() got an unexpected keyword argument 'bugdet'", "chain() missing 1 required positional argument: 'bits'"
_CALL = re.compile(r"^([\w.<>]+)\(\) (?:got|missing|takes)\b")
_KEYWORD = re.compile(r"unexpected keyword argument '(\w+)'")


def config_error(path: Path, error: Exception) -> UserError:
    """Return the error of a config file as one line with the file's line number.

    Args:
      path: of the config file.
      error: raised while the file was imported, or by its `get_config()`.
    """
    where, frame = _where(path, error)
    if isinstance(error, UserError):
        return type(error)(f"{where}: {error}")
    if isinstance(error, SyntaxError):
        source = f": {error.text.strip()}" if error.text else ""
        return UserError(
            f"{where}: {type(error).__name__}: {error.msg}{source}; allowed is a file that Python can import"
        )
    text = " ".join(str(error).split())
    allowed = _allowed(text, frame) or "allowed is a file whose get_config() returns an Experiment or a Sweep"
    deeper = place(error)
    inside = "" if deeper is None or deeper == where.removeprefix("config ") else f" (raised at {deeper})"
    return UserError(f"{where}: {type(error).__name__}: {text}{inside}; {allowed}")


def _where(path: Path, error: Exception) -> tuple[str, types.FrameType | None]:
    """Return `config FILE:LINE` and the frame of the config's own file that the error passed through last."""
    name = shown(str(path))
    if isinstance(error, SyntaxError) and error.filename is not None:
        # it may be in a module that the config imports
        return f"config {shown(error.filename)}:{error.lineno}", None
    line, frame, step = None, None, error.__traceback__
    while step is not None:
        if os.path.abspath(step.tb_frame.f_code.co_filename) == os.path.abspath(path):
            line, frame = step.tb_lineno, step.tb_frame
        step = step.tb_next
    return (f"config {name}" if line is None else f"config {name}:{line}"), frame


def _allowed(text: str, frame: types.FrameType | None) -> str:
    """Return the arguments that a call takes, where the error is that of a call with others; else nothing."""
    call = _CALL.match(text)
    if call is None or frame is None:
        return ""
    name = call[1].removesuffix(".__init__").removesuffix(".__new__").rpartition(".")[2]
    for value in _named(name, frame):
        try:
            names = [name for name in inspect.signature(value).parameters if name != "self"]
        except (TypeError, ValueError):
            # a builtin that states no signature
            continue
        keyword = _KEYWORD.search(text)
        hint = nearest(keyword[1], names) if keyword else ""
        return f"allowed are {', '.join(names) or 'no arguments'}{hint}"
    return ""


def _named(name: str, frame: types.FrameType) -> Iterator[Any]:
    """Yield what is called `name` for the code of a frame: in its names, or in the modules among them."""
    values = {**frame.f_globals, **frame.f_locals}.values()
    modules = [value for value in values if isinstance(value, types.ModuleType)]
    for value in [*values, *(getattr(module, name, None) for module in modules)]:
        if callable(value) and getattr(value, "__name__", None) == name:
            yield value
