"""DuoAttention's head split: which heads stream, what that frees, and what they see, against tests/naive_model.py."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path

import numpy as np
import pytest
from naive_model import NaiveModel
from pretrained_support import hf_json, hf_weights, small_config, write_gguf, write_hf
from tiny import ATOL, TINY, layers, text, weights
from tiny import quick_compilation as quick_compilation

from lcx import texts
from lcx.artefacts import head_mass
from lcx.artefacts.head_split import FOLDER, HeadSplit, split_by_score
from lcx.axes import Exact
from lcx.cache import device_bytes
from lcx.codecs.exact import Cast
from lcx.codecs.int_token import Int
from lcx.errors import UserError
from lcx.model_config import ModelConfig
from lcx.models.decoder import Layers, Model
from lcx.models.loading import tensors_sha256
from lcx.policies.duo import duo
from lcx.pretrained.checkpoints import load_gguf, load_hf
from lcx.recipe import Recipe
from lcx.schedules.chunked import Chunked
from lcx.session import Session

# an odd number of KV heads splits unevenly
MODEL = replace(TINY, name="three", num_kv_heads=3)
LOCAL = replace(MODEL, name="three-window", window=6, global_every=2)
# layers with 0, 2 and 3 streaming heads of 3; each shape of a layer compiles once
SCORES = np.array([[7, 8, 9], [1, 10, 2], [3, 4, 5]])
STREAMING = [[], [0, 2], [0, 1, 2]]
SPLIT = split_by_score(SCORES, 0.6)
EVEN = split_by_score([[0, 1, 0]] * 3, 0.7)
SINK, WINDOW = 2, 5
DUO = Recipe(duo(SINK, WINDOW))
# all runs have these sizes, so that they share their programs
PROMPT, TOTAL, CHUNK = 18, 25, 7


def streaming_of(aux):
    return [layer["heads"]["streaming"].tolist() for layer in aux]


def run(recipe, tokens, aux=SPLIT, *, prompt=PROMPT, chunk=None, dtype="float32"):
    """Logits after the prompt and after each token that follows it, and the session."""
    schedule = None if chunk is None else Chunked(chunk)
    session = Session(layers(MODEL, 3, dtype), recipe, prompt, TOTAL - prompt, aux=aux, schedule=schedule)
    logits = [session.prefill(tokens[:prompt])] + [session.step([t]) for t in tokens[prompt:]]
    return np.concatenate(logits), session


def test_lowest_scores_of_the_whole_model_stream():
    assert streaming_of(SPLIT) == STREAMING
    for layer in SPLIT:
        assert sorted([*layer["heads"]["retrieval"], *layer["heads"]["streaming"]]) == [0, 1, 2]
        assert {h.dtype for h in layer["heads"].values()} == {np.dtype(np.int32)}


def authors_streaming_heads(scores, sparsity):
    """Return bool like scores, as sparsify_attention_heads of the authors' duo_attn/utils.py, for scores without ties."""
    threshold = 2 if sparsity >= 1 else -1 if sparsity <= 0 else np.quantile(scores, sparsity)
    return ~(scores >= threshold)


@pytest.mark.parametrize("seed", range(20))
def test_streaming_heads_are_those_below_the_authors_quantile(seed):
    rng = np.random.default_rng(seed)
    scores = rng.random((rng.integers(1, 9), rng.integers(1, 9)))
    for fraction in (0, 0.25, 0.3, 0.5, 0.75, float(rng.random()), 1):
        want = [np.flatnonzero(row).tolist() for row in authors_streaming_heads(scores, fraction)]
        assert streaming_of(split_by_score(scores, fraction)) == want, (scores.shape, fraction)


@pytest.mark.parametrize("fraction, count", [(0, 0), (0.1, 1), (0.32, 3), (0.5, 4), (0.51, 5), (1, 9)])
def test_number_of_streaming_heads_is_that_of_the_quantile(fraction, count):
    assert sum(map(len, streaming_of(split_by_score(SCORES, fraction)))) == count
    # equal scores change nothing about the number: the first heads stream
    tied = streaming_of(split_by_score(np.zeros((3, 3)), fraction))
    assert [(i, k) for i, heads in enumerate(tied) for k in heads] == [divmod(n, 3) for n in range(count)]


