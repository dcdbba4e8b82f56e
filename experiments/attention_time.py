"""Time the attention part of a prefill under a pattern of blocks and under dense attention, on real queries and keys of one layer.

    python -m experiments.attention_time --config=configs/xattention.py --length=16384 --layers=5,15 --density=0.08,0.12

The pattern's `tau` is set so that its density, the share of the causal blocks that are read, lies in the given range; ranking the blocks is
part of the time.  One line a layer: density, seconds (median) of both, and their ratio.
"""

from __future__ import annotations

import numpy as np
from absl import flags

from experiments import cli, parsers
from lcx.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    cli.define_flags()
    flags.DEFINE_integer("length", 16_384, "Tokens of the text.", lower_bound=1)
    flags.DEFINE_string("layers", "15", "Layers, from 0, with commas between.")
    flags.DEFINE_string("density", "0.08,0.12", "Least and largest share of the causal blocks.")
    flags.DEFINE_integer("repeats", 3, "Runs of each that are timed, in turns.", lower_bound=1)
    flags.DEFINE_string("text", "pride_and_prejudice", "A text that lcx ships.")


def main() -> None:
    experiment = cli.experiment()
    pattern = experiment.recipe.pattern
    if not hasattr(pattern, "tau") or experiment.recipe.pattern.visits != ("held", "own"):
        raise UserError(
            f"config={FLAGS.config!r}: allowed is a config whose pattern lists blocks by a share tau, such as xattention"
        )
    layers = parsers.whole_numbers("layers", FLAGS.layers, 0)
    try:
        low, high = (float(part) for part in FLAGS.density.split(","))
    except ValueError:
        raise UserError(
            f"density={FLAGS.density!r}: allowed are two shares with a comma between, such as 0.08,0.12"
        ) from None

    from lcx import texts
    from lcx.measure.attention_part import Prompt, compare, tau_of

    model = cli.load(experiment)
    size = experiment.schedule.width(FLAGS.length)
    ids = model.tokenizer.text_ids(texts.read(FLAGS.text))[: FLAGS.length]
    if len(ids) < FLAGS.length:
        raise UserError(f"length={FLAGS.length}: text {FLAGS.text!r} has {len(ids)} tokens")
    for layer in layers:
        prompt = Prompt(model.layers, ids, layer, size)
        chosen, density = tau_of(prompt, pattern, low, high)
        part = compare(prompt, chosen, density, FLAGS.repeats)
        dense, method = (float(np.median(part.seconds[name])) for name in ("dense", "method"))
        print(
            f"layer {layer}: {FLAGS.length:,} tokens in steps of {size:,}, tau {chosen.tau:.3f} reads {density:.1%} of the causal blocks; "
            f"dense {dense:.2f} s, method {method:.2f} s, ratio {part.ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    define_flags()
    cli.run("attention_time", main)
