"""Configs: Python files whose `get_config()` returns an `Experiment` or a `Sweep`, and changes to their fields by name.

A config is code and runs when it is read.  ml_collections' config_flags has the same syntax for changes, but sets attributes, which
frozen dataclasses refuse; these are static arguments of jit and must be frozen.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcx.config_errors import config_error
from lcx.errors import UserError, nearest
from lcx.experiment import Experiment, Sweep

ROOT = Path(__file__).parent.parent  # the checkout, or the folder that lcx is installed in
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def full_name(name: str) -> str:
    """Return configs/NAME.py for a NAME alone that such a file has; every other text as it is."""
    if not name.isidentifier():
        return name
    path = f"configs/{name}.py"
    return path if any((base / path).is_file() for base in (Path(), ROOT)) else name


def config_path(name: str) -> Path:
    """Return the path of a config: relative to the working folder, else to the checkout; `snapkv` is configs/snapkv.py.

    Raises:
      UserError: there is no such file; names the nearest.
    """
    name = full_name(name)
    for path in (Path(name), ROOT / name):
        if path.suffix == ".py" and path.is_file():
            return path
    folder = Path(name).parent
    known = sorted(
        {str(folder / p.name) for base in (folder, ROOT / folder) for p in base.glob("*.py") if p.name[0] != "_"}
    )
    hint = nearest(name, known) or nearest(
        f"configs/{Path(name).stem}.py", known := known or [str(Path("configs") / p.name) for p in all_configs()]
    )
    raise UserError(
        f"config={name!r}: no such config; allowed is a .py file such as {', '.join(known[:3]) or 'configs/dense.py'}{hint}"
    )


def all_configs() -> list[Path]:
    """Return the configs of the checkout."""
    return sorted(p for p in (ROOT / "configs").glob("*.py") if p.name[0] != "_")


def load_config(name: str | Path, changes: Mapping[str, str] | None = None) -> Experiment | Sweep:
    """Run a config file and apply changes to what it returns.

    Args:
      name: path of the file, such as configs/kivi2.py, or kivi2 alone for a file of configs/.
      changes: dotted field -> text, such as {"recipe.segments.0.policy.window": "512"}.

    Raises:
      UserError: no such file, a file that fails (the line has its line number and what is allowed; the cause is the exception itself) or
        returns something else, or a field or value that is not allowed.
    """
    path = config_path(str(name))
    spec = importlib.util.spec_from_file_location(f"lcx_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config={str(name)!r} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(f"config={str(name)!r} has no function get_config()")
        config = module.get_config()
    # a config is a user's code: whatever it raises, the user needs the line, and the exception stays as the cause
    except Exception as error:
        raise config_error(path, error) from error
    if not isinstance(config, (Experiment, Sweep)):
        raise UserError(f"config={str(name)!r} returns a {type(config).__name__}; allowed are Experiment and Sweep")
    if isinstance(config, Experiment) and not config.about:
        config = dataclasses.replace(config, about=" ".join((module.__doc__ or "").split("\n\n")[0].split()))
    for key, text in (changes or {}).items():
        config = change(config, key, text)
    return config


def change(value: Any, key: str, text: str, done: str = "config") -> Any:
    """Return `value` with the field at the dotted `key` set to `text`, read in the type of the field.

    Raises:
      UserError: no such field (names the nearest), or a text that the field cannot take.
    """
    head, _, rest = key.partition(".")
    where = f"{done}.{head}"
    if isinstance(value, tuple):
        if not head.isdigit() or int(head) >= len(value):
            raise UserError(f"{where}: no such entry; allowed are 0 to {len(value) - 1}")
        if not rest:
            raise UserError(
                f"{where}={text!r}: {type(value[int(head)]).__name__} is set by its fields, such as {where}.{_fields(value[int(head)])[0]}"
            )
        inner = change(value[int(head)], rest, text, where)
        return value[: int(head)] + (inner,) + value[int(head) + 1 :]
    names = _fields(value)
    if head not in names:
        raise UserError(
            f"{where}: {type(value).__name__} has no such field; allowed are {', '.join(names) or 'none'}{nearest(head, names)}"
        )
    old = getattr(value, head)
    if rest:
        if not (dataclasses.is_dataclass(old) or isinstance(old, tuple)):
            raise UserError(f"{where}={old!r} has no fields; set it whole: --{where}=VALUE")
        return dataclasses.replace(value, **{head: change(old, rest, text, where)})
    return dataclasses.replace(value, **{head: parse(text, typing.get_type_hints(type(value))[head], where)})


def _fields(value) -> list[str]:
    return [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []


def parse(text: str, kind, where: str):
    """Read a text as int, float, bool, str, None or a tuple of them, by the field's type."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        try:
            return _parse_one(text, option)
        except ValueError:
            continue
    allowed = " or ".join(str(getattr(o, "__name__", o)) for o in options)
    if not any(o in (int, float, bool, str, type(None)) or typing.get_origin(o) is tuple for o in options):
        raise UserError(f"{where}={text!r}: a {allowed} is not set whole from the command line; set one of its fields")
    raise UserError(f"{where}={text!r}: allowed is {allowed.replace('NoneType', 'None')}")


def _parse_one(text: str, kind):
    if kind is type(None) and text.lower() == "none":
        return None
    if kind is bool and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[0] in (int, float, str):
        return tuple(
            _parse_one(part.strip(), typing.get_args(kind)[0]) for part in text.strip("()").split(",") if part.strip()
        )
    raise ValueError(text)
