"""A command of experiments/ run in the test's own process."""

import importlib
import sys

from absl import flags

from experiments import cli


def run_command(monkeypatch, capsys, name, *args):
    """(exit code, stdout, stderr) of a command in this process, its flags defined anew."""
    for flag in [f for f in flags.FLAGS if flags.FLAGS.find_module_defining_flag(f).startswith("experiments")]:
        delattr(flags.FLAGS, flag)
    cli._changes.clear()
    known = sys.modules.get(f"experiments.{name}")
    module = known or importlib.import_module(f"experiments.{name}")
    if hasattr(module, "define_flags"):
        module.define_flags()
    elif known:
        # its flags are defined when it is imported
        importlib.reload(module)
    monkeypatch.setattr(sys, "argv", [name, *args])
    code = 0
    try:
        cli.run(name, module.main)
    except SystemExit as end:
        code = end.code or 0
    finally:
        flags.FLAGS.unparse_flags()
    out = capsys.readouterr()
    return code, out.out, out.err
