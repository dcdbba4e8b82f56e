"""Checkpoints of each family give the logits of transformers on the same weights, and README says which families load."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from pretrained_support import hf_json, hf_weights, small_config, write_gguf, write_hf
from tiny import quick_compilation as quick_compilation

from experiments.peers import small_checkpoints as small
from lcx.errors import UserError
from lcx.model_config import Rope
from lcx.models.decoder import Layers, Model
from lcx.models.rope import inverse_frequencies
from lcx.pretrained import CheckpointFormatError, CheckpointMismatch, families
from lcx.pretrained.checkpoints import load_gguf, load_hf
from lcx.pretrained.gguf_header import GGUFFile
from lcx.pretrained.model_configs import config_from_gguf, config_from_hf
from lcx.recipe import Recipe
from lcx.schedules.chunked import Chunked
from lcx.session import Session

ROOT = Path(__file__).parent.parent
WANT = np.load(Path(__file__).parent / "data" / "peers_families.npz", allow_pickle=False)
ATOL = 1e-4  # float32 on both sides, logits with a spread of 1; at most 1.7e-5 was measured


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
    """Each case compiles a model of its own and runs it once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LCX_CACHE", str(tmp_path / "cache"))


def layers_of(folder, name):
    config, arrays, _ = load_hf(write_hf(folder, small.config_json(name), small.weights(name)))
    return Layers.of(Model(config, arrays))


def logits(layers, ids, new_tokens=0, **settings):
    """float32 [T,V]: a prompt, then tokens one at a time."""
    prompt = len(ids) - new_tokens
    session = Session(layers, Recipe(), prompt, new_tokens, **settings)
    x = [session.prefill(ids[:prompt], rows="all")[0]]
    x += [session.step([token], rows="all")[0] for token in ids[prompt:]]
    return np.asarray(layers.logits(np.concatenate(x)))


def assert_wanted(got, name):
    np.testing.assert_allclose(got[(len(got) - 1) % 3 :: 3], WANT[name], atol=ATOL)


# variants whose RoPE the fast test compares as well
SLOW = set(
    "llama_tied llama_linear_new llama_yarn_betas llama_yarn_no_truncate llama_yarn_context_ratio llama_yarn_attention_factor "
    "llama_yarn_biases llama_longrope_factor mistral_wide_head mistral_window_one qwen2_window_off qwen2_yarn qwen3_yarn "
    "qwen3_layer_types phi3_longrope_window gemma3_linear".split()
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in small.CASES])
def test_logits_are_those_of_transformers(tmp_path, name):
    assert_wanted(logits(layers_of(tmp_path / "m", name), small.ids(name)), name)


@pytest.mark.parametrize("name", small.CASES)
def test_rope_is_that_of_transformers(name):
    config = config_from_hf(small.config_json(name), "config.json").at_length(small.CASES[name][2])
    # float32 powers on one side, float64 on the other
    np.testing.assert_allclose(inverse_frequencies(config), WANT[f"{name}/inverse"], rtol=2e-6)
    assert config.rope.scale == pytest.approx(float(WANT[f"{name}/scale"]), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mistral_window", {"schedule": Chunked(10), "new_tokens": 5}),
        # the prompt is within the short context, the session is not: one rotation for the whole text
        ("llama_longrope_long", {"new_tokens": 3}),
    ],
)
def test_chunks_and_steps_give_the_logits_of_one_pass(tmp_path, name, settings):
    assert_wanted(logits(layers_of(tmp_path / "m", name), small.ids(name), **settings), name)


def test_longrope_goes_by_the_room_of_the_session():
    config = config_from_hf(small.config_json("phi3_longrope_long"), "config.json")
    assert config.rope.divisors == tuple(small.SHORT) and config.rope.scale > 1
    assert config.at_length(64) == config
    long = config.at_length(65)
    assert long.rope == replace(config.rope, divisors=tuple(small.LONG))
    assert long.at_length(100_000) == long


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_old_names_of_longrope_are_read_in_phi3(kind):
    raw = small.config_json("phi3_longrope_long")
    assert config_from_hf(raw | {"rope_scaling": small.LONGROPE | {"type": kind}}, "c") == config_from_hf(raw, "c")


