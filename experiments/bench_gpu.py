"""`python -m experiments.bench_gpu --out=rows.jsonl`: the kernels beside the best of others on one Hopper GPU, within ten minutes.

Correctness comes first: a kernel that is wrong, or whose check fails, loses its rows and costs the others nothing.  Every row is on disk
as it is done.  `--dry_run` needs no GPU: it checks the kernels in interpret mode at small sizes, and compiles every check at the sizes
that a GPU gets and every row for the H200.
"""

from __future__ import annotations

import os
from pathlib import Path

from absl import flags

from experiments import cli

# XLA logs for each sort that it cannot time its library without a GPU
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("out", "bench_gpu.jsonl", "Where rows go, one JSON object a line.")
    flags.DEFINE_bool("dry_run", False, "No GPU: compile every row for the H200, check in interpret mode.")
    flags.DEFINE_float("limit_s", 570.0, "Seconds after which no further row begins.", lower_bound=1.0)
    flags.DEFINE_string("only", "", "Rows whose name contains this, such as 'decode'.")


def main() -> None:
    from lcx.bench.run import run

    run(Path(FLAGS.out), dry_run=FLAGS.dry_run, only=FLAGS.only, limit_s=FLAGS.limit_s)


if __name__ == "__main__":
    define_flags()
    cli.run("bench_gpu", main)
