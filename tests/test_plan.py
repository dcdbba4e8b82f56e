"""Plans: memory predicted from shapes, beside hand arithmetic, beside real arrays and beside the programs that a session compiles."""

import json
import math
import os
import random
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.artefacts.head_split import HeadSplit
from lcx.codecs.int_token import Int
from lcx.codecs.kivi import chain
from lcx.config_files import all_configs, load_config
from lcx.errors import UserError
from lcx.experiment import Experiment, Sweep
from lcx.measure.quality import make_session
from lcx.model_config import ModelConfig, weight_table
from lcx.models.decoder import Layers, Model, random_weights
from lcx.patterns.minference import MInference
from lcx.patterns.quest import Quest
from lcx.plan import Device, device, estimate, plan, shape
from lcx.plan.check import check
from lcx.plan.models import planned_aux, shard
from lcx.plan.programs import Compiler, compile_options
from lcx.plan.rows import Asked, make_job
from lcx.plan.search import _last_that_fits
from lcx.plan.targets import compile_device, compile_for, gpu_target
from lcx.policies.duo import duo
from lcx.policies.h2o import H2O
from lcx.policies.knorm import KNorm
from lcx.policies.sink_window import SinkWindow
from lcx.policies.snapkv import SnapKV
from lcx.recipe import Recipe, Segment
from lcx.schedules.chunked import Chunked, OneShot
from lcx.session import Session
from lcx.sweep.planned import planned_rows
from lcx.sweep.points import Loaded, jobs, specs
from lcx.sweep.settings import Settings

ROOT = Path(__file__).parent.parent
TINY = ModelConfig("tiny", 3, 48, 6, 2, 32, 40, 97, 512)
MODEL = Layers.of(Model(TINY, random_weights(TINY)))
MIB = 2**20
SETTINGS = {"dtype": "float32", "reserve_mib": 0, "new_tokens": 5}

EXPERIMENTS = {
    "dense": Experiment(Recipe()),
    "int4": Experiment(Recipe((Segment(codec=Int(4)),))),
    "kivi2": Experiment(Recipe((chain(2),))),
    "duo_int4": Experiment(Recipe(duo(4, 60, Int(4))), HeadSplit(0.5)),
    "window": Experiment(Recipe((Segment(policy=SinkWindow(4, 60)),))),
    "h2o": Experiment(Recipe((Segment(policy=H2O(64)),))),
    "snapkv": Experiment(Recipe((Segment(compress=SnapKV(80)),))),
    "quest": Experiment(Recipe(pattern=Quest(64, dense_layers=1))),
}


def small(memory: int) -> Device:
    """This machine with less memory."""
    return Device("small", None, 1, memory)


def here(experiment, length, **settings):
    return estimate(TINY, experiment, length, 5, "float32", small(1 << 40), **settings)


@pytest.fixture
def nothing_compiles(monkeypatch):
    def refuse(*_):
        raise AssertionError("a program was compiled")

    monkeypatch.setattr(Compiler, "submit", refuse)


# every term from the sizes of TINY: E 48, H 6, K 2, D 32, F 40, V 97, 3 layers, tied
MATRICES = 3 * (48 * (6 + 2 + 2) * 32 + 6 * 32 * 48 + 48 * 80 + 40 * 48)
VECTORS = 3 * (48 + 48) + 48
EMBED = 97 * 48


def test_peak_is_the_sum_of_its_terms():
    n, chunk = 500, 64
    row = here(EXPERIMENTS["dense"].with_chunks(chunk), n)
    weights = 4 * (MATRICES + VECTORS + EMBED)
    slots = n + 5
    cache = 3 * (2 * slots * (32 + 32) * 4 + slots * 4)
    assert (row.job.setting.weight_bytes, row.at.cache_bytes, row.at.peak_cache_bytes) == (weights, cache, cache)
    # a chunk holds the residual stream that it reads and the one that it returns, and positions
    stream = 2 * chunk * 48 * 4 + chunk * 4
    assert row.at.program == "prefill chunk"
    # XLA counts the table of pointers to a program's results, 8 bytes each
    pointers = row.at.peak_bytes - (weights + cache + stream + row.at.temp_bytes)
    assert 0 <= pointers <= 8 * 5
    # a row of float32 logits, the last row of the chunk, and the chunk's stream that is still there
    assert row.at.peaks["logits"] >= weights + cache + chunk * (48 * 4 + 4) + 48 * 4 + 97 * 4