@pytest.mark.parametrize(("prompt", "new_tokens"), [(41, 0), (40, 1), (1, 40), (4_096, 0), (20, 21)])
def test_dynamic_scaling_is_refused_beyond_its_context(prompt, new_tokens):
    config = config_from_hf(small.config_json("llama_dynamic_within"), "config.json")
    assert config.at_length(40) == config
    with pytest.raises(UserError, match=r"length=\d+ tokens: dynamic RoPE scaling .* beyond 40") as caught:
        config.at_length(prompt + new_tokens)
    assert len(str(caught.value)) <= 300


def test_yarn_reaches_its_factor_times_the_trained_context():
    raw = small.config_json("qwen2_yarn") | {"max_position_embeddings": 32}
    assert config_from_hf(raw, "c").context == 128


# keys of a GGUF file, tensors beside it, and what config.json says of the same model
DIVISORS = np.array([1, 1.5, 4, 8], np.float32)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 4.0, 8.0, 16.0]}
KEY = "{arch}.rope.scaling."
FACTORS = [
    (f"rope_factors_{name}.weight", np.array(LONGROPE[f"{name}_factor"], np.float32)) for name in ("short", "long")
]
BETAS = {KEY + "yarn_beta_fast": 8.0, KEY + "yarn_beta_slow": 0.5}
AS_LLAMA_CPP = {
    "factor without type": ("llama", {KEY + "factor": 4.0}, [], {"rope_type": "linear", "factor": 4.0}),
    "linear": ("qwen2", {KEY + "type": "linear", KEY + "factor": 4.0}, [], {"rope_type": "linear", "factor": 4.0}),
    "old key": ("llama", {"{arch}.rope.scale_linear": 2.0}, [], {"rope_type": "linear", "factor": 2.0}),
    "new key first": ("llama", {KEY + "factor": 4.0, "{arch}.rope.scale_linear": 2.0}, [], {"rope_type": "linear", "factor": 4.0}),
    "factor of 0": ("qwen3", {KEY + "factor": 0.0}, [], None),
    "type none": ("llama", {KEY + "type": "none", KEY + "factor": 4.0}, [], None),
    "type without factor": ("llama", {KEY + "type": "linear"}, [], None),
    "yarn": ("qwen2", {KEY + "type": "yarn", KEY + "factor": 4.0, KEY + "original_context_length": 32}, [], YARN),
    "yarn of the context": ("llama", {KEY + "type": "yarn", KEY + "factor": 4.0}, [], YARN | {"original_max_position_embeddings": 128}),
    "yarn's betas": (
        "qwen3",
        {KEY + "type": "yarn", KEY + "factor": 4.0, KEY + "original_context_length": 32, **BETAS},
        [],
        YARN | {"beta_fast": 8.0, "beta_slow": 0.5},
    ),
    "yarn's factor on cos and sin": (
        "llama",
        {KEY + "type": "yarn", KEY + "factor": 4.0, KEY + "original_context_length": 32, KEY + "attn_factor": 0.5},
        [],
        YARN | {"attention_factor": 0.5 * (0.1 * np.log(4) + 1)},
    ),
    "longrope": (
        "phi3",
        {KEY + "original_context_length": 64, KEY + "attn_factor": 1.25},
        FACTORS,
        LONGROPE | {"original_max_position_embeddings": 64, "attention_factor": 1.25},
    ),
    "longrope with its type": (
        "phi3",
        {KEY + "type": "longrope", KEY + "original_context_length": 64, KEY + "attn_factor": 1.25},
        FACTORS,
        LONGROPE | {"original_max_position_embeddings": 64, "attention_factor": 1.25},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AS_LLAMA_CPP)
def test_gguf_keys_of_rope_are_read_as_llama_cpp_does(tmp_path, case):
    arch, keys, tensors, scaling = AS_LLAMA_CPP[case]
    config = replace(small_config(arch), head_dim=8)
    path = write_gguf(tmp_path / "m.gguf", arch, config, hf_weights(config), tensors, keys)
    got = load_gguf(path)[0]
    want = config_from_hf(hf_json(arch, config) | {"rope_scaling": scaling}, "config.json")
    for name in ("rope", "rope_long"):
        a, b = getattr(got, name), getattr(want, name)
        if b is not None:
            np.testing.assert_allclose([*a.divisors, a.base, a.scale], [*b.divisors, b.base, b.scale], rtol=1e-7)
        assert (a is None) == (b is None)
    assert (got.rope_limit, got.context) == (want.rope_limit, want.context)


def test_gguf_factors_multiply():
    both = {"llama.rope.scaling.factor": 2.0}
    config = gguf_config("llama", both, {"rope_freqs.weight": DIVISORS})
    assert config.rope.divisors == (2, 3, 8, 16)


def gguf_config(arch, keys, tensors=None):
    """The config of a header with these keys beside those of a small model."""
    sizes = {
        "block_count": 2,
        "embedding_length": 32,
        "attention.head_count": 4,
        "feed_forward_length": 64,
        "context_length": 128,
    }
    sizes |= {"vocab_size": 48, "attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 8}
    fields = {"general.architecture": arch} | {f"{arch}.{name}": value for name, value in sizes.items()} | keys
    tensors = tensors or {}

    class Header(GGUFFile):
        def values(self, name):
            return tensors[name]

    class Info:
        def __init__(self, array):
            self.shape, self.type = array.shape, type("F32", (), {"name": "F32"})

    return config_from_gguf(Header("m.gguf", 3, fields, {n: Info(a) for n, a in tensors.items()}, b""))


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"phi3.rope.scaling.type": "longrope"}, {}, "without tensors rope_factors"),
        ({}, {"rope_factors_long.weight": DIVISORS}, "allowed are both"),
        ({}, {"rope_freqs.weight": -DIVISORS}, "holds a divisor that is not above 0"),
        ({}, {"rope_freqs.weight": DIVISORS[:3]}, "is F32 (3,); allowed is F32 (4,)"),
        ({"phi3.rope.scaling.type": "magic"}, {}, "allowed is one of none, linear, yarn, longrope"),
        ({"phi3.rope.scaling.factor": -1.0}, {}, "allowed is a number above 0"),
        ({"phi3.rope.scaling.factor": np.array([1.0, 2.0])}, {}, "allowed is a number above 0"),
        ({"phi3.rope.dimension_count": 7}, {}, "allowed is head_dim=8"),
        ({"phi3.rope.freq_base": 1.0}, {}, "allowed is a number above 1"),
        ({"phi3.rope.scaling.yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier=0.1"),
        ({"phi3.rope.scaling.type": "yarn", "phi3.rope.scaling.yarn_ext_factor": 0.5}, {}, "yarn_ext_factor=0.5"),
    ],
)
def test_gguf_keys_of_rope_that_do_not_fit_are_refused(keys, tensors, message):
    with pytest.raises(CheckpointFormatError) as caught:
        gguf_config("phi3", keys, tensors)
    assert message in str(caught.value) and len(str(caught.value)) <= 300


