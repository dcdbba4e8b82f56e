"""`python -m experiments.look --config=snapkv --text_file=F`: which tokens a method keeps of a text, by layer and KV head.

Prints the share by layer and the spans of one head as text, and writes a map of layers and positions.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from experiments import cli
from lcx.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    cli.define_flags()
    flags.DEFINE_string(
        "text_file", None, "UTF-8 text; the model's bos token is put in front where its tokenizer does so."
    )
    flags.DEFINE_integer("num_tokens", None, "Only this number of tokens of the text.", lower_bound=1)
    flags.DEFINE_integer(
        "new_tokens", 0, "Of these, the last ones that are read one by one, as in decode.", lower_bound=0
    )
    flags.DEFINE_integer("layer", None, "Layer whose spans are printed; the default is the middle one.", lower_bound=0)
    flags.DEFINE_integer("head", 0, "KV head whose spans are printed.", lower_bound=0)
    flags.DEFINE_string("out", "kept.png", "Where the map goes, PNG or SVG; empty: nowhere.")


def main() -> None:
    for name in ("config", "text_file"):
        if not getattr(FLAGS, name):
            raise UserError(f"{name}: missing; give --{name}=...")
    if FLAGS.out:
        if Path(FLAGS.out).suffix not in (".png", ".svg") or not Path(FLAGS.out).parent.is_dir():
            raise UserError(f"out={FLAGS.out!r}: allowed is a file ending in .png or .svg in a folder that exists")
        cli.check_writable("out", FLAGS.out)
    experiment = cli.experiment()
    cli.check_model_free(experiment)
    text = cli.read_text(FLAGS.text_file)
    model = cli.load(experiment)

    from lcx import checks
    from lcx.measure.kept import look

    layer = model.config.num_layers // 2 if FLAGS.layer is None else FLAGS.layer
    checks.whole("layer", layer, 0, model.config.num_layers - 1)
    checks.whole("head", FLAGS.head, 0, model.config.num_kv_heads - 1)
    ids = model.tokenizer.text_ids(text)
    if FLAGS.num_tokens is not None:
        if len(ids) < FLAGS.num_tokens:
            raise UserError(f"num_tokens={FLAGS.num_tokens}: the text has {len(ids)} tokens")
        ids = ids[: FLAGS.num_tokens]
    if FLAGS.new_tokens >= len(ids):
        raise UserError(
            f"new_tokens={FLAGS.new_tokens}: the text has {len(ids)} tokens, and at least one must be the prompt"
        )
    experiment = cli.with_budget(experiment, len(ids) - FLAGS.new_tokens)
    kept = look(model, experiment, ids, new_tokens=FLAGS.new_tokens, allow_extrapolation=FLAGS.allow_extrapolation)
    for line in [*kept.lines(), "", *kept.text(layer, FLAGS.head)]:
        print(line)
    if FLAGS.out:
        kept.save(
            FLAGS.out, f"{Path(FLAGS.config).stem}, {model.name}, {len(ids):,} tokens of {Path(FLAGS.text_file).name}"
        )
        print(f"\nmap: {FLAGS.out}")


if __name__ == "__main__":
    define_flags()
    cli.run("look", main)