def test_weights_in_8_bits_have_a_scale_for_each_output_channel():
    table = weight_table(TINY, jnp.bfloat16, 8)
    channels = 3 * ((6 + 2 + 2) * 32 + 48 + 80 + 48)
    assert table == {"matrices": MATRICES + 2 * channels, "embed": 2 * EMBED, "lm_head": 0, "vectors": 2 * VECTORS}
    whole, counted = (here(EXPERIMENTS["dense"], 64, weight_bits=bits) for bits in (None, 8))
    assert (
        whole.at.peak_bytes - counted.at.peak_bytes
        == whole.job.setting.weight_bytes - counted.job.setting.weight_bytes
        > 0
    )


CASES = [("dense", 48), ("snapkv", 48), ("snapkv", None)]
CASES += [pytest.param(name, 48, marks=pytest.mark.slow) for name in EXPERIMENTS if name not in ("dense", "snapkv")]


@pytest.mark.parametrize("name,chunk", CASES)
def test_caches_are_those_of_a_session_that_runs(name, chunk):
    experiment = replace(EXPERIMENTS[name], schedule=Chunked(chunk) if chunk else OneShot())
    n = 200
    job = make_job(TINY, name, experiment, small(1 << 40), Asked(new_tokens=5, dtype="float32"))
    found = job.timeline(n)
    session = Session(MODEL, experiment.recipe, n, 5, aux=job.aux, schedule=experiment.schedule)
    session.prefill(np.arange(n) % 97)
    assert found.cache_bytes == session.cache_bytes == experiment.recipe.bytes(TINY, n, 5, aux=job.aux)
    assert found.peak_cache_bytes == session.peak_cache_bytes == session.predicted_peak_cache_bytes()


def test_the_points_of_a_sweep_are_planned_as_they_would_run():
    settings = Settings(continuation=20, decode_steps=3, repeats=1, warmups=1, text="pride_and_prejudice")
    sweep = Sweep(("configs/dense.py", "configs/snapkv.py"), lengths=(128,), keep_ratio=0.6, chunk_size=48)
    found = specs(sweep, settings, models=["tiny"], seeds=(0, 1))
    told = []
    rows = planned_rows(found, {"tiny": TINY}, [small(1 << 40), small((1 << 30) + 1_024)], told.append)
    assert rows == told and [(r.job.method, r.fits) for r in rows] == [
        (name, fits) for fits in (True, False) for name in ("dense", "snapkv")
    ]
    points = [point for point, _ in jobs(found, {"tiny": Loaded(TINY, "")})]
    points = [point for point in points if point.seed == 0 and point.settings.text == "pride_and_prejudice"]
    for row, point in zip(rows, points, strict=False):
        session = make_session(MODEL, point.experiment, point.prompt, point.new_tokens)
        session.prefill(np.zeros(point.prompt, np.int32))
        assert (row.job.model.name, row.at.length, row.job.setting.new_tokens) == (
            "tiny",
            point.prompt,
            point.new_tokens,
        )
        assert (row.at.cache_bytes, row.at.peak_cache_bytes) == (session.cache_bytes, session.peak_cache_bytes)
        assert {"prefill chunk", "logits", "step of 20 tokens", "decode"} <= set(row.at.peaks)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_caches_count_what_a_recipe_counts(name):
    experiment = EXPERIMENTS[name].with_chunks(48)
    job = make_job(TINY, name, experiment, small(1 << 40), Asked(new_tokens=5, dtype="float32"))
    found = job.timeline(300)
    assert found.cache_bytes == experiment.recipe.bytes(TINY, 300, 5, aux=job.aux)
    assert found.peak_cache_bytes >= experiment.recipe.bytes(TINY, 300, 5, phase="prefill", aux=job.aux)


def test_temp_is_that_of_the_programs_that_a_session_compiles():
    experiment = EXPERIMENTS["dense"].with_chunks(48)
    session = Session(MODEL, experiment.recipe, 200, 5, schedule=experiment.schedule)
    assert here(experiment, 200).at.temp_bytes == session.compile(200, [1]).temp_bytes


