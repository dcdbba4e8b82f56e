"""`python -m experiments.check --config=mine.py`: what must hold for every method, checked on a small random model, without weights.

A line a check, with the largest difference that it measured; exit code 1 where one fails.
"""

from __future__ import annotations

import sys

from absl import flags

from experiments import cli
from lcx.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string(
        "config", None, "Config file, or snapkv for configs/snapkv.py; --config.FIELD=VALUE changes a field."
    )
    flags.DEFINE_integer(
        "prompt", 37, "Tokens of the longer prompt; more where the method does nothing below.", lower_bound=33
    )
    flags.DEFINE_integer("chunk", 16, "Tokens of a prefill step.", lower_bound=1)
    flags.DEFINE_bool(
        "thorough", False, "Also the checks that compile programs of their own: heads, bfloat16, long steps and more."
    )


def main() -> None:
    if not FLAGS.config:
        raise UserError("config: missing; give --config=mine.py")
    from lcx.config_files import load_config
    from lcx.conformance import check
    from lcx.experiment import Experiment

    experiment = load_config(FLAGS.config, cli.changes())
    if not isinstance(experiment, Experiment):
        raise UserError(f"config={FLAGS.config!r} is a sweep; allowed here is the config of one method")
    results = check(
        experiment,
        prompt=FLAGS.prompt,
        chunk=FLAGS.chunk,
        thorough=FLAGS.thorough,
        on_result=lambda result: print(result, flush=True),
    )
    count = {status: sum(r.status == status for r in results) for status in ("pass", "fail", "skip")}
    print(
        f"{count['pass']} of {len(results)} checks pass, {count['fail']} fail, {count['skip']} say nothing of this method"
    )
    if count["fail"]:
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    cli.run("check", main)
