"""`python -m experiments.export --workdir=W --out=F.csv` (or `.parquet`): a sweep's rows as a file, one line a point.

--salvage reads a damaged store row by row and writes what it finds.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from experiments import cli
from lcx.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of the sweep.")
    flags.DEFINE_string("out", None, "File to write: .csv, or .parquet (page checksums on; needs the extra `parquet`).")
    flags.DEFINE_bool("salvage", False, "Read a damaged store as far as it goes; it is not changed.")


def main() -> None:
    from lcx.report.escape import shown_errors
    from lcx.report.export import check, export
    from lcx.report.source import load
    from lcx.text import visible

    with shown_errors():
        for name in ("workdir", "out"):
            if not getattr(FLAGS, name):
                raise UserError(f"{name}: missing; give --{name}=...")
        out = Path(FLAGS.out)
        check(out)
        source = load(Path(FLAGS.workdir), damaged=FLAGS.salvage)
        export(source.rows, out)
        ended = sum(r["status"] not in ("todo", "running") for r in source.rows)
        odd = f"; {source.odd} values were not of their column's kind and are left out" if source.odd else ""
        print(f"{visible(out)}: {len(source.rows)} points, {ended} with a row{odd}")


if __name__ == "__main__":
    define_flags()
    cli.run("export", main)
