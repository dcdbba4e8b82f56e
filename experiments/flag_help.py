"""Text of --help: the flags that commands share above a command's own, without absl's."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator

from absl import flags

# in the order in which they are shown
SHARED = ("config", "model", "budget", "keep_ratio", "dtype", "chunk_size", "implementation")
SHARED += ("allow_extrapolation", "accept_licence")
COLUMN = 28  # where the words begin
VALUES = {"string": "TEXT", "int": "N", "float": "X"}


def text(name: str) -> str:
    """Return the help of the command `name`, whose flags are defined."""
    known = dict(_flags())
    shared = [known.pop(flag) for flag in SHARED if flag in known]
    parts = [_about(name)]
    for title, group in (("Flags that commands share:", shared), (f"Flags of {name}:", list(known.values()))):
        if group:
            parts.append("\n".join([title, *(_entry(flag) for flag in group)]))
    return "\n\n".join([*parts, "--helpfull shows those of the libraries too."])


def _flags() -> Iterator[tuple[str, flags.Flag]]:
    """Yield the flags that this command and `cli` define, in the order in which each module defines them."""
    by_module = flags.FLAGS.flags_by_module_dict()
    for module in sorted(by_module, key=lambda m: m != "experiments.cli"):
        # a module that runs as the program is called by its file
        if module.startswith("experiments.") or module == sys.argv[0]:
            yield from ((flag.name, flag) for flag in by_module[module])


def _about(name: str) -> str:
    """Return the docstring of the command."""
    module = sys.modules.get(f"experiments.{name}") or sys.modules["__main__"]
    return (module.__doc__ or name).strip()


def _entry(flag: flags.Flag) -> str:
    """Return one flag with its values, its words and its default."""
    allowed = getattr(flag.parser, "enum_values", None)
    if flag.boolean:
        head = f"  --[no]{flag.name}"
    else:
        head = f"  --{flag.name}={'|'.join(allowed) if allowed else VALUES.get(flag.flag_type(), 'TEXT')}"
    words = " ".join((flag.help or "").split())
    if allowed:
        # absl puts them in front of the words
        words = words.removeprefix(f"<{'|'.join(allowed)}>: ")
    if flag.default not in (None, "", False):
        words += f"  Default: {flag.default if not flag.boolean else 'on'}."
    width = min(max(shutil.get_terminal_size().columns, 60), 120)
    lines = textwrap.wrap(words, width - COLUMN, break_on_hyphens=False, break_long_words=False) or [""]
    indent = " " * COLUMN
    # a head that reaches into the words has a line of its own
    first = [f"{head:<{COLUMN}}{lines[0]}"] if len(head) < COLUMN - 1 else [head, indent + lines[0]]
    return "\n".join([*first, *(indent + line for line in lines[1:])])