def test_the_limit_fits_and_a_step_more_does_not():
    where, dense = small(20 * MIB), EXPERIMENTS["dense"]
    (row,) = plan(TINY, {"dense": dense}, [where], [9_000], chunk_size=64, **SETTINGS)
    inside, outside = (
        estimate(TINY, dense.with_chunks(64), n, 5, "float32", where, reserve_mib=0)
        for n in (row.limit_tokens, row.limit_tokens + 1_024)
    )
    assert row.limit_tokens % 1_024 == 0 and inside.fits and not outside.fits
    assert row.limit.need.program == inside.at.program and row.limit.need.peak_bytes == inside.at.peak_bytes


@pytest.mark.parametrize("power", [1.0, 0.3, 2.0])
def test_the_search_finds_the_last_that_fits_and_more_memory_never_means_less(power):
    found, calls = [], []
    for budget in (0.5, 1.0, 1.9, 2.0, 10.0, 1e6):

        def over(n, budget=budget):
            calls.append(n)
            return n**power - budget

        found.append(_last_that_fits(over, 1_000))
    assert found == [min(int(budget ** (1 / power) + 1e-9), 1_000) for budget in (0.5, 1.0, 1.9, 2.0, 10.0, 1e6)]
    assert found == sorted(found) and len(calls) < 6 * 32


def test_interpolation_is_within_3_percent_of_a_compilation():
    # scratch that grows with the context: what is kept of a prompt is chosen over all of it
    knorm = Experiment(Recipe((Segment(compress=KNorm(80)),)))
    chance = random.Random(7)  # noqa: S311, no secret
    low, high = 1_024, 60_000
    middle = round(math.exp(chance.uniform(math.log(low), math.log(high))))
    lengths, everything = [low, middle, high], [small(1 << 40)]
    first, between, last = plan(TINY, {"knorm": knorm}, everything, lengths, chunk_size=64, limits=False, **SETTINGS)
    assert (first.at.source, between.at.source, last.at.source) == ("compiled", "interpolated", "compiled")
    true = here(knorm.with_chunks(64), middle)
    assert between.at.cache_bytes == true.at.cache_bytes and between.at.peak_cache_bytes == true.at.peak_cache_bytes
    assert between.at.peak_bytes == pytest.approx(true.at.peak_bytes, rel=0.03)
    assert between.at.temp_bytes == pytest.approx(true.at.temp_bytes, rel=0.03)
    assert between.checks[-1].holds and first.at.peak_bytes < between.at.peak_bytes < last.at.peak_bytes


@pytest.mark.slow
def test_methods_that_read_the_prompt_in_one_step_are_compiled_at_every_length():
    minference = Experiment(Recipe(pattern=MInference(64, 64)))
    lengths = [1_024, 3_000, 9_000]
    rows = plan(TINY, {"minference": minference}, [small(1 << 40)], lengths, limits=False, **SETTINGS)
    assert [r.at.source for r in rows] == ["compiled"] * 3 and rows[1].job.experiment.schedule.chunk_size() is None
    assert rows[1].at.temp_bytes == here(minference, 3_000).at.temp_bytes


