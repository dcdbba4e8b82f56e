"""`python -m experiments.autotune --kernel=attend --head_dim=128 --write`: the fastest tile sizes of a kernel on this GPU, into its table.

`--dry_run` needs no GPU: it compiles every candidate for the H200 and says which fit without spilled registers.
"""

from __future__ import annotations

from absl import flags

from experiments import cli
from lcx.bench.tune import CHOICES, PAYLOADS, ROWS, tune

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_enum("kernel", "attend", list(CHOICES), "Whose table of pallas_kernels.tables.")
    flags.DEFINE_integer("head_dim", 128, "Which entry of it.")
    flags.DEFINE_enum("payload", "bf16", list(PAYLOADS), "Of the pages of decode.")
    flags.DEFINE_enum("rows", "8", [str(n) for n in ROWS], "Of queries at most, heads of a group times tokens: decode.")
    flags.DEFINE_bool("write", False, "Put the fastest into pallas_kernels/tables.py; otherwise it is only printed.")
    flags.DEFINE_bool("dry_run", False, "No GPU: compile for the H200, measure nothing.")


def main() -> None:
    settings = {"payload": FLAGS.payload, "rows": int(FLAGS.rows)}
    tune(FLAGS.kernel, FLAGS.head_dim, **settings, write=FLAGS.write, dry_run=FLAGS.dry_run)


if __name__ == "__main__":
    define_flags()
    cli.run("autotune", main)
