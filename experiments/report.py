"""`python -m experiments.report --workdir=W`: one HTML page of a sweep that opens offline, and its figures as files."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from experiments import cli
from lcx.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of the sweep.")
    flags.DEFINE_string("out", None, "The page; the default is report.html in the workdir.")
    flags.DEFINE_list(
        "formats", ["png", "svg"], "Figures are written as these beside the page, in figures/; empty: none."
    )
    flags.DEFINE_list("capacity", [], "GPUs whose memory is drawn as lines, such as h200,rtx4090.")
    flags.DEFINE_bool("salvage", False, "Read a damaged store as far as it goes; it is not changed.")


def main() -> None:
    from lcx.report import write_report
    from lcx.report.escape import shown_errors
    from lcx.report.source import load
    from lcx.text import visible

    with shown_errors():
        if not FLAGS.workdir:
            raise UserError("workdir: missing; give --workdir=...")
        workdir = Path(FLAGS.workdir)
        out = Path(FLAGS.out) if FLAGS.out else workdir / "report.html"
        source = load(workdir, damaged=FLAGS.salvage)
        for path in write_report(source, out, FLAGS.formats, FLAGS.capacity):
            print(f"{visible(path)}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    define_flags()
    cli.run("report", main)
