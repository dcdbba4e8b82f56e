"""`python -m lcx.pretrained --list`: the models that install offline, and whether they are installed."""

from __future__ import annotations

import sys

from absl import app, flags

from lcx.pretrained.registry import MODELS, is_installed

_LIST = flags.DEFINE_bool("list", False, "Print the models by name, with size, licence and origin.")


def table() -> str:
    """Return a table of the models, a line each."""
    rows = [("name", "parameters", "file bytes", "licence", "from", "installed")]
    for name, model in MODELS.items():
        installed = "yes" if is_installed(name) else f"no: {model.install}"
        rows.append((name, f"{model.num_params:,}", f"{model.num_bytes:,}", model.licence, model.origin, installed))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _parse(argv: list[str]) -> list[str]:
    # absl prints its whole help for a wrong flag and exits with 1
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _refuse(" ".join(str(error).split()))
        raise


def _refuse(problem: str) -> None:
    print(f"lcx.pretrained: {problem}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        _refuse(f"argument {argv[1]!r}; allowed is --list")
    if not _LIST.value:
        _refuse("nothing to do; allowed is --list")
    print(table())


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
