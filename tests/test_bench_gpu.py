"""The benchmark of the kernels: its dry run, its arithmetic and its refusals; the figures themselves need a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from aot_support import require_compiler

from experiments.autotune import CHOICES, candidates, table, with_entry
from experiments.bench_gpu import summary
from experiments.gpu.cases import CHECKS, Case, error, timed_cases
from lcx.attention import Partial
from lcx.errors import UserError
from pallas_kernels.tables import ATTEND

ROOT = Path(__file__).parent.parent


def run(*args):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.bench_gpu", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.timeout(300)
def test_the_dry_run_checks_and_compiles(tmp_path):
    require_compiler()
    done = run("--dry_run", f"--out={tmp_path / 'rows.jsonl'}", "--only=decode")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    kinds = [row["kind"] for row in rows]
    assert kinds.count("check") == sum(c.kernel == "decode" for c in CHECKS)
    assert kinds.count("compiled") == len({c for c in timed_cases() if c.kernel == "decode"})
    assert all(row["right"] for row in rows if row["kind"] == "check")
    assert all(row["dry_run"] and row["jax"] and row["commit"] and row["date"] for row in rows)
    assert not any("ms" in row for row in rows), "a dry run measures no time"


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = run(f"--out={tmp_path / 'rows.jsonl'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--dry_run" in done.stderr
    assert run("--dry_run", "--out=/no/such/folder/x").returncode == 2


def test_operations_are_those_of_the_visible_pairs():
    """Counted again pair by pair."""
    q, kv = np.arange(384)[:, None], np.arange(384)
    seen = kv <= q
    shape = {"head_dim": 64, "heads": 2, "kv_heads": 1, "batch": 3}
    assert Case("forward", 384, **shape).flops == 4 * 64 * 2 * 3 * seen.sum()
    near = seen & ((q - kv < 90) | (kv < 4))
    # the count of the row is that of a full window; the first rows see fewer twice
    assert Case("forward", 384, window=90, sink=4, **shape).flops == pytest.approx(
        4 * 64 * 2 * 3 * near.sum(), rel=1e-9
    )
    case = Case("forward", 384, density=0.3, **shape)
    tiles = np.repeat(np.repeat(case.chosen()[0], 128, 1), 128, 2)
    assert case.flops == 4 * 64 * 3 * (tiles & seen).sum()
    assert Case("decode", 1_000, **shape).flops == 4 * 64 * 2 * 3 * 1_000


def test_an_error_in_any_result_is_seen():
    case = Case("forward", 128)
    want = Partial(np.ones((1, 2, 1, 4, 8), np.float32), np.zeros((1, 2, 1, 4), np.float32))
    assert error(case, want, want) == 0
    assert error(case, want._replace(out=want.out * 1.1), want) == pytest.approx(0.1, rel=1e-3)
    assert error(case, want._replace(out=want.out * np.nan), want) == np.inf
    assert error(case, want._replace(lse=want.lse - np.inf), want) == np.inf
    assert error(case, want._replace(lse=want.lse + 1), want) > 1


def test_goals_are_judged_by_the_worst_row(capsys):
    def row(tokens, ratio, **other):
        case = vars(Case("forward", tokens, **other))
        return {"name": f"forward {tokens}", "case": case, "ratio": ratio, "tflops": 500.0, "of_copy": 0.5}

    decode = {"name": "decode 1", "case": vars(Case("decode", 1_000)), "tflops": 1.0, "of_copy": 0.9}
    summary([row(16_384, 0.97), row(65_536, 0.94), row(4_096, 0.5), row(16_384, 1.0, head_dim=64), decode])
    text = capsys.readouterr().out
    assert "forward   D 128  from 16,384 tokens: 0.95   0.940 NOT met" in text
    assert "D 64   from 16,384 tokens: 0.90   1.000 met" in text and "D 256  from 16,384 tokens: 0.95   no row" in text
    assert "0.900 of the copy bandwidth, goal 0.88 met" in text


def test_autotune_writes_one_line_of_its_table():
    source = (ROOT / "pallas_kernels" / "tables.py").read_text()
    for kernel in CHOICES:
        name, entries = table(kernel)
        for head_dim, now in entries.items():
            first, *others = candidates(kernel, now)
            assert first == now and now not in others and len(set(others)) == len(others) >= 15
            changed = with_entry(source, name, head_dim, others[-1])
            space: dict = {"__name__": "tables"}
            exec(compile(changed.replace("from __future__ import annotations", ""), "tables", "exec"), space)  # noqa: S102
            # the class is another one: dataclasses of two modules never compare equal
            assert {d: vars(t) for d, t in space[name].items()} == {
                d: vars(others[-1] if d == head_dim else t) for d, t in entries.items()
            }
    with pytest.raises(UserError, match="ATTEND has 0 lines for head_dim 96"):
        with_entry(source, "ATTEND", 96, ATTEND[128])


def test_autotune_without_a_gpu_says_what_to_do():
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    for args, message in (
        ((), "--dry_run"),
        (("--dry_run", "--write"), "measures nothing"),
        (("--dry_run", "--head_dim=96"), "ATTEND has 64, 128, 256"),
    ):
        command = [sys.executable, "-m", "experiments.autotune", *args]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