def far_mass_oracle(config, tokens, first=SINK + WINDOW):
    naive = NaiveModel(config, weights(config, 3))
    naive.step(tokens)
    distance = np.arange(len(tokens))[:, None] - np.arange(len(tokens))
    far = (distance >= WINDOW) & (np.arange(len(tokens)) >= SINK)
    share = [[(held.prob * far).sum(-1)[:, first:].mean() for held in heads] for heads in naive.held]
    return np.array(share)


@pytest.mark.parametrize("config, chunk", [(MODEL, 37), (MODEL, 16), (LOCAL, 16)], ids=["one step", "chunks", "window"])
def test_far_mass_equals_numpy_decoder(config, chunk):
    tokens = text(37, 1)
    found = head_mass.far_mass(layers(config, 3), tokens, SINK, WINDOW, chunk)
    # f32 through 3 layers, shares up to 0.8
    np.testing.assert_allclose(found, far_mass_oracle(config, tokens), atol=2e-5)


def test_far_mass_of_the_queries_of_a_second_copy():
    passage = text(18, 1)
    tokens = np.concatenate([passage, passage])
    got = head_mass.far_mass(layers(MODEL, 3), tokens, SINK, WINDOW, 16, first=18)
    np.testing.assert_allclose(got, far_mass_oracle(MODEL, tokens, 18), atol=2e-5)
    assert np.abs(got - far_mass_oracle(MODEL, tokens)).max() > 1e-3
    for first in (SINK + WINDOW - 1, 36):
        with pytest.raises(UserError, match=rf"first={first} must be from sink \+ window = 7 to 35"):
            head_mass.far_mass(layers(MODEL, 3), tokens, SINK, WINDOW, first=first)


def test_far_mass_refuses_a_text_without_far_tokens():
    with pytest.raises(UserError, match=r"tokens=7 must be above sink \+ window = 7"):
        head_mass.far_mass(layers(MODEL, 3), text(7, 0), SINK, WINDOW)


def test_streaming_rows_are_freed():
    _, session = run(DUO, text(TOTAL, 0), chunk=CHUNK)
    for layer, heads in zip(session.cache, STREAMING, strict=True):
        streaming, retrieval = layer["streaming"], layer["retrieval"]
        assert streaming.payload["v"].shape == (1, len(heads), SINK + WINDOW, MODEL.head_dim)
        assert retrieval.payload["v"].shape == (1, 3 - len(heads), TOTAL, MODEL.head_dim)
        if heads:
            assert sorted(np.asarray(streaming.pos)[0, 0]) == [0, 1, 20, 21, 22, 23, 24]
    assert DUO.bytes(MODEL, PROMPT, TOTAL - PROMPT, aux=SPLIT) == session.cache_bytes


@pytest.mark.parametrize("fraction", [0, 0.5, 1])
@pytest.mark.parametrize("codec", [Exact(), Int(4)], ids=["exact", "int4"])
def test_bytes_known_beforehand_are_those_of_the_arrays(codec, fraction):
    recipe, aux = Recipe(duo(SINK, WINDOW, codec)), split_by_score(SCORES, fraction)
    assert recipe.bytes(MODEL, 20, 2, aux=aux) == device_bytes(recipe.init(MODEL, 20, 2, aux=aux))


def test_one_token_at_a_time_equals_a_mask_per_head():
    """A streaming head sees sinks, the window that it kept, and the token itself."""
    tokens = text(TOTAL, 2)
    heads = cycle([(layer, head) for layer in range(3) for head in range(3)])

    def allow(q_pos, kv_pos):
        layer, head = next(heads)
        return (kv_pos < SINK) | (q_pos - kv_pos <= WINDOW) | (head not in STREAMING[layer])

    naive = NaiveModel(MODEL, weights(MODEL, 3), allow=allow)
    got, _ = run(DUO, tokens, prompt=1)
    np.testing.assert_allclose(got, naive.logits(naive.step(tokens)), atol=ATOL)


