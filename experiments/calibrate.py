"""`python -m experiments.calibrate --model=NAME --out=FILE`: ranks the KV heads of a model for DuoAttention's head split."""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

from lcx.errors import UserError

_MODEL = flags.DEFINE_string("model", "smollm2-135m", "A name of lcx.pretrained, a GGUF file, a folder, or a hub id.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write, for HeadSplit(file=...).")
_TEXT = flags.DEFINE_string("text", "pride_and_prejudice", "A name of lcx.texts.")
_TOKENS = flags.DEFINE_integer("tokens", 4_096, "Tokens of the text that are read, from its beginning.")
_SINK = flags.DEFINE_integer("sink", 64, "First tokens that a streaming head keeps.")
_WINDOW = flags.DEFINE_integer("window", 256, "Most recent tokens that a streaming head keeps.")
_ACCEPT = flags.DEFINE_bool("accept_licence", False, "You agree to the licence of a model that asks for it.")


def _parse(argv: list[str]) -> list[str]:
    # absl prints its whole help for a wrong flag and exits with 1
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _refuse(" ".join(str(error).split()))
        raise


def _refuse(problem: str) -> None:
    print(f"calibrate: {problem}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        _refuse(f"argument {argv[1]!r}; allowed are flags only, as in --model={argv[1]}")
    if _OUT.value is None:
        _refuse("out=None; give a JSON file to write, as in --out=head_split.json")
    if not Path(_OUT.value).parent.is_dir():
        _refuse(f"out={_OUT.value!r}; its folder must exist")
    # imports after the flags, so that a wrong one is refused at once
    from lcx.measure import head_mass
    from lcx.pretrained import load_arrays

    try:
        checkpoint = load_arrays(_MODEL.value, accept_licence=_ACCEPT.value)
        record = head_mass.calibrate(checkpoint, _TEXT.value, _TOKENS.value, _SINK.value, _WINDOW.value)
        head_mass.write(record, _OUT.value)
    except UserError as error:
        _refuse(str(error))
    print(f"{_OUT.value}: {len(record['scores'])} x {len(record['scores'][0])} scores of {record['config_name']!r}")


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
