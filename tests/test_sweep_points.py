"""Points, what a row holds, and what a folder refuses; on a tiny random model."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_compilation as quick_compilation

from lcx.errors import UserError
from lcx.experiment import Sweep
from lcx.model_config import ModelConfig, weight_bytes
from lcx.models.decoder import Layers, Model, random_weights
from lcx.models.loading import Pretrained
from lcx.sweep.bench import Bench
from lcx.sweep.points import Loaded, jobs, resolve, specs
from lcx.sweep.rows import read_rows
from lcx.sweep.runner import open_sweep, resolve_all, run_here
from lcx.sweep.schema import BY_NAME, COLUMNS, RATIOS, ratios, whole_row
from lcx.sweep.settings import Settings
from lcx.sweep.store import Owner

TINY = ModelConfig("tiny", 3, 48, 6, 2, 32, 40, 97, 512)
CONFIGS = ("configs/dense.py", "configs/sink_window.py", "configs/snapkv.py", "configs/kivi2.py")
SETTINGS = Settings(continuation=16, decode_steps=3, repeats=2)
LOADED = {"tiny": Loaded(TINY, "0" * 64)}


class Letters:
    """A tokenizer of the tiny model: a token a character."""

    front = ()

    def encode(self, text):
        return [ord(c) % 97 for c in text]


def pretrained(layers=None):
    layers = layers or Layers.of(Model(TINY, random_weights(TINY)))
    return Pretrained(layers, Letters(), "tiny", "0" * 64, "none")


def resolved(configs=CONFIGS, lengths=(208,), settings=SETTINGS, **axes):
    axes = {"keep_ratios": (0.6,), "texts": ("pride_and_prejudice",), **axes}
    return resolve_all(Sweep(configs, lengths=lengths), settings, LOADED, **axes)


@pytest.fixture(scope="module")
def rows():
    return run_here(pretrained(), resolved()[0])


def test_a_row_has_every_column_in_its_type(rows):
    kinds = {"str": str, "int": int, "float": float, "json": dict}
    empty = {"message", "device_peak_bytes", "tasks", "host", "child_start_s", "wall_s", "finished"}
    kept = {"budget", "keep_ratio"}
    paired = {c.name for c in COLUMNS if c.name.endswith(("se_tokens", "se_passages", "far_se"))}
    for row in rows:
        absent = empty | (kept if row["method"] in ("dense", "kivi2") else set())
        absent |= {"dense_ttft_s", "dense_decode_s"} if row["method"] == "dense" else set()
        # no token of a random model needs its far context
        assert row["far_tokens"] == 0
        absent |= {c.name for c in COLUMNS if "far_" in c.name} - {"far_tokens"}
        assert list(row) == [c.name for c in (*COLUMNS, *RATIOS)]
        assert row["status"] == "ok", row["message"]
        for column in COLUMNS:
            value = row[column.name]
            assert (value is None) == (column.name in absent), (row["method"], column.name)
            assert value is None or type(value) is (list if column.name == "notes" else kinds[column.kind]), column.name
        assert all(row[name] >= 0 for name in paired - absent)


def test_bytes_of_a_row_are_those_of_the_arrays(rows):
    for row in rows:
        assert row["cache_bytes"] == row["recipe_bytes"]
        assert row["cache_bytes"] == sum(arrays for arrays, _ in row["segment_bytes"].values())
        assert all(arrays == predicted for arrays, predicted in row["segment_bytes"].values())
        assert row["weight_bytes"] == weight_bytes(TINY, jnp.dtype(jnp.float32))
        assert row["decode_alias_bytes"] >= 0.9 * row["cache_bytes"] / TINY.num_layers
        for phase in ("prefill", "decode"):
            parts = {kind: row[f"{phase}_{kind}_bytes"] for kind in ("argument", "output", "temp", "alias")}
            assert row[f"{phase}_peak_bytes"] == sum(parts.values()) - 2 * parts["alias"]
    assert max(len(r["segment_bytes"]) for r in rows) == 3, "KIVI's tail, its recent page and pages"


@pytest.mark.parametrize("chunk", [None, 48])
@pytest.mark.parametrize("config", ["configs/dense.py", "configs/snapkv.py", "configs/kivi2.py"])
def test_predicted_peak_of_caches_is_what_a_prefill_holds(config, chunk):
    found = specs(
        Sweep((config,), lengths=(208,), chunk_size=chunk),
        SETTINGS,
        models=["tiny"],
        keep_ratios=(0.6,),
        texts=("ledger",),
    )
    ((point, _),) = jobs(found, LOADED)
    from lcx.measure.quality import make_session

    session = make_session(pretrained().layers, point.experiment, point.prompt, point.new_tokens)
    session.prefill(np.zeros(point.prompt, np.int32))
    assert session.predicted_peak_cache_bytes() == session.peak_cache_bytes > 0


def test_ratios_are_against_the_dense_row_of_the_same_cell(rows):
    dense = {r["length"]: r for r in rows if r["method"] == "dense"}
    for row in rows:
        of = dense[row["length"]]
        assert row["cache_over_dense"] == row["cache_bytes"] / of["cache_bytes"]
        assert row["nll_minus_dense"] == row["nll"] - of["nll"]
        # in turns: the times of the row itself
        turns = row["decode_s"] if row is of else row["dense_decode_s"]
        assert row["decode_over_dense"] == row["decode_s"] / turns
        assert row["prompt_nll_minus_dense"] == row["prompt_nll"] - of["prompt_nll"]
        assert row["nll_minus_dense_se"] == max(row["se_tokens"], row["se_passages"])
        # of 192 tokens KIVI has quantised 128 keys and 64 values
        assert (row["kl"] > 1e-6) == (row["method"] != "dense")
        assert (row["acts_in_decode"] == "no") == (row["method"] in ("dense", "snapkv"))
        # the newest whole page is exact in values: none has fallen into the last segment yet
        empty = ["segment 'pages' held no token"] if row["method"] == "kivi2" else []
        assert [note for note in row["notes"] if "nothing" in note or "held no" in note] == empty
    # times of two machines are not divided
    elsewhere = ratios({**rows[1], "host": "far", "dense_decode_s": None}, rows[0])
    assert elsewhere["decode_over_dense"] is None and elsewhere["cache_over_dense"] is not None
    assert set(ratios({"nll": 1.0}, None).values()) == {None}


def test_what_is_not_measured_is_the_same_again(rows):
    again = run_here(pretrained(), resolved(CONFIGS[:2])[0])
    fixed = [c.name for c in (*COLUMNS, *RATIOS) if not c.measured]
    assert [[r[n] for n in fixed] for r in again] == [[r[n] for n in fixed] for r in rows[:2]]


def test_a_child_keeps_the_reference_on_disk_and_finds_the_same(tmp_path, rows):
    points = resolved()[0]
    first = Bench(pretrained(), tmp_path)
    assert first.row(points[0])["nll"] == rows[0]["nll"]
    second = Bench(pretrained(), tmp_path)
    for point, row in zip(points[1:3], rows[1:3], strict=True):
        again = second.row(point, points[0])
        assert again["kl"] == row["kl"] > 0 and again["se_tokens"] == row["se_tokens"] > 0
    # a reference that failed leaves no stream: no divergence, but the rest
    alone = Bench(pretrained(), tmp_path / "none").row(points[1], points[0])
    assert alone["status"] == "ok" and alone.get("kl") is None and alone["nll"] == rows[1]["nll"]


def test_batch_rows_and_seeds_read_other_passages():
    (point,) = resolved(CONFIGS[:1])[0]
    bench = Bench(pretrained())
    one = bench.passages(point)
    assert one.shape == (2, 1, point.text_tokens)
    four = bench.passages(replace(point, batch=4))
    assert (four[0, 0] == one[0, 0]).all() and len(np.unique(four.reshape(8, -1), axis=0)) == 8
    seeded = bench.passages(replace(point, seed=3))
    assert (seeded == bench.passages(replace(point, seed=3))).all() and (seeded != one).any()
    (row,) = run_here(pretrained(), resolved(CONFIGS[:1], batches=(3,))[0])
    assert row["status"] == "ok" and row["bits_per_value"] == 32 + 32 / (2 * 32 * 2)  # a position for both KV heads
    assert row["cache_bytes"] == row["recipe_bytes"]


# ---- what goes wrong


@pytest.mark.parametrize("layer", [0, 2])
def test_a_value_that_is_not_finite_names_layer_and_step(layer):
    layers = Layers.of(Model(TINY, random_weights(TINY)))
    graph, state = layers.layers[layer]
    poisoned = jax.tree.map(lambda x: x.at[0].set(jnp.nan), state)
    whole = tuple((graph, poisoned) if i == layer else pair for i, pair in enumerate(layers.layers))
    points = resolved(CONFIGS[:1])[0]
    row = Bench(pretrained(replace(layers, layers=whole))).row(points[0])
    assert row["status"] == "nonfinite"
    assert f"layer {layer} " in row["message"] and "prefill step 1" in row["message"]


def test_a_point_over_the_limit_is_not_run():
    points = resolved(CONFIGS[:1], settings=replace(SETTINGS, memory_limit=100_000))[0]
    bench = Bench(pretrained())
    row = bench.row(points[0])
    assert row["status"] == "oom_predicted" and "limit 100,000" in row["message"]
    assert row["peak_bytes"] > 100_000 and "ttft_s" not in row and bench.references.get(points[0].key) is None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "oom"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "oom"),
        (RuntimeError("INTERNAL: something\nelse"), "error"),
        (UserError("text=..."), "error"),
    ],
)
def test_errors_of_a_point_are_its_status(monkeypatch, error, status):
    def fail(*_):
        raise error

    bench = Bench(pretrained())
    monkeypatch.setattr(bench, "measure", fail)
    row = bench.row(resolved(CONFIGS[:1])[0][0])
    assert row["status"] == status and "\n" not in row["message"] and row["message"]


# ---- keys and folders


def test_keys_follow_everything_that_a_row_depends_on():
    (base,) = resolved(CONFIGS[2:3])[0]
    changed = [
        replace(base, length=209),
        replace(base, batch=2),
        replace(base, dtype="bfloat16"),
        replace(base, seed=1),
        replace(base, model="other"),
        replace(base, model_sha256="1" * 64),
        replace(base, aux_sha256="1" * 64),
        replace(base, text_sha256="1" * 64),
        replace(base, sources="1" * 64),
        replace(base, settings=replace(SETTINGS, text="ledger")),
        replace(base, settings=replace(SETTINGS, passages=3)),
        replace(base, settings=replace(SETTINGS, protocols=("prompt",))),
        replace(base, settings=replace(SETTINGS, repeats=3)),
        replace(base, experiment=base.experiment.with_chunks(16)),
        replace(base, experiment=base.experiment.with_budget(192, 100)),
    ]
    keys = {p.key for p in (base, *changed)}
    assert len(keys) == len(changed) + 1
    assert resolved(CONFIGS[2:3])[0][0].key == base.key


def test_a_spec_resolves_to_the_same_point_elsewhere():
    points, found = resolved()
    for point, job in zip(points, found, strict=True):
        assert resolve(json.loads(json.dumps(job.spec)), LOADED["tiny"]).key == job.key == point.key
    assert [j.reference for j in found] == [None, *[found[0].key] * 3]


def fill(store):
    me = Owner.here()
    while (job := store.claim(me)) is not None:
        store.finish(me, job.key, {"status": "ok", "nll": 2.0, "cache_bytes": 10, "host": "h", "device": "d"})


def test_the_same_folder_continues_and_another_sweep_is_refused(tmp_path):
    store = open_sweep(tmp_path, resolved()[1])
    fill(store)
    assert open_sweep(tmp_path, resolved()[1]).unfinished() == 0
    with pytest.raises(UserError, match=r"holds another sweep: .*keep_ratio 0.6 -> 0.7.*--fork=DIR"):
        open_sweep(tmp_path, resolved(keep_ratios=(0.7,))[1])
    with pytest.raises(UserError, match="new: dense at 224 tokens"):
        open_sweep(tmp_path, resolved(lengths=(208, 224))[1])
    with pytest.raises(UserError, match=r"settings.repeats 2 -> 4"):
        open_sweep(tmp_path, resolved(settings=replace(SETTINGS, repeats=4))[1])


def test_a_fork_takes_the_rows_that_stay_the_same(tmp_path):
    old = open_sweep(tmp_path / "old", resolved()[1])
    fill(old)
    new = open_sweep(tmp_path / "old", resolved(lengths=(208, 224))[1], tmp_path / "new")
    assert new.unfinished() == 4 and new.rows() == old.rows()
    assert [r["status"] for r in read_rows(new)] == ["ok"] * 4 + ["todo"] * 4
    with pytest.raises(UserError, match="holds another sweep already"):
        open_sweep(tmp_path / "old", resolved()[1], tmp_path / "new")
    with pytest.raises(UserError, match="holds no sweep"):
        open_sweep(tmp_path / "nothing", resolved()[1], tmp_path / "newer")


def test_rows_of_unfinished_points_say_so(tmp_path):
    store = open_sweep(tmp_path, resolved()[1])
    rows = read_rows(store)
    assert [r["method"] for r in rows] == [Path(c).stem for c in CONFIGS]
    assert {r["status"] for r in rows} == {"todo"} and {r["nll"] for r in rows} == {None}
    assert whole_row("k", {}, "todo", None)["status"] == "todo"
    assert BY_NAME["ttft_s"].measured and not BY_NAME["nll"].measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (8,)}, "must be above the continuation"),
        ({"lengths": (600,)}, "beyond the context of tiny, 512"),
        ({"lengths": (208, 208)}, "lengths=(208, 208): give at least one, each once"),
        ({"lengths": ()}, "lengths=()"),
        ({"configs": ("configs/dense.py", "configs/dense.py")}, "'dense' appears twice"),
        ({"configs": ("configs/smollm2_quick.py",)}, "is a sweep; allowed are configs of one method"),
        ({"configs": ()}, "configs=()"),
        ({"dtypes": ()}, "dtypes=()"),
    ],
)
def test_points_that_cannot_run_are_one_line(change, message):
    with pytest.raises(UserError) as error:
        resolved(**change)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_are_checked():
    for change, message in (
        ({"repeats": 0}, "repeats=0 must be an integer of at least 1"),
        ({"warmups": -1}, "warmups=-1"),
        ({"tasks": ("niah",)}, "tasks='niah'; allowed are ppl"),
    ):
        with pytest.raises(UserError, match=message):
            replace(SETTINGS, **change)


def test_the_docs_list_every_column():
    text = (Path(__file__).parent.parent / "docs" / "sweeps.md").read_text(encoding="utf-8")
    for column in (*COLUMNS, *RATIOS):
        meaning = column.meaning.replace("|", r"\|")
        assert f"| `{column.name}` | {column.kind} | {meaning} | {'measured' if column.measured else ''} |" in text


def test_a_sweep_imports_nothing_of_the_report():
    for path in sorted((Path(__file__).parent.parent / "lcx" / "sweep").glob("*.py")):
        imports = re.findall(r"^\s*(?:from|import) (lcx\S*)", path.read_text(), re.MULTILINE)
        up = [name for name in imports if name.startswith("lcx.report")]
        assert not up, f"{path.name}: the report reads sweeps, not the other way round"