@pytest.mark.parametrize("chunk", [CHUNK, 1])
def test_each_step_attends_first_and_forgets_afterwards(chunk):
    tokens = text(TOTAL, 3)
    layer = cycle(range(3))

    def keep(heads):
        streams = STREAMING[next(layer)]
        kept = lambda pos: np.flatnonzero((pos < SINK) | (pos > pos.max() - WINDOW))
        return [kept(h.pos) if i in streams else np.arange(len(h.pos)) for i, h in enumerate(heads)]

    naive = NaiveModel(MODEL, weights(MODEL, 3), keep=keep)
    bounds = [*range(0, PROMPT, chunk), *range(PROMPT, TOTAL + 1)]
    rows = [naive.step(tokens[a:b])[-1] for a, b in pairwise(bounds)]
    got, _ = run(DUO, tokens, chunk=chunk)
    np.testing.assert_allclose(got, naive.logits(np.stack(rows))[-len(got) :], atol=ATOL)


def test_streaming_heads_forget():
    """Without this, the equalities with dense below could hold for any recipe."""
    tokens = text(TOTAL, 2)
    dense, _ = run(Recipe(), tokens, None, prompt=1)
    got, _ = run(DUO, tokens, prompt=1)
    apart = np.abs(got - dense).max(-1)
    assert apart[: SINK + WINDOW].max() < ATOL and apart[SINK + WINDOW + 1 :].min() > 0.1


def test_equals_dense_when_all_heads_retrieve():
    tokens = text(TOTAL, 4)
    dense, _ = run(Recipe(), tokens, None, chunk=CHUNK)
    got, _ = run(DUO, tokens, split_by_score(SCORES, 0), chunk=CHUNK)
    np.testing.assert_allclose(got, dense, atol=1e-5)  # f32, the same keys in the same tiles


def test_equals_dense_at_16_bits_when_all_heads_retrieve():
    tokens = text(TOTAL, 4)
    dense, _ = run(Recipe(), tokens, None, prompt=TOTAL, chunk=CHUNK, dtype="bfloat16")
    recipe = Recipe(duo(SINK, WINDOW, Cast("bfloat16")))
    got, _ = run(recipe, tokens, split_by_score(SCORES, 0), prompt=TOTAL, chunk=CHUNK, dtype="bfloat16")
    # a bf16 model's keys and values are stored exactly; other sums may round a bf16 activation the other way
    np.testing.assert_allclose(got, dense, atol=0.1)


@pytest.mark.parametrize("aux", [EVEN, split_by_score(SCORES, 1)], ids=["some", "all"])
def test_equals_dense_while_sink_and_window_cover_the_text(aux):
    tokens = text(TOTAL, 5)
    dense, _ = run(Recipe(), tokens, None, chunk=CHUNK)
    got, _ = run(Recipe(duo(4, TOTAL - 4)), tokens, aux, chunk=CHUNK)
    np.testing.assert_allclose(got, dense, atol=1e-4)  # f32, another order of the heads


def test_prompt_in_one_step_is_dense_for_every_head():
    tokens = text(TOTAL, 5)
    dense, _ = run(Recipe(), tokens, None)
    got, _ = run(DUO, tokens, split_by_score(SCORES, 1))
    np.testing.assert_allclose(got[0], dense[0], atol=1e-4)
    assert np.abs(got[2:] - dense[2:]).max() > 0.1


