"""The benchmark of the kernels: its dry run, its arithmetic and its refusals; the figures themselves need a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from compiler_support import compile_kernel, require_compiler

from lcx.bench import cases, decode, model, order, peers, timing
from lcx.bench import rows as programs
from lcx.bench import run as bench
from lcx.bench.cases import CHECKS, Case, checks, error
from lcx.bench.goals import summary
from lcx.bench.order import timed_rows
from lcx.bench.rows import check_of, row_of
from lcx.bench.tune import CHOICES, PAYLOADS, ROWS, candidates, case_of, program, table, with_entry
from lcx.errors import UserError
from lcx.ops.attention import Partial
from pallas_kernels import tables

ROOT = Path(__file__).parent.parent
SLOW = pytest.mark.slow


def run(*args):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.bench_gpu", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.timeout(300)
def test_the_dry_run_checks_and_compiles(tmp_path):
    require_compiler()
    done = run("--dry_run", f"--out={tmp_path / 'rows.jsonl'}", "--only=int4")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    kinds = [row["kind"] for row in rows]
    assert kinds.count("check") == sum("int4" in c.name for c in CHECKS)
    timed = {row.name for row in timed_rows() if "int4" in row.name}
    on_gpu = {f"check {case.name}" for case in checks(True) if "int4" in case.name}
    assert len(on_gpu) == 2 and {row["name"] for row in rows if row["kind"] == "compiled"} == timed | on_gpu
    assert all(row["ptxas"] == metadata.version("nvidia-cuda-nvcc") for row in rows)
    assert all(row["right"] for row in rows if row["kind"] == "check")
    assert all(row["dry_run"] and row["jax"] and row["commit"] and row["date"] for row in rows)
    assert not any("ms" in row for row in rows), "a dry run measures no time"


def test_a_check_that_fails_costs_its_own_rows_alone(monkeypatch, tmp_path):
    """Three kernels: one whose check raises, one that is wrong, one that is right; all rows are written, and the exit says which."""
    require_compiler()
    three = {kernel: Case(kernel, 128, 64, heads=1, kv_heads=1) for kernel in ("forward", "probe", "minmax")}
    errors = {"probe": 1.0, "minmax": 1e-4}
    at_gpu_sizes = []

    def error_of(case, on_gpu):
        if case.kernel not in errors:
            raise ValueError("dimension 2 must have\nsize smaller")
        return errors[case.kernel]

    def check_of(case, on_gpu):
        at_gpu_sizes.append((case.kernel, on_gpu))
        if case.kernel == "probe":
            raise MemoryError("too much")
        return SimpleNamespace(program=lambda x: x, abstract=lambda: (jax.ShapeDtypeStruct((8,), np.float32),))

    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(bench, "error_of", error_of)
    monkeypatch.setattr(cases, "checks", lambda on_gpu: list(three.values()))
    monkeypatch.setattr(programs, "check_of", check_of)
    monkeypatch.setattr(order, "timed_rows", lambda: [row_of(three["forward"])])
    monkeypatch.setenv("NPROC", "8")
    forward, probe, minmax = (case.name for case in three.values())
    with pytest.raises(UserError) as raised:
        bench.run(out, dry_run=True)
    assert str(raised.value) == f"wrong: {probe}; failed: check {forward}, check {probe}; the rows say why"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["kind"], row["name"]) for row in rows if row["kind"] not in ("counted", "composed")] == [
        ("failed", f"check {forward}"),
        ("check", probe),
        ("check", minmax),
        ("compiled", f"check {forward}"),
        ("failed", f"check {probe}"),
        ("compiled", f"check {minmax}"),
        ("compiled", forward),
    ]
    assert (
        rows[0]["why"] == "ValueError: dimension 2 must have size smaller" and rows[4]["why"] == "MemoryError: too much"
    )
    assert at_gpu_sizes == [(kernel, True) for kernel in three]
    # with a GPU: the rows of two kernels are not timed
    assert bench.check(bench.Rows(out, {}), True) == {"forward", "probe"}


ON_GPU = [
    case if (case.kernel, case.payload) in {("decode", "int2"), ("minmax", "bf16")} else pytest.param(case, marks=SLOW)
    for case in checks(True)
]


@pytest.mark.parametrize("case", ON_GPU, ids=lambda case: case.name)
def test_checks_of_a_gpu_have_the_shapes_that_are_compiled(case):
    check = check_of(case, True)
    made = jax.tree.map(lambda x: (x.shape, x.dtype), check.make())
    assert made == jax.tree.map(lambda x: (x.shape, x.dtype), check.abstract())


@SLOW
@pytest.mark.parametrize("case", checks(True), ids=lambda case: case.name)
def test_checks_of_a_gpu_compile_without_spills(case):
    check = check_of(case, True)
    compile_kernel(check.program, *check.abstract()).check()


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
    want = Partial(np.ones((1, 2, 1, 4, 8), np.float32), np.zeros((1, 2, 1, 4), np.float32))
    assert error(want, want) == 0
    assert error(want._replace(out=want.out * 1.1), want) == pytest.approx(0.1, rel=1e-3)
    assert error(want._replace(out=want.out * np.nan), want) == np.inf
    assert error(want._replace(lse=want.lse - np.inf), want) == np.inf
    assert error(want._replace(lse=want.lse + 1), want) > 1


def test_goals_are_judged_by_the_worst_row(capsys):
    def row(tokens, ratio, **other):
        case = vars(Case("forward", tokens, **other))
        return {"name": f"forward {tokens}", "case": case, "ratio": ratio, "tflops": 500.0, "of_copy": 0.5, "ms": 1.0}

    decode = {"name": "decode 1", "case": vars(Case("decode", 1_000)), "tflops": 1.0, "of_copy": 0.9, "ms": 1.0}
    summary([row(16_384, 0.97), row(65_536, 0.94), row(4_096, 0.5), row(16_384, 1.0, head_dim=64), decode])
    text = capsys.readouterr().out
    assert "forward   D 128  from 16,384 tokens: 0.95   0.940 NOT met" in text
    assert "D 64   from 16,384 tokens: 0.90   1.000 met" in text and "D 256  from 16,384 tokens: 0.95   no row" in text
    assert "decode 1: of the copy bandwidth 0.900, goal 0.88 met" in text


def test_every_timed_program_takes_its_arguments(monkeypatch, tmp_path):
    """time_rows from end to end with a clock that stands still: programs are traced on the shapes of their arguments."""
    seen = []

    def timer(fn, args):
        seen.append(jax.eval_shape(fn, *args))
        return lambda iterations: [1.0] * iterations

    def absent():
        raise peers.Absent("not here")

    rows = [replace(row, make=row.abstract) for row in timed_rows()]
    found = {"fa3-jax splits 4 page 64": lambda: timer(lambda x: x, (1.0,)), "tokamax": absent}
    monkeypatch.setattr(order, "timed_rows", lambda: rows)
    monkeypatch.setattr(timing, "jax_timer", timer)
    monkeypatch.setattr(timing, "wall_ms", lambda fn, args: jax.eval_shape(fn, *args) and 1.0)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 4e12)
    monkeypatch.setattr(timing, "matmul_flops", lambda: 6e14)
    monkeypatch.setattr(peers, "timers", lambda case, args: found.items())
    written = bench.Rows(tmp_path / "rows.jsonl", {})
    timed = list(bench.time_rows(written, {"probe"}, limit_s=1e9))
    summary(timed)
    bench.add_composed(written, timed)
    kinds = [row["kind"] for row in written.rows]
    assert "failed" not in kinds, [row["why"] for row in written.rows if row["kind"] == "failed"]
    assert kinds.count("skipped") == 1, "the probe is wrong here"
    assert kinds.count("timed") == len(rows) - 1
    assert kinds.count("composed") == 2 and kinds.count("counted") == 1
    assert {tuple(row["absent"].items()) for row in timed if "absent" in row} == {(("tokamax", "absent: not here"),)}
    assert len(written.rows) == len((tmp_path / "rows.jsonl").read_text().splitlines())
    by_name = {row["name"]: row for row in written.rows}
    # four programs' calls in a millisecond
    row = by_name["decode bf16 131,072 D 128 32/8 x1"]
    assert row["ms"] == 0.25 and row["gb_per_s"] == pytest.approx(4 * 2**29 / 1e6)


def test_rows_behind_the_limit_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 4e12)
    monkeypatch.setattr(timing, "matmul_flops", lambda: 6e14)
    written = bench.Rows(tmp_path / "rows.jsonl", {})
    assert not list(bench.time_rows(written, set(), "model", 0.0))
    assert [row["kind"] for row in written.rows[1:]] == ["skipped"] * len(model.rows())


PLAIN = [row for row in timed_rows() if row.case is None or row.case.density is None]


@pytest.mark.parametrize("row", PLAIN, ids=lambda row: row.name)
def test_arrays_are_of_the_shapes_that_are_compiled(row):
    made = jax.eval_shape(row.make)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), row.abstract()
    )


def test_lists_are_of_the_shapes_that_are_compiled():
    """But for their width, which is that of the longest."""
    row = row_of(Case("forward", 512, heads=2, kv_heads=1, density=0.1))
    *qkv, made = row.make()
    *shapes, want = row.abstract()
    assert [x.shape for x in qkv] == [x.shape for x in shapes]
    for name in ("index", "count", "flags"):
        array, shape = getattr(made, name), getattr(want, name)
        assert array.shape[:3] == shape.shape[:3] and array.dtype == shape.dtype


def test_tables_of_a_program_share_no_page():
    case = Case("decode", 300, kv_heads=2, heads=4, batch=3, payload="int2")
    _, pages, tables, lengths = decode.arrays(case, 4)
    assert tables.shape == (4, 3, 2, 5) and sorted(np.ravel(tables)) == list(range(len(pages.k)))
    assert not (np.diff(np.ravel(tables)) == 1).all(), "they are shuffled"
    assert np.isfinite(np.asarray(pages.scales, np.float32)).all() and (np.asarray(lengths) == 300).all()
    large = [row for row in timed_rows() if row.case is not None and row.case.kernel == "decode"]
    assert all(row.calls >= 4 and row.calls * row.case.bytes >= 256e6 for row in large)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(decode.abstract(case, 1)[1]))
    assert held == case.bytes


def test_peers_of_decode_take_the_same_shapes(monkeypatch):
    """FA3's signature as of 0.2.0."""
    seen = []

    def with_kvcache(
        q, k_cache, v_cache, cache_seqlens=None, page_table=None, softmax_scale=None, is_causal=False, num_splits=1
    ):
        assert q.shape == (2, 1, 4, 128) and k_cache.shape == v_cache.shape and k_cache.shape[2:] == (2, 128)
        assert page_table.shape[1] * k_cache.shape[1] >= 300 and page_table.dtype == cache_seqlens.dtype == "int32"
        assert isinstance(softmax_scale, float) and num_splits > 1 and is_causal
        seen.append((num_splits, k_cache.shape[1]))
        return q

    def timer(fn, args):
        jax.eval_shape(fn, *args)
        return lambda iterations: [1.0] * iterations

    def need(name):
        if name == "flash_attn3_jax":
            return SimpleNamespace(flash_mha_with_kvcache=with_kvcache)
        raise peers.Absent(f"{name} does not import")

    monkeypatch.setattr(decode, "BEYOND", 1e6)
    monkeypatch.setattr(peers, "jax_timer", timer)
    monkeypatch.setattr(peers, "_need", need)
    case = Case("decode", 300, heads=4, kv_heads=2, batch=2)
    absent = []
    for name, make in peers.timers(case, ()):
        try:
            make()
        except peers.Absent:
            absent.append(name)
        except RuntimeError as error:
            assert name == "cudnn" and "cuDNN not found" in str(error)
    assert set(seen) == set(peers.FA3_DECODE) and len(seen) == 4 * len(peers.FA3_DECODE)
    assert absent == ["tokamax", "torch-flash", "torch-cudnn", "flex_attention"]
    for _, make in peers.timers(replace(case, payload="int4"), ()):
        with pytest.raises(peers.Absent, match="reads 16-bit keys"):
            make()
    assert not list(peers.timers(Case("probe", 1_024), ()))