def test_gguf_files_of_phi3_have_a_window_and_turn_a_part_of_the_head():
    config = gguf_config("phi3", {"phi3.attention.sliding_window": 16, "phi3.rope.dimension_count": 6})
    assert (config.window, config.rope.dim, config.is_local(0)) == (16, 6, True)
    assert gguf_config("phi3", {"phi3.attention.sliding_window": 0}).window is None
    assert gguf_config("phi3", {"phi3.attention.sliding_window": 128}).window is None
    with pytest.raises(CheckpointFormatError, match="sliding_window=16; allowed is none"):
        gguf_config("llama", {"llama.attention.sliding_window": 16})


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_gguf_biases_are_there_where_their_tensors_are(tmp_path, arch):
    config = replace(small_config(arch), qkv_bias=True, o_bias=True)
    weights = hf_weights(config)
    names = {
        f"self_attn.{x}_proj.bias": f"attn_{y}.bias" for x, y in zip("qkvo", ("q", "k", "v", "output"), strict=True)
    }
    assert all(f"model.layers.0.{name}" in weights for name in names)
    got, arrays, *_ = load_gguf(write_gguf(tmp_path / "m.gguf", arch, config, weights))
    raw = hf_json(arch, config) | {"attention_bias": True}
    want, expected, _ = load_hf(write_hf(tmp_path / "hf", raw, weights))
    assert (got.qkv_bias, got.o_bias) == (want.qkv_bias, want.o_bias) == (True, True)
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def head_like(weights, change):
    embed = weights["model.embed_tokens.weight"]
    return weights | {"lm_head.weight": change(embed)}


