"""The compiler for GPUs that are not there is that of the wheels, and of the version that is locked."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from compiler_support import require_compiler

from lcx.plan.targets import wheel_compiler

ROOT = Path(__file__).resolve().parent.parent
COMPILE = """
from functools import partial
import jax, jax.numpy as jnp
from lcx.bench.compiled import compile_kernel
from pallas_kernels.score_blocks import score_pooled
q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 1, 1, 128, 64), (1, 1, 64, 128)))
report = compile_kernel(partial(score_pooled, scale=0.1, rows=1, size=1), q, k).check()
print(report.kernels)
"""


@pytest.fixture
def compiler():
    require_compiler()
    return wheel_compiler()


def test_the_compiler_is_of_the_locked_version(compiler):
    locked = re.search(r"^nvidia-cuda-nvcc==(\S+)", (ROOT / "requirements" / "test.txt").read_text(), re.M)[1]
    assert version("nvidia-cuda-nvcc") == version("nvidia-nvvm") == locked
    said = subprocess.run([compiler / "bin" / "ptxas", "--version"], capture_output=True, text=True, check=True).stdout
    assert f"V{locked}" in said


def test_the_wheels_come_first_on_the_path_and_once(compiler, monkeypatch):
    monkeypatch.setenv("PATH", os.defpath)
    assert wheel_compiler() == compiler
    assert os.environ["PATH"] == os.pathsep.join([str(compiler / "bin"), os.defpath])
    wheel_compiler()
    assert os.environ["PATH"] == os.pathsep.join([str(compiler / "bin"), os.defpath])


def test_a_toolkit_of_the_machine_is_not_used(compiler, tmp_path):
    """One that writes down each call and fails, first on the PATH and named by CUDA_ROOT."""
    calls = tmp_path / "calls"
    for name in ("ptxas", "nvlink"):
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\necho "$0 $*" >>"{calls}"\nexit 1\n')
        script.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "CUDA_ROOT": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200
    )
    assert not calls.exists(), calls.read_text()
    assert done.returncode == 0 and done.stdout == "1\n", done.stderr
