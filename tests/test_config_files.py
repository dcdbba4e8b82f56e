"""Configs by name, and one line with file, line and what is allowed for every mistake in a config file."""

import sys
from pathlib import Path

import pytest
from command_line import run_command

import lcx
from lcx.errors import UserError

ROOT = Path(__file__).parent.parent
HEAD = """from dataclasses import dataclass

from lcx.experiment import Experiment, Sweep
from lcx.policies.base import Evict
from lcx.policies.snapkv import SnapKV
from lcx.recipe import Recipe, Segment


"""
MUTABLE = """@dataclass
class Mine(Evict):
    budget: int = 8


def get_config():
    return Experiment(Recipe((Segment(policy=Mine()),)))
"""


def body(line):
    return f"def get_config():\n    {line}\n"


# a file, the text of the line that is to blame, what the message says
MISTAKES = {
    "no comma": (
        HEAD + body("return Experiment(Recipe((Segment(compress=SnapKV())),))"),
        "return",
        ("is a Segment; allowed is a tuple", "Recipe((Segment(...),))"),
    ),
    "a list": (
        HEAD + body("return Experiment(Recipe([Segment()]))"),
        "return",
        ("is a list; allowed is a tuple",),
    ),
    "not frozen": (HEAD + MUTABLE, "return", ("policy of segment 'all'=Mine(...)", "@dataclass(frozen=True)")),
    "no dataclass": (
        HEAD + MUTABLE.replace("@dataclass\n", ""),
        "return",
        ("policy of segment 'all'=Mine(...)", "@dataclass(frozen=True)"),
    ),
    "a class": (
        HEAD + body("return Experiment(Recipe((Segment(compress=SnapKV),)))"),
        "return",
        ("=SnapKV is a class; allowed is an instance, such as SnapKV()",),
    ),
    "a list in a part": (
        HEAD + MUTABLE.replace("@dataclass\n", "@dataclass(frozen=True)\n").replace("Mine()", "Mine([8])"),
        "return",
        ("unhashable type: 'list'", "allowed are fields that are numbers"),
    ),
    "misspelt": (
        HEAD + body("return Experiment(Recipe((Segment(compress=SnapKV(budjet=9)),)))"),
        "return",
        ("unexpected keyword argument 'budjet'", "allowed are budget, window", "did you mean 'budget'?"),
    ),
    "misspelt, of a module": (
        HEAD + "from lcx.policies import snapkv\n\n" + body("return snapkv.SnapKV(windows=9)"),
        "return",
        ("'windows'", "did you mean 'window'?"),
    ),
    "experiments in a sweep": (
        HEAD + body("return Sweep((Experiment(Recipe()),))"),
        "return",
        ("configs[0]=Experiment(", "is an Experiment; allowed is a tuple of paths"),
    ),
    "a sweep of one text": (
        HEAD + body("return Sweep('configs/dense.py')"),
        "return",
        ("is a str; allowed is a tuple",),
    ),
    "a segment for a recipe": (HEAD + body("return Experiment(Segment())"), "return", ("recipe=Segment(", "a Recipe")),
    "syntax": (
        "def get_config()\n    return 1\n",
        "def",
        ("SyntaxError: expected ':'", "allowed is a file that Python"),
    ),
    "no such module": ("import no_such_module\n", "import", ("ModuleNotFoundError: No module named 'no_such_module'",)),
    "an exception": (
        HEAD + body("return 1 / 0"),
        "return",
        ("ZeroDivisionError: division by zero", "Experiment or a Sweep"),
    ),
    "a wrong value": (
        HEAD + body("return Experiment(Recipe((Segment(compress=SnapKV(budget=1, window=9)),)))"),
        "return",
        ("budget=1 must be",),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_config_is_one_line_with_file_and_line(name, tmp_path):
    source, blamed, words = MISTAKES[name]
    path = tmp_path / "mine.py"
    path.write_text(source)
    lines = source.splitlines()
    number = max(i for i, line in enumerate(lines, 1) if line.strip().startswith(blamed))
    with pytest.raises(UserError) as caught:
        lcx.load_config(path)
    message = str(caught.value)
    assert message.startswith(f"config {path}:{number}: ") and "\n" not in message
    for word in words:
        assert word in message


def test_an_exception_of_a_config_is_kept_as_the_cause(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(body("return 1 / 0"))
    with pytest.raises(UserError) as caught:
        lcx.load_config(path)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_mistake_in_a_module_beside_the_config_names_both_places(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "beside_config.py").write_text("def method():\n    return {}['budget']\n")
    path = tmp_path / "mine.py"
    path.write_text("from beside_config import method\n\n\n" + body("return method()"))
    with pytest.raises(UserError, match=r"mine\.py:5: KeyError: 'budget' \(raised at .*beside_config\.py:2\)"):
        lcx.load_config(path)
    sys.modules.pop("beside_config")


def test_a_command_ends_with_exit_code_2(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.py"
    path.write_text(MISTAKES["misspelt"][0])
    code, out, err = run_command(monkeypatch, capsys, "generate", "--prompt=a", f"--config={path}")
    assert code == 2 and out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith(f"generate: config {path}:10: ") and "did you mean 'budget'?" in line


# ---- names


def test_a_name_alone_is_that_of_a_file_in_configs():
    assert lcx.load_config("snapkv") == lcx.load_config("configs/snapkv.py")
    assert lcx.load_config("snapkv").about


def test_configs_of_the_working_folder_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/snapkv.py").write_text(HEAD + body("return Experiment(Recipe(), model='mine')"))
    assert lcx.load_config("snapkv").model == "mine"
    assert lcx.load_config("h2o") == lcx.load_config(ROOT / "configs/h2o.py")


@pytest.mark.parametrize(("name", "meant"), [("snapvk", "configs/snapkv.py"), ("configs/snapkv", "configs/snapkv.py")])
def test_a_wrong_name_says_which_is_meant(name, meant):
    with pytest.raises(UserError, match=f"config='{name}': no such config.*did you mean '{meant}'"):
        lcx.load_config(name)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate", ("--prompt=a", "--config=snapkv", "--budget=9")),
        ("score", ("--text_file=README.md", "--out=out.npz", "--config=snapkv", "--budget=9")),
        ("plan", ("--config=h2o,snapkv", "--budget=9", "--model=smollm2-135m", "--lengths=64")),
        ("sweep", ("--config=snapkv", "--budget=9")),
    ],
)
def test_every_command_takes_a_name(command, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, _, err = run_command(monkeypatch, capsys, command, *words)
    assert code == 2 and "budget=9 must be an integer of at least 32" in err


def test_the_dense_config_by_name_is_one_point_of_a_sweep(monkeypatch, capsys):
    """As a path and as a name it is the same config, so that nothing appears twice."""
    monkeypatch.chdir(ROOT)
    code, _, err = run_command(monkeypatch, capsys, "sweep", "--config=dense", "--lengths=9000")
    assert code == 2 and "beyond the context" in err