def test_models_are_composed_by_the_formula():
    chunks = model.PREFILL // model.CHUNK
    ms = {row.name: 0.0 for row in model.rows()}
    assert model.prefill_s(ms) == model.step_ms(ms) == 0
    # a part that grows with its chunk: the sum over all chunks, of 32 layers
    ms |= {f"model prefill: attend chunk {i}": float(i) for i in model.SAMPLED}
    assert model.prefill_s(ms) == pytest.approx(32 * chunks * (chunks - 1) / 2 / 1e3)
    assert model.prefill_s(ms | {"model prefill: layer": 1.0}) - model.prefill_s(ms) == pytest.approx(32 * chunks / 1e3)
    assert model.step_ms(ms | {"model decode: head": 2.0, "model decode: layer": 1.0}) == 34
    del ms["model prefill: layer"], ms["model decode: head"]
    assert model.prefill_s(ms) is model.step_ms(ms) is None and not model.composed(ms)


def test_a_clock_that_is_not_told_does_not_end_the_run():
    assert bench.drifted({"sm_mhz": "1980"}, {"sm_mhz": "1900"}) and not bench.drifted(*2 * [{"sm_mhz": "1980"}])
    assert bench.drifted({"sm_mhz": "[N/A]"}, {"sm_mhz": "1980"}) is bench.drifted({}, {}) is None