@pytest.mark.slow
def test_no_limit_where_memory_does_not_grow_and_none_where_weights_do_not_fit():
    window = {"window": EXPERIMENTS["window"]}
    _, row = plan(TINY, window, [small(20 * MIB)], [2_048, 9_000], chunk_size=64, **SETTINGS)
    assert (
        row.fits
        and row.limit_tokens is None
        and row.at.source == "compiled"
        and "memory does not grow with the context" in row.notes
    )
    (row,) = plan(TINY, window, [small(MIB // 2)], [2_048], chunk_size=64, **SETTINGS)
    assert not row.fits and row.limit_tokens == 0


def test_times_count_every_pair_of_query_and_key_once():
    n, chunk = 1_000, 64
    job = make_job(TINY, "dense", EXPERIMENTS["dense"].with_chunks(chunk), small(1 << 40), Asked(dtype="float32"))
    from lcx.plan.roofline import roofline

    found = roofline(job.setting, job.experiment, n, None, None, gpu_target("h200"))
    assert found.linear_flops == 2 * (MATRICES * n + EMBED)
    assert found.attention_flops == 3 * 6 * 4 * 32 * n * (n + 1) / 2
    # one step reads all weights, the embedding as the head, and the cache
    cache = 3 * n * (2 * (32 + 32) * 4 + 4)
    assert found.decode_bytes == 4 * (MATRICES + VECTORS + EMBED) + cache
    assert found.decode_s == found.decode_bytes / 4.8e12
    streaming = EXPERIMENTS["window"].with_chunks(chunk)
    seen = roofline(job.setting, streaming, n, None, None, gpu_target("h200")).attention_flops / (3 * 6 * 4 * 32)
    # 64 slots are full after the first chunk of 64
    assert seen == sum((64 if t >= 64 else 0) + t % 64 + 1 for t in range(n))


def test_a_model_without_a_published_split_gets_an_even_one_and_says_so():
    aux, note = planned_aux(Experiment(Recipe(duo()), HeadSplit(0.5)), shape("llama3-8b"))
    assert [len(layer["heads"]["streaming"]) for layer in aux] == [4] * 32
    assert "not measured" in note
    published, note = planned_aux(
        Experiment(Recipe(duo()), HeadSplit(0.5)),
        ModelConfig("Smollm2 135M 8k Lc100K Mix1 Ep2", 30, 576, 9, 3, 64, 1536, 49152, 8192),
    )
    assert note == "" and sum(len(layer["heads"]["streaming"]) for layer in published) == 45


def test_one_of_several_devices_holds_its_part():
    whole, half = TINY, shard(TINY, 2)
    assert (half.num_heads, half.num_kv_heads, half.d_ff, half.vocab_size) == (3, 1, 20, 49)
    full, part = (Recipe().bytes(config, 100) for config in (whole, half))
    # positions are on every device
    assert full - part == 3 * 100 * (32 + 32) * 4
    gpu("h200")
    one, two = (
        make_job(TINY, "dense", EXPERIMENTS["dense"].with_chunks(64), device(name)) for name in ("h200", "2xh200")
    )
    assert two.setting.config == half and "tensor parallel" in two.notes[-1]
    # a chunk also holds what the other device added to its residual stream
    alive = [job.timeline(100).parts[0].live_bytes - job.setting.weight_bytes for job in (one, two)]
    assert alive[1] - alive[0] == 64 * 48 * 2 - 3 * 228 * (32 + 32) * 2
    with pytest.raises(UserError, match="4 devices do not divide num_kv_heads=2 .* use 2"):
        shard(TINY, 4)


WRONG = {
    "device='h20'.*did you mean 'h200'": {"targets": ["h20"]},
    "device='0xh200'": {"targets": ["0xh200"]},
    "lengths=5,5": {"lengths": [5, 5]},
    "lengths: 0 must be": {"lengths": [0]},
    "kivi2: Kivi: head_dim=24": {"model": replace(TINY, head_dim=24)},
    "3 devices do not divide": {"targets": ["3xh200"]},
    "weight_bits=3": {"weight_bits": 3},
    "reserve_mib=99": {"targets": [small(MIB)], "reserve_mib": 99},
    "budget=8": {"experiments": {"snapkv": EXPERIMENTS["snapkv"]}, "budget": 8},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_refused_before_anything_is_compiled(message, nothing_compiles):
    asked = {
        "model": TINY,
        "experiments": {"kivi2": EXPERIMENTS["kivi2"]},
        "targets": [small(1 << 40)],
        "lengths": [64],
    }
    with pytest.raises(UserError, match=message):
        plan(**(asked | WRONG[message]))


def test_an_unknown_model_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"model='llama3-8'.*did you mean 'llama3-8b'"):
        shape("llama3-8")


def test_a_missing_compiler_is_one_line_that_says_what_to_install(monkeypatch, nothing_compiles):
    from jax.experimental import topologies

    def fails(**_):
        raise RuntimeError("no plugin\nand more")

    monkeypatch.setattr(topologies, "get_topology_desc", fails)
    compile_device.cache_clear()
    try:
        with pytest.raises(UserError, match=r"no plugin\).*pip install 'lcx\[plan\]'"):
            plan(TINY, {"dense": EXPERIMENTS["dense"]}, ["h200"], [64])
    finally:
        compile_device.cache_clear()


def command(*args):
    return subprocess.run(
        [sys.executable, "-m", "experiments.plan", *args],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_command_writes_rows_and_a_figure(tmp_path):
    sizes = {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_hidden_layers": 3,
    }
    others = {"intermediate_size": 40, "vocab_size": 97, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    config = {"architectures": ["LlamaForCausalLM"], **sizes, **others, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    asked = ["--config=configs/tova.py,configs/window.py", "--device=cpu", "--lengths=2048,8192", "--chunk_size=64"]
    done = command(f"--model={tmp_path}", *asked, f"--out={rows}", f"--figure={picture}", "--show_arithmetic")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(r["method"], r["length"]) for r in found] == [(m, n) for m in ("tova", "window") for n in (2_048, 8_192)]
    assert all(r["fits"] and r["source"] == "compiled" and r["times"] is None for r in found)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "Longest context on cpu" in done.stdout and "weights     matrices" in done.stdout


def test_wrong_flags_end_in_one_line():
    done = command("--model=llama3-8b", "--device=rtx409")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("plan: device='rtx409'") and done.stderr.count("\n") == 1


def test_the_check_runs_what_was_planned():
    settings = {
        "weight_bits": None,
        "budget": None,
        "keep_ratio": None,
        "new_tokens": 5,
        "dtype": "float32",
        "batch": 1,
    }
    (line,) = check(TINY, {"dense": EXPERIMENTS["dense"]}, [64], 64, settings)
    assert line.startswith("dense, 64 tokens: predicted") and "measured" in line
    with pytest.raises(UserError, match="does not run"):
        next(check(TINY, {"dense": EXPERIMENTS["dense"]}, [512], 64, settings | {"weight_bits": 8}))


def gpu(name: str) -> Device:
    found = device(name)
    try:
        compile_device(found.target)
    except UserError as error:
        pytest.skip(str(error))
    return found


def test_a_gpu_that_is_not_there():
    row = estimate(TINY, EXPERIMENTS["dense"].with_chunks(64), 1_000, 0, "bfloat16", gpu("h200"))
    assert (
        row.job.setting.weight_bytes == 2 * (MATRICES + VECTORS + EMBED)
        and row.job.device.memory_bytes == 143_771 * MIB
    )
    assert row.at.cache_bytes == 3 * 1_000 * (2 * 64 * 2 + 4)
    assert row.at.temp_bytes > 0 and row.fits and row.at.source == "compiled"


@pytest.mark.slow
@pytest.mark.parametrize("name", [p.stem for p in all_configs() if isinstance(load_config(p), Experiment)])
def test_what_a_compilation_leaves_out_changes_no_buffer(name):
    gpu("h200")
    experiment = load_config(ROOT / "configs" / f"{name}.py")
    model = replace(shape("llama3-8b"), num_layers=3)
    experiment = experiment if experiment.recipe.one_shot else experiment.with_chunks(2_048)
    # the kernels are not compiled for a CPU
    for target, implementation in ((None, "xla"), (gpu_target("h200"), None)):
        job = make_job(model, name, experiment, gpu("h200"), Asked(implementation=implementation))
        for part in job.timeline(20_000).parts:
            found = []
            for options in (None, compile_options(target)):
                # the options are no part of the key of JAX's own cache
                jax.clear_caches()
                done = compile_for(target, part.program, part.args, part.static, options).memory_analysis()
                found.append((done.temp_size_in_bytes, done.output_size_in_bytes, done.alias_size_in_bytes))
            assert found[0] == found[1], part.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "duo_int4", "kivi2", "snapkv"])
def test_llama3_8b_on_an_h200_at_a_random_length(name):
    experiment = load_config(ROOT / "configs" / f"{name}.py")
    middle = 131_072 + zlib.crc32(name.encode()) % 900_000
    lengths = [131_072, middle, 1_048_576]
    _, row, _ = plan(shape("llama3-8b"), {name: experiment}, [gpu("h200")], lengths)
    true = estimate(shape("llama3-8b"), experiment.with_chunks(2_048), middle, 128, "bfloat16", gpu("h200"))
    assert row.at.peak_bytes == pytest.approx(true.at.peak_bytes, rel=0.03)
    assert row.at.temp_bytes == pytest.approx(true.at.temp_bytes, rel=0.03)
