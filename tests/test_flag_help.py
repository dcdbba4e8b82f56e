"""--help of every command: the flags that commands share, then its own, and none of the libraries'."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run_command

ROOT = Path(__file__).parent.parent
COMMANDS = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if "cli.run(" in path.read_text() and path.stem != "cli"
)
SHARED = ["config", "model", "budget", "keep_ratio", "dtype", "chunk_size", "implementation"]
OF_ABSL = ("verbosity", "logtostderr", "pdb", "run_with_profiling", "only_check_args", "alsologtostderr")


def names(text):
    return re.findall(r"^  --(?:\[no\])?(\w+)", text, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_0_and_leaves_out_the_libraries(command, monkeypatch, capsys):
    code, out, err = run_command(monkeypatch, capsys, command, "--help")
    assert code == 0 and err == ""
    assert len(out.splitlines()[0]) > 40 and out.splitlines()[1] == ""
    assert names(out) and not set(names(out)) & set(OF_ABSL)
    assert len(names(out)) == len(set(names(out)))


@pytest.mark.parametrize("command", ["generate", "score", "sweep", "plan", "look"])
def test_shared_flags_stand_above_the_own_ones(command, monkeypatch, capsys):
    _, out, _ = run_command(monkeypatch, capsys, command, "-h")
    shared, own = out.split(f"Flags of {command}:")
    assert names(shared.split("Flags that commands share:")[1])[:7] == SHARED
    assert names(own) and not set(names(own)) & set(SHARED)
    assert max(map(len, out.splitlines()[3:])) <= 120


def test_an_entry_has_values_words_and_default(monkeypatch, capsys):
    _, out, _ = run_command(monkeypatch, capsys, "generate", "--help")
    flat = " ".join(out.split())
    assert "--num_tokens=N New tokens at most. Default: 64." in flat
    assert "--dtype=float32|bfloat16 Type of weights, activations and exact caches. Default: float32." in flat
    assert "--[no]chat Put the prompt into the model's chat format." in flat
    assert "--budget=N Tokens kept per KV head" in flat and "<float32" not in flat


def test_the_same_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.score", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert names(done.stdout)[:7] == SHARED and "text_file" in names(done.stdout)