def test_bytes_of_the_long_context_are_counted_page_by_page():
    full, streaming = 4_194_304 // 64 * (2 * 64 * 128 // 2 + 4 * 64 * 2), 5 * (2 * 64 * 128 * 2)
    assert model.kv_bytes() == 32 * 4 * (full + streaming) == 73_035_415_552 <= model.KV_BYTES


def test_the_largest_of_each_row_are_chosen():
    offset, tiles = 3 * 128, 12
    scores = np.random.default_rng(0).random((1, 2, 2, 4, tiles), np.float32) ** 20
    chosen = np.asarray(model.choose(scores, offset))
    assert chosen.shape == (1, 4, 4, tiles)
    for h, i in np.ndindex(4, 4):
        seen = scores.reshape(4, 4, tiles)[h, i, : i + 4]
        want = np.argsort(-seen)[: int(np.ceil(0.1 * (i + 4)))]
        assert sorted(np.flatnonzero(chosen[0, h, i])) == sorted(want)


@pytest.mark.parametrize(
    "kernel, about", [(k, {}) for k in CHOICES if k != "decode"]
    + [("decode", dict(payload=p, rows=n)) for p in PAYLOADS for n in ROWS],
    ids=str,
)  # fmt: skip
def test_autotune_writes_one_entry_of_its_table(kernel, about):
    source = (ROOT / "pallas_kernels" / "tables.py").read_text()
    name, entries = table(kernel, **about)
    for head_dim, now in entries.items():
        tiles = list(candidates(kernel, now))
        others = tiles if now is None else tiles[1:]
        assert now is None or tiles[0] == now
        assert now not in others and len(set(others)) == len(others) >= 15
        key, part = head_dim, None
        if kernel == "decode":
            key, part = (about["payload"], head_dim), list(ROWS).index(about["rows"])
        changed = with_entry(source, name, key, others[-1], part)
        space: dict = {"__name__": "tables"}
        exec(compile(changed.replace("from __future__ import annotations", ""), "tables", "exec"), space)  # noqa: S102
        assert told(space[name], key, part) == vars(others[-1])
        # a repr names the class and all fields; the class is another one, and never equal
        before, after = ({k: repr(v) for k, v in t.items()} for t in (getattr(tables, name), space[name]))
        assert {k for k in before if before[k] != after[k]} == {key}
        if part is not None:
            pairs = zip(getattr(tables, name)[key], space[name][key], strict=True)
            assert [repr(a) != repr(b) for a, b in pairs] == [i == part for i in range(3)]
        assert with_entry(changed, name, key, others[0], part).count("\n") == source.count("\n")


