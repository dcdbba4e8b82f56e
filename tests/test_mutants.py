"""The seeded faults of tests/mutants/ still apply, every config has some, and the script tells the dead from the living."""

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lcx.config_files import all_configs, load_config
from lcx.experiment import Experiment

ROOT = Path(__file__).parents[1]


def _load():
    spec = importlib.util.spec_from_file_location("mutants_script", ROOT / "scripts" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    # a dataclass looks its module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


mutants = _load()
ALL = mutants.read_all()


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_fault_still_applies_and_names_tests_that_exist(mutant):
    mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8"))
    assert mutant.reason
    for test in mutant.tests:
        assert (ROOT / test).is_file(), test
    # each word of the selection is in the file: a name of a test or of a case
    text = "".join((ROOT / test).read_text(encoding="utf-8") for test in mutant.tests)
    words = set(mutant.select.replace("(", " ").replace(")", " ").split()) - {"and", "or", "not"}
    assert [word for word in words if word not in text] == []


def test_a_method_has_three_faults_of_its_own():
    counts = Counter(mutant.method for mutant in ALL)
    assert {name: count for name, count in counts.items() if count < 3} == {}
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in ALL}) == len(ALL)


def test_every_config_that_is_not_dense_has_faults():
    covered = [name for path in sorted(mutants.FOLDER.glob("*.toml")) for name in mutants.configs_of(path)]
    assert len(covered) == len(set(covered))
    methods = {path.stem for path in all_configs() if isinstance(load_config(path), Experiment)} - {"dense"}
    assert set(covered) == methods


# ---- the script


def fault(**changes):
    fields = {"name": "m:1", "file": "m.py", "old": "x < 3", "new": "x <= 3", "reason": "off by one"}
    return mutants.Mutant(**(fields | {"tests": ("test_m.py",), "select": "small"} | changes))


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("y = 1", {}, "old='x < 3' occurs 0 times in m.py"),
        ("x < 3 or x < 3", {}, "occurs 2 times"),
        ("x < 3", {"new": "x < 3"}, "is what m.py has"),
        ("x < 3", {"new": "x <"}, "is no Python any more"),
    ],
)
def test_a_fault_that_does_not_apply_is_refused_in_one_line(text, changes, message):
    with pytest.raises(mutants.Refused, match=message) as raised:
        fault(**changes).apply(text)
    assert "\n" not in str(raised.value)


def test_a_file_with_a_wrong_key_is_refused(tmp_path):
    path = tmp_path / "m.toml"
    path.write_text('tests = ["a"]\n[[mutant]]\nfile = "m.py"\nold = "a"\nnew = "b"\nwhy = "c"\n')
    with pytest.raises(mutants.Refused, match="m:1: has the keys file, new, old, tests, why; needed are file, new"):
        mutants.read(path)
    path.write_text("tests = [")
    with pytest.raises(mutants.Refused, match="m.toml: "):
        mutants.read(path)


def test_a_fault_that_a_test_sees_is_killed(tmp_path, capsys):
    (tmp_path / "m.py").write_text("def small(x):\n    return x < 3\n")
    (tmp_path / "test_m.py").write_text(
        "from m import small\n\ndef test_small():\n    assert small(2) and not small(3)\n"
    )
    assert mutants.hunt([fault()], tmp_path, 60) == {"killed": 1}
    assert capsys.readouterr().out.split()[0] == "killed"
    # the tree is as it was
    assert (tmp_path / "m.py").read_text().count("x < 3") == 1
    assert mutants.judge(tmp_path, fault().run, 1e-3) is None


@pytest.mark.parametrize(
    ("clean", "faulty", "verdict", "note"),
    [
        (0, 0, "LIVES", ""),
        (0, 2, "unclear", "ends with status 2 with m:1"),
        (0, None, "unclear", "takes too long with m:1"),
        (5, 1, "unclear", "selects no test without a fault"),
        (1, 1, "unclear", "fails without a fault"),
    ],
)
def test_a_verdict_needs_tests_that_pass_without_the_fault_and_end_with_it(
    tmp_path, capsys, monkeypatch, clean, faulty, verdict, note
):
    (tmp_path / "m.py").write_text("x < 3")
    monkeypatch.setattr(mutants, "judge", lambda tree, *_: clean if (tree / "m.py").read_text() == "x < 3" else faulty)
    assert mutants.hunt([fault(), fault(name="m:2")], tmp_path, 1) == {verdict: 2}
    out = capsys.readouterr().out
    assert note in out
    # the tests alone are run once for both
    assert out.count("without a fault") <= 1


def test_changes_choose_the_faults_of_a_file_its_tests_and_its_description():
    chosen = lambda *files: [
        f.name for f in (fault(), fault(name="n:1", file="n.py")) if mutants.concerned(f, {*files})
    ]
    assert chosen("m.py") == ["m:1"]
    assert chosen("test_m.py") == ["m:1", "n:1"]
    assert chosen("tests/mutants/n.toml", "README.md") == ["n:1"]
    assert chosen("README.md") == []


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--methods=h3o", "--methods=h3o: allowed are by_phase, duo, h2o"),
        ("--changed=nowhere", "--changed=nowhere: git knows no"),
    ],
)
def test_wrong_flags_give_one_line(flag, message):
    command = [sys.executable, "scripts/mutants.py", flag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
