"""`python -m experiments.ask --config=snapkv --context_file=F --question=Q [--question=Q]`: answers from a context that is read once.

Each method of --config (several with commas between) reads the context, compresses it, and answers every question from it; dense attention
is asked beside them.  One line a method says what reading it took, one line a question gives the answer.
"""

from __future__ import annotations

from absl import flags

from experiments import cli
from lcx.errors import UserError
from lcx.text import MIB, visible

FLAGS = flags.FLAGS


def define_flags() -> None:
    cli.define_flags("configs/dense.py")
    flags.DEFINE_string("context_file", None, "UTF-8 text that is read.")
    flags.DEFINE_multi_string("question", [], "A question about it; the flag may be given several times.")
    flags.DEFINE_string(
        "template", r"\n\nQuestion: {question}\nAnswer:", r"What follows the context; \n is a line's end."
    )
    flags.DEFINE_integer("num_tokens", 32, "Tokens of an answer at most.", lower_bound=1)


def main() -> None:
    if not FLAGS.context_file or not FLAGS.question:
        raise UserError("context_file and question: give --context_file=F and at least one --question=...")
    from lcx.config_files import load_config
    from lcx.experiment import Experiment

    text = cli.read_text(FLAGS.context_file)
    names = [name.strip() for name in FLAGS.config.split(",")]
    methods = {}
    for name in names if "configs/dense.py" in names else ["configs/dense.py", *names]:
        config = load_config(name, cli.changes() if name in names else None)
        if not isinstance(config, Experiment):
            raise UserError(f"config={name!r} is a sweep; allowed here are configs of one method")
        methods[name] = config if FLAGS.chunk_size is None else config.with_chunks(FLAGS.chunk_size)
    first = methods[names[0]]
    model = cli.load_model(FLAGS.model or first.model)

    from lcx.questions import ask

    tokens = len(model.tokenizer.text_ids(text))
    for name, experiment in methods.items():
        sized = cli.with_budget(experiment, tokens) if experiment.recipe.has_budget else experiment
        asked = ask(
            model,
            sized,
            text,
            FLAGS.question,
            max_tokens=FLAGS.num_tokens,
            template=FLAGS.template.replace(r"\n", "\n"),
            allow_extrapolation=FLAGS.allow_extrapolation,
        )
        print(
            f"{name}: read {asked.tokens:,} tokens in {asked.read_seconds:.2f} s, cache {asked.cache_bytes / MIB:.1f} MiB",
            flush=True,
        )
        for answer in asked.answers:
            print(f"  {visible(answer.question)}  ->  {visible(answer.text)}  ({answer.seconds:.2f} s)", flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run("ask", main)