def told(table, key, part):
    return vars(table[key] if part is None else table[key][part])


def test_an_entry_of_several_lines_is_replaced():
    tile = tables.ScoreTile(columns=128, stages=2, run=1)
    source = "SCORE = {\n    64: ScoreTile(\n        columns=256,\n    ),  # why\n    128: 1,\n}\n"
    want = "SCORE = {\n    64: ScoreTile(columns=128, stages=2, run=1),  # why\n    128: 1,\n}\n"
    assert with_entry(source, "SCORE", 64, tile) == want
    with pytest.raises(UserError, match="SCORE has 0 entries for 96; one is needed"):
        with_entry(source, "SCORE", 96, tile)


@pytest.mark.parametrize("kernel", CHOICES)
def test_autotune_candidates_are_programs(kernel):
    case = case_of(kernel, 128)
    entry = table(kernel)[1][128]
    other = list(candidates(kernel, entry))[1]
    args = row_of(case).abstract()
    now, then = (jax.eval_shape(program(case, tile), *args) for tile in (entry, other))
    assert jax.tree.leaves(now) == jax.tree.leaves(then)


def test_autotune_without_a_gpu_says_what_to_do():
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    for args, message in (
        ((), "--dry_run"),
        (("--dry_run", "--write"), "measures nothing"),
        (("--dry_run", "--head_dim=96"), "ATTEND has 64, 128, 256"),
        (("--dry_run", "--kernel=decode", "--head_dim=96"), "DECODE has 64, 128, 256"),
    ):
        command = [sys.executable, "-m", "experiments.autotune", *args]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


def test_a_peer_that_fails_while_it_is_timed_does_not_cost_our_row():
    def fails(iterations):
        raise RuntimeError("launches differ")

    found, raised = timing.in_turn({"fails": fails, "ours": lambda n: [2.0] * n, "other": lambda n: [1.0] * n})
    assert set(found) == {"ours", "other"} and found["other"]["ours_over_it"] == 2.0
    assert str(raised["fails"]) == "launches differ"
    with pytest.raises(RuntimeError):
        timing.in_turn({"ours": fails})