def test_composes_with_4_bits_and_chunks():
    tokens = text(TOTAL, 6)
    exact, _ = run(DUO, tokens, EVEN, chunk=CHUNK)
    got, session = run(Recipe(duo(SINK, WINDOW, Int(4))), tokens, EVEN, chunk=CHUNK)
    assert np.isfinite(got).all()
    assert session.cache[0]["streaming"].payload["v"].shape == (1, 2, SINK + WINDOW, MODEL.head_dim // 2)
    # 16 levels a token leave the direction of random logits, not their digits
    assert np.corrcoef(got.ravel(), exact.ravel())[0, 1] > 0.8


SMOLLM2 = ModelConfig("Smollm2 135M 8k Lc100K Mix1 Ep2", 30, 576, 9, 3, 64, 1536, 49152, 8192)
SHIPPED = FOLDER / "smollm2-135m.json"


def test_half_the_heads_streaming_save_half_of_a_32k_cache():
    T, row = 32_768, 2 * SMOLLM2.head_dim * 4
    aux = HeadSplit(0.5).load(SMOLLM2)
    dense = Recipe().bytes(SMOLLM2, T)
    got = Recipe(duo()).bytes(SMOLLM2, T, aux=aux)
    kept = 45 * T + 45 * (64 + 256)
    # int32 positions are stored once for the rows of a segment in a layer
    some = {kind: sum(len(layer["heads"][kind]) > 0 for layer in aux) for kind in ("retrieval", "streaming")}
    positions = 4 * (some["retrieval"] * T + some["streaming"] * 320)
    assert got == kept * row + positions
    assert 1.97 < dense / got < 2


def test_shipped_split_is_a_measurement_of_this_model_and_text():
    record = json.loads(SHIPPED.read_text(encoding="utf-8"))
    assert record["config_name"] == SMOLLM2.name and record["text_sha256"] == texts.TEXTS[record["text"]].sha256
    scores = np.array(record["scores"])
    assert scores.shape == (30, 3) and scores.min() >= 0 and scores.max() <= 1
    streams = streaming_of(HeadSplit(0.5).load(SMOLLM2))
    mask = np.array([[head in heads for head in range(3)] for heads in streams])
    assert mask.sum() == 45 and scores[mask].max() <= scores[~mask].min()
    assert record["method"] == head_mass.REPEATED and record["copies"] == 2


def test_written_record_comes_back(tmp_path):
    record = json.loads(SHIPPED.read_text(encoding="utf-8"))
    head_mass.write(record, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == SHIPPED.read_bytes()
    again = HeadSplit(0.25, file=str(tmp_path / "again.json")).load(SMOLLM2)
    assert streaming_of(again) == streaming_of(HeadSplit(0.25).load(SMOLLM2))


def refusal(split, model=SMOLLM2):
    with pytest.raises(UserError) as caught:
        split.load(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_models_are_refused(tmp_path):
    missing = refusal(HeadSplit(), replace(SMOLLM2, name="Smollm2 360M", d_model=960))
    assert re.match(r"HeadSplit: model='Smollm2 360M' .* 'Smollm2 135M 8k .*experiments.calibrate", missing)
    assert "has no head split" in refusal(HeadSplit(), replace(SMOLLM2, num_layers=31))
    assert "is for sizes" in refusal(HeadSplit(file=str(SHIPPED)), replace(SMOLLM2, num_layers=31))
    # a file that the user names is for whatever model has its sizes
    assert len(HeadSplit(file=str(SHIPPED)).load(replace(SMOLLM2, name="my-tune"))) == 30


def test_the_same_weights_get_the_shipped_split_under_any_name():
    """Sizes choose the split; the sha256 of the tensors says that it is theirs, whatever the file or the name."""
    folder, record = replace(SMOLLM2, name="LlamaForCausalLM"), json.loads(SHIPPED.read_text(encoding="utf-8"))
    assert streaming_of(HeadSplit().load(folder)) == streaming_of(HeadSplit().load(SMOLLM2))
    asked = []
    known = lambda digest: lambda: asked.append(digest) or digest
    for digest in record["tensors_sha256"].values():
        HeadSplit().check_weights(folder, "a folder", known(digest))
    assert asked == list(record["tensors_sha256"].values())
    # the file itself needs no second look
    HeadSplit().check_weights(SMOLLM2, record["model_sha256"], known("x"))
    assert len(asked) == 2
    for tensors in (None, known("x")):
        with pytest.raises(
            UserError, match="'LlamaForCausalLM' is of other weights, 'smollm2-135m'; make one"
        ) as caught:
            HeadSplit().check_weights(folder, "a folder", tensors)
        assert "\n" not in str(caught.value)
    HeadSplit(file=str(SHIPPED)).check_weights(folder, "a folder", known("x"))


def test_files_with_the_first_four_sizes_are_read(tmp_path):
    record = json.loads(SHIPPED.read_text(encoding="utf-8"))
    record["sizes"] = {n: record["sizes"][n] for n in ("num_layers", "num_heads", "num_kv_heads", "head_dim")}
    head_mass.write(record, tmp_path / "old.json")
    assert len(HeadSplit(file=str(tmp_path / "old.json")).load(SMOLLM2)) == 30


def test_tensors_have_one_sha256_in_every_type_that_holds_their_values():
    wide, half = layers(MODEL, 3), layers(MODEL, 3, "bfloat16")
    digests = {tensors_sha256(wide), tensors_sha256(half), tensors_sha256(layers(MODEL, 4))}
    assert len(digests) == 3
    assert tensors_sha256(wide, "float32") == tensors_sha256(wide)
    assert tensors_sha256(wide, "bfloat16") == tensors_sha256(half) == tensors_sha256(half, "float32")


def test_a_gguf_file_and_a_folder_of_the_same_weights_have_one_sha256(tmp_path, monkeypatch):
    monkeypatch.setenv("LCX_CACHE", str(tmp_path / "cache"))
    config = small_config("llama")
    stored = hf_weights(config)
    gguf, arrays, *_, file_sha256 = load_gguf(write_gguf(tmp_path / "a.gguf", "llama", config, stored))
    folder, *rest = load_hf(write_hf(tmp_path / "a", hf_json("llama", config), stored, shards=2))
    assert rest[1] != file_sha256
    digests = [tensors_sha256(Layers.of(Model(c, a))) for c, a in ((gguf, arrays), (folder, rest[0]))]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "content, problem", [("{", "not a JSON mapping"), ("[1]", "not a JSON mapping"), ("{}", "sizes None")]
)
def test_files_of_another_kind_are_refused(tmp_path, content, problem):
    file = tmp_path / "split.json"
    assert "cannot be read" in refusal(HeadSplit(file=str(file)))
    file.write_text(content, encoding="utf-8")
    assert problem in refusal(HeadSplit(file=str(file)))


@pytest.mark.parametrize(
    "scores",
    [None, "x", [[0.5] * 3] * 29, [[0.5] * 3] * 29 + [[0.5]], [[0.5, 0.5, "y"]] * 30, [[float("nan")] * 3] * 30],
    ids=["none", "text", "short", "ragged", "words", "nan"],
)
def test_wrong_scores_are_refused(tmp_path, scores):
    record = json.loads(SHIPPED.read_text(encoding="utf-8")) | {"scores": scores}
    (tmp_path / "split.json").write_text(json.dumps(record), encoding="utf-8")
    assert "must be 30 x 3 finite numbers" in refusal(HeadSplit(file=str(tmp_path / "split.json")))


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan"), True])
def test_fractions_out_of_range_are_refused(fraction):
    with pytest.raises(UserError, match="streaming=.* must be a fraction from 0 to 1"):
        HeadSplit(fraction)


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--tokens=many", "--out=x.json"], "--tokens=many"),
        ([], "out=''"),
        (["--out=no/such/folder/x.json"], "out='no/such/folder/x.json'"),
        (["--out=x.json", "--model=smollm2-135n"], "did you mean 'smollm2-135m'"),
    ],
)
def test_calibrate_refuses_bad_flags_in_one_line(tmp_path, flags, problem):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "experiments.calibrate", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert problem in done.stderr and done.stderr.count("\n") == 1
