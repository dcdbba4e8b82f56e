"""`python -m experiments.calibrate --method=NAME --model=NAME --out=FILE`: arrays that a method needs of a model, from a text.

head_split (default) ranks KV heads for DuoAttention's split; kvquant finds KVQuant's key ranges and codebooks.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from experiments import cli
from lcx.errors import UserError

METHODS = ("head_split", "kvquant")

_METHOD = flags.DEFINE_enum("method", METHODS[0], METHODS, "What is calibrated.")
_MODEL = flags.DEFINE_string("model", "smollm2-135m", "A name of lcx.pretrained, a GGUF file, a folder or a hub id.")
_OUT = flags.DEFINE_string(
    "out", "", "File to write: JSON for HeadSplit(file=...), safetensors for KVQuantTables(file=...)."
)
_TEXT = flags.DEFINE_string(
    "text", "pride_and_prejudice", "A name of lcx.texts; kvquant: or several with commas between."
)
_TOKENS = flags.DEFINE_integer(
    "tokens",
    None,
    "Tokens of the text that are read, from its beginning or --start; head_split: 1,100, kvquant: 16,384.",
)
_START = flags.DEFINE_integer("start", 0, "head_split: token of the text at which the passage begins.")
_COPIES = flags.DEFINE_integer(
    "copies",
    2,
    "head_split: times that the passage is read; the queries of the later copies count.  1: all of plain text.",
)
_SINK = flags.DEFINE_integer("sink", 64, "head_split: first tokens that a streaming head keeps.")
_WINDOW = flags.DEFINE_integer("window", 256, "head_split: most recent tokens that a streaming head keeps.")
_PIECE = flags.DEFINE_integer("piece", 1_024, "kvquant: tokens that are one text of the calibration.")
_OUTLIERS = flags.DEFINE_float("outliers", 0.01, "kvquant: share of entries outside the ranges.")
_FISHER = flags.DEFINE_bool("fisher_only", False, "kvquant: k-means without the squared range, as the authors' code.")
_ACCEPT = flags.DEFINE_bool("accept_licence", False, "You agree to the licence of a model that asks for it (Gemma).")


def head_split(model) -> None:
    from lcx.artefacts import head_mass

    tokens = 1_100 if _TOKENS.value is None else _TOKENS.value
    sizes = (tokens, _SINK.value, _WINDOW.value, _START.value, _COPIES.value)
    record = head_mass.calibrate(model, _TEXT.value, *sizes)
    head_mass.write(record, _OUT.value)
    print(f"{_OUT.value}: scores of {len(record['scores'])} layers x {len(record['scores'][0])} KV heads")


def kvquant(model) -> None:
    from lcx.artefacts import kvquant, store

    tokens = 16_384 if _TOKENS.value is None else _TOKENS.value
    weight = kvquant.WEIGHTS[1 if _FISHER.value else 0]
    settings = kvquant.Settings(tokens, _PIECE.value, _OUTLIERS.value, weight)
    named = {"method": "kvquant", "model": model.name, "text": _TEXT.value, "tokens": tokens, "piece": settings.piece}
    named |= {"outliers": settings.outliers, "fisher_only": _FISHER.value}
    command = " ".join(["python -m experiments.calibrate", *(f"--{n}={v}" for n, v in named.items())])
    note = lambda text: print(text, file=sys.stderr, flush=True)
    arrays, record = kvquant.calibrate(model, _TEXT.value, settings, command, note)
    size = store.write(_OUT.value, arrays, record)
    print(f"{_OUT.value}: key ranges and codebooks of {model.config.num_layers} layers, {size:,} bytes")


def main() -> None:
    if not _OUT.value or not Path(_OUT.value).parent.is_dir():
        name = "head_split.json" if _METHOD.value == "head_split" else "kvquant.safetensors"
        kind = "JSON" if _METHOD.value == "head_split" else "safetensors"
        raise UserError(f"out={_OUT.value!r}; allowed is a {kind} file in a folder that exists: --out={name}")
    cli.check_writable("out", _OUT.value)
    # what follows imports jax, which a wrong flag need not wait for
    from lcx.models.loading import load

    {"head_split": head_split, "kvquant": kvquant}[_METHOD.value](load(_MODEL.value, accept_licence=_ACCEPT.value))


if __name__ == "__main__":
    cli.run("calibrate", main)
