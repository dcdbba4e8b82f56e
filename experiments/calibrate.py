"""`python -m experiments.calibrate --model=NAME --out=FILE`: ranks a model's KV heads for DuoAttention's split."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from experiments import cli
from lcx.errors import UserError

_MODEL = flags.DEFINE_string("model", "smollm2-135m", "A name of lcx.pretrained, a GGUF file, a folder or a hub id.")
_OUT = flags.DEFINE_string("out", "", "JSON file to write, for HeadSplit(file=...).")
_TEXT = flags.DEFINE_string("text", "pride_and_prejudice", "A name of lcx.texts.")
_TOKENS = flags.DEFINE_integer("tokens", 4_096, "Tokens of the text that are read, from its beginning.")
_SINK = flags.DEFINE_integer("sink", 64, "First tokens that a streaming head keeps.")
_WINDOW = flags.DEFINE_integer("window", 256, "Most recent tokens that a streaming head keeps.")
_ACCEPT = flags.DEFINE_bool("accept_licence", False, "You agree to the licence of a model that asks for it (Gemma).")


def main() -> None:
    if not _OUT.value or not Path(_OUT.value).parent.is_dir():
        raise UserError(f"out={_OUT.value!r}; allowed is a JSON file in a folder that exists: --out=head_split.json")
    cli.check_writable("out", _OUT.value)
    # what follows imports jax, which a wrong flag need not wait for
    from lcx.artefacts import head_mass
    from lcx.models.loading import load

    model = load(_MODEL.value, accept_licence=_ACCEPT.value)
    record = head_mass.calibrate(model, _TEXT.value, _TOKENS.value, _SINK.value, _WINDOW.value)
    head_mass.write(record, _OUT.value)
    print(f"{_OUT.value}: scores of {len(record['scores'])} layers x {len(record['scores'][0])} KV heads")


if __name__ == "__main__":
    cli.run("calibrate", main)