@pytest.mark.parametrize(
    ("change", "tied"),
    [
        (lambda e: e.copy(), True),
        (lambda e: -e, False),
        (lambda e: e + np.eye(*e.shape, dtype=np.float32) * 1e-3, False),
        (lambda e: np.where(np.arange(e.size).reshape(e.shape) == e.size - 1, 0, e).astype(np.float32), False),
        (lambda e: np.zeros_like(e), False),
        (lambda e: e.astype(np.float16), False),
        (None, True),
    ],
)
def test_a_head_of_its_own_is_used_whatever_the_config_says(tmp_path, change, tied):
    config = small_config("llama", tied=True)
    weights = hf_weights(config)
    weights = weights if change is None else head_like(weights, change)
    got, arrays, _ = load_hf(write_hf(tmp_path / "m", hf_json("llama", config), weights))
    assert got.tied == tied and ("lm_head" in arrays) == (not tied)
    if not tied:
        np.testing.assert_array_equal(arrays["lm_head"], weights["lm_head.weight"].astype(np.float32).T)


def test_a_head_of_another_shape_is_refused(tmp_path):
    weights = head_like(hf_weights(small_config("llama")), lambda e: e[:-1])
    with pytest.raises(CheckpointMismatch, match="lm_head.weight has shape"):
        load_hf(write_hf(tmp_path / "m", hf_json("llama", small_config("llama")), weights))


@pytest.mark.parametrize(
    ("arch", "changes", "local"),
    [
        ("mistral", {"sliding_window": 16}, [True, True]),
        ("mistral", {"sliding_window": None}, [False, False]),
        ("mistral", {}, [False, False]),  # the class's 4,096 is no window in a context of 128
        ("mistral", {"max_position_embeddings": 8_192}, [True, True]),
        ("mistral", {"sliding_window": 128}, [False, False]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, [False, True]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, [False, False]),
        ("qwen2", {"use_sliding_window": True}, [False, False]),  # the first 28 are full unless the file says less
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}, [True, False]),
        ("phi3", {"sliding_window": 9}, [True, True]),
    ],
)  # fmt: skip
def test_windows_are_on_the_layers_that_slide(arch, changes, local):
    kind = {"mistral": "MistralForCausalLM"}.get(arch)
    arch = "llama" if kind else arch
    raw = hf_json(arch, small_config(arch)) | changes | ({"architectures": [kind]} if kind else {})
    config = config_from_hf(raw, "config.json")
    assert [config.is_local(i) for i in range(2)] == local
    assert (config.window is None) == (not any(local))


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f.refused], ids=lambda f: f.hf)
def test_a_family_that_is_not_loaded_says_why_in_one_line(family):
    raw = hf_json("llama", small_config("llama")) | {"architectures": [family.hf]}
    headers = [] if family.gguf in families.GGUF_ARCHITECTURES else [family.gguf]
    for load in [lambda: config_from_hf(raw, "c"), *(lambda arch=arch: gguf_config(arch, {}) for arch in headers)]:
        with pytest.raises(CheckpointFormatError) as caught:
            load()
        text = str(caught.value)
        assert f"is not loaded: {family.refused}" in text or family.gguf == "deepseek2"
        assert len(text) <= 300 and "did you mean" not in text and "\n" not in text


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if not f.refused], ids=lambda f: f.checkpoints[:12])
def test_a_family_that_is_loaded_is_one_that_peers_were_asked_about(family):
    assert family.hf in {f"{kind}ForCausalLM" for kind, _, _ in small.CASES.values()}


def test_readme_has_the_table_of_families():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert families.table() in readme, "put the output of lcx.pretrained.families.table() into README.md"
    assert re.search(r"\*peers\*: ", readme)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": 0.0}, "base of RoPE"),
        ({"divisors": (1.0, 0.0)}, "divisors of RoPE"),
        ({"divisors": (float("nan"),)}, "divisors of RoPE"),
        ({"scale": float("inf")}, "scale of RoPE"),
        ({"dim": 7}, "even number of channels"),
    ],
)
def test_rope_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Rope(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope": Rope(divisors=(1.0, 2.0))}, "rope turns 4 pairs with 2 divisors"),
        ({"rope_local": Rope(dim=10)}, "rope_local turns 5 pairs"),
        ({"local_layers": (True, False)}, "window=None and local_layers"),
        ({"window": 4, "local_layers": (True,)}, "local_layers has 1 entries, num_layers is 2"),
        ({"window": 4, "global_every": 2, "local_layers": (True, False)}, "a window has at most one of them"),
        ({"window": 0}, "window=0 must be at least 1"),
    ],
)
def test_a_config_whose_parts_do_not_fit_is_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(small_config("llama"), **values)
