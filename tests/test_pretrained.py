"""Checkpoints become the same native arrays whatever their file, and a broken one is refused with all its faults."""

import json

import ml_dtypes
import numpy as np
import pytest
from pretrained_support import (
    ARCHITECTURES,
    HF_CLASS,
    hf_json,
    hf_weights,
    permute,
    small_config,
    write_gguf,
    write_hf,
)
from safetensors.numpy import save_file

from lcx.errors import UserError
from lcx.model_config import Rope, param_shapes
from lcx.pretrained import CheckpointFormatError, CheckpointMismatch, cache
from lcx.pretrained.checkpoints import load_gguf, load_hf, unpermute
from lcx.pretrained.model_configs import config_from_hf

ARCHS = list(ARCHITECTURES)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LCX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def native(config, weights):
    """Native arrays, written out by hand from the Hugging Face ones."""
    shift = 1 if config.post_norms else 0
    w = weights
    out = {"embed": w["model.embed_tokens.weight"], "norm": w["model.norm.weight"] + shift}
    if not config.tied:
        out["lm_head"] = w["lm_head.weight"].T
    for i in range(config.num_layers):
        a, b = f"model.layers.{i}.", f"layers.{i}."
        out[b + "attn_norm"] = w[a + "input_layernorm.weight"] + shift
        fused = config.name == HF_CLASS["phi3"]
        qkv, gate_up = (["qkv"], ["gate_up"]) if fused else (list("qkv"), ["gate", "up"])
        out[b + "qkv"] = np.concatenate([w[f"{a}self_attn.{x}_proj.weight"] for x in qkv]).T
        out[b + "o"] = w[a + "self_attn.o_proj.weight"].T
        out[b + "gate_up"] = np.concatenate([w[f"{a}mlp.{x}_proj.weight"] for x in gate_up]).T
        out[b + "down"] = w[a + "mlp.down_proj.weight"].T
        if config.qkv_bias:
            out[b + "qkv_bias"] = np.concatenate([w[f"{a}self_attn.{x}_proj.bias"] for x in "qkv"])
        if config.o_bias:
            out[b + "o_bias"] = w[a + "self_attn.o_proj.bias"]
        if config.qk_norm:
            out[b + "q_norm"] = w[a + "self_attn.q_norm.weight"] + shift
            out[b + "k_norm"] = w[a + "self_attn.k_norm.weight"] + shift
        if config.post_norms:
            out[b + "post_attn_norm"] = w[a + "post_attention_layernorm.weight"] + shift
            out[b + "mlp_norm"] = w[a + "pre_feedforward_layernorm.weight"] + shift
            out[b + "post_mlp_norm"] = w[a + "post_feedforward_layernorm.weight"] + shift
        else:
            out[b + "mlp_norm"] = w[a + "post_attention_layernorm.weight"]
    return out


def assert_same(found, wanted, config):
    assert {name: array.shape for name, array in found.items()} == param_shapes(config)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_hugging_face_folder_becomes_native(tmp_path, arch, tied, shards):
    wanted = small_config(arch, tied)
    weights = hf_weights(wanted)
    config, arrays, _ = load_hf(write_hf(tmp_path / "model", hf_json(arch, wanted), weights, shards))
    assert config == wanted
    assert_same(arrays, native(config, weights), config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_gguf_file_becomes_native_and_comes_back_from_the_cache(tmp_path, own_cache, arch, tied):
    wanted = small_config(arch, tied)
    weights = hf_weights(wanted)
    path = write_gguf(tmp_path / "m.gguf", arch, wanted, weights)
    config, first, _, sha256 = load_gguf(path)
    # GGUF holds eps as float32, and not the attention scale
    assert config.norm_eps == pytest.approx(wanted.norm_eps, rel=1e-6)
    assert config.scale == wanted.scale
    assert {**vars(config), "norm_eps": 0, "attention_scale": 0} == {
        **vars(wanted),
        "norm_eps": 0,
        "attention_scale": 0,
    }
    assert_same(first, native(config, weights), config)
    (file,) = own_cache.iterdir()
    assert file == cache.file_of(sha256, "float32")
    assert (file.stat().st_mode & 0o777, own_cache.stat().st_mode & 0o777) == (0o600, 0o700)
    again, second, _, _ = load_gguf(path)
    assert again == config
    assert not second["embed"].flags.writeable
    assert_same(second, first, config)


def test_unpermuted_rows_give_the_same_logits_under_half_split_rope():
    """q . k with interleaved pairs on permuted rows equals q . k with half-split pairs on un-permuted rows."""
    rng = np.random.default_rng(0)
    num_heads, head_dim, d_model, tokens = 3, 8, 16, 5
    stored = rng.standard_normal((num_heads * head_dim, d_model))
    x = rng.standard_normal((tokens, d_model))
    angle = np.arange(tokens)[:, None] / 100.0 ** (np.arange(0, head_dim, 2) / head_dim)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def logits(weight, low, high):
        y = (x @ weight.T).reshape(tokens, num_heads, head_dim)
        a, b = y[..., low], y[..., high]
        turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return np.einsum("qhd,khd->hqk", turned, turned)

    even, half = slice(0, None, 2), head_dim // 2
    interleaved = logits(stored, even, slice(1, None, 2))
    np.testing.assert_allclose(
        logits(unpermute(stored, num_heads), slice(half), slice(half, None)), interleaved, atol=1e-12
    )
    assert np.abs(logits(stored, slice(half), slice(half, None)) - interleaved).max() > 0.1
    np.testing.assert_array_equal(unpermute(permute(stored, num_heads), num_heads), stored)


def test_quantised_and_bfloat16_values_are_read(tmp_path):
    config = small_config("qwen3")
    weights = hf_weights(config)
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in weights.items()}
    folder = write_hf(tmp_path / "bf16", hf_json("qwen3", config), halves)
    _, arrays, _ = load_hf(folder)
    assert_same(arrays, native(config, {name: array.astype(np.float32) for name, array in halves.items()}), config)
    _, kept, _ = load_hf(folder, "bfloat16")
    assert kept["layers.0.qkv"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(kept["layers.0.qkv"].astype(np.float32), arrays["layers.0.qkv"])
    path = write_gguf(tmp_path / "f16.gguf", "qwen3", config, {n: a.astype(np.float16) for n, a in weights.items()})
    _, arrays, _, _ = load_gguf(path, "bfloat16")
    _, again, _, _ = load_gguf(path, "bfloat16")
    assert arrays["embed"].dtype == again["embed"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        again["embed"], weights["model.embed_tokens.weight"].astype(np.float16).astype(ml_dtypes.bfloat16)
    )


def test_a_mismatch_lists_every_problem_in_one_line(tmp_path):
    config = small_config("qwen2")
    weights = hf_weights(config)
    del weights["model.norm.weight"]
    weights["model.layers.1.self_attn.k_proj.weight"] = np.zeros((7, 32), np.float32)
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((64, 32), np.int8)
    weights["model.layers.2.mlp.up_proj.weight"] = np.zeros((64, 32), np.float32)
    with pytest.raises(CheckpointMismatch) as caught:
        load_hf(write_hf(tmp_path / "m", hf_json("qwen2", config), weights))
    assert set(caught.value.problems) == {
        "model.norm.weight is missing",
        "model.layers.1.self_attn.k_proj.weight has shape (7, 32), its config asks for (16, 32)",
        "model.layers.0.mlp.up_proj.weight has type I8, which lcx does not read",
        "'model.layers.2.mlp.up_proj.weight' is in the file but not in the model",
    }
    assert caught.value.problems[0] in str(caught.value) and "and 2 more" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


def test_a_gguf_mismatch_lists_every_problem(tmp_path):
    config = small_config("llama")
    weights = hf_weights(config)
    del weights["model.layers.0.mlp.down_proj.weight"]
    weights["model.layers.1.input_layernorm.weight"] = np.zeros(31, np.float32)
    extra = [("blk.0.attn_qkv.bias", np.zeros(64, np.float32))]
    with pytest.raises(CheckpointMismatch) as caught:
        load_gguf(write_gguf(tmp_path / "m.gguf", "llama", config, weights, extra))
    assert len(caught.value.problems) == 3


def test_rope_freqs_become_divisors(tmp_path):
    config = small_config("llama")
    divisors = np.array([1, 1.5, 4, 8], np.float32)
    path = write_gguf(tmp_path / "m.gguf", "llama", config, hf_weights(config), [("rope_freqs.weight", divisors)])
    assert load_gguf(path)[0].rope.divisors == (1, 1.5, 4, 8)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8_192}


@pytest.mark.parametrize("new", [False, True])
def test_llama3_divisors_are_those_of_the_paper(new):
    raw = hf_json("llama", small_config("llama")) | {"head_dim": 128, "rope_theta": 500_000.0}
    if new:
        del raw["rope_theta"]
        raw["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3}
    else:
        raw["rope_scaling"] = {"rope_type": "llama3", **LLAMA3}
    config = config_from_hf(raw, "config.json")
    assert config.rope.base == 500_000
    # transformers' steps on the inverse frequencies
    inverse = 1 / 500_000 ** (np.arange(0, 128, 2) / 128)
    length = 2 * np.pi / inverse
    smooth = (8_192 / length - 1) / 3
    scaled = np.where(length > 8_192, inverse / 8, inverse)
    middle = (length >= 8_192 / 4) & (length <= 8_192)
    scaled = np.where(middle, (1 - smooth) * scaled / 8 + smooth * scaled, scaled)
    np.testing.assert_allclose(inverse / np.array(config.rope.divisors), scaled, rtol=1e-12)
    assert {config.rope.divisors[0], config.rope.divisors[-1]} == {1, 8}


def test_other_rope_settings_of_hugging_face_are_read():
    raw = hf_json("llama", small_config("llama"))
    assert config_from_hf(raw | {"rope_scaling": {"type": "linear", "factor": 4}}, "c").rope_scale == 4
    assert config_from_hf(raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "c").rope.base == 7
    gemma = hf_json("gemma3", small_config("gemma3")) | {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 123.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 456.0},
        }
    }
    config = config_from_hf(gemma, "c")
    assert (config.rope_local, config.rope) == (Rope(123.0), Rope(456.0, (8.0,)))


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        (
            "llama",
            {"architectures": ["LamaForCausalLM"]},
            "'LamaForCausalLM' is not loaded: it is unknown to lcx; allowed are",
        ),
        ("llama", {"architectures": None}, "architectures=None; allowed is one of"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "mrope", "factor": 4}},
            "rope_scaling.rope_type='mrope'; allowed is one of default, linear",
        ),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
            "allowed is none beside rope_parameters",
        ),
        (
            "qwen2",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention={",
        ),
        ("phi3", {"partial_rotary_factor": 0.7}, "is not an even number"),
        ("llama", {"partial_rotary_factor": 0.5}, "allowed is 1 for this architecture"),
        (
            "llama",
            {"sliding_window": 16},
            "sliding_window=16; allowed is none, or at least max_position_embeddings=128",
        ),
        ("llama", {"mlp_bias": True}, "mlp_bias=True; allowed is False"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'; allowed is 'silu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "lcx does not compute it"),
        ("llama", {"hidden_size": "32"}, "hidden_size='32'; allowed is an integer"),
        ("llama", {"num_hidden_layers": 10**9}, "allowed is an integer from 1 to 1,024"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan; allowed is a number above 0"),
        ("llama", {"num_key_value_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "full_attention on every layer where use_sliding_window"),
        ("qwen3", {"head_dim": None}, "head_dim=None; allowed is an integer"),
        ("gemma3", {"layer_types": ["full_attention"] * 2}, "full_attention on every 6th layer"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("gemma3", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar=None"),
    ],
)
def test_what_lcx_does_not_compute_is_refused(arch, changes, message):
    with pytest.raises(CheckpointFormatError) as caught:
        config_from_hf(hf_json(arch, small_config(arch)) | changes, "config.json")
    assert str(caught.value).startswith("config.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_folder_is_one_clear_line(tmp_path):
    config = small_config("llama")
    folder = write_hf(tmp_path / "m", hf_json("llama", config), hf_weights(config), shards=2)
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = "../../secret.safetensors"
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointFormatError, match="allowed is a \\*.safetensors file beside it"):
        load_hf(folder)
    index.unlink()
    with pytest.raises(CheckpointFormatError, match="neither model.safetensors nor"):
        load_hf(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointFormatError, match="not a readable safetensors file"):
        load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointFormatError, match="is not JSON"):
        load_hf(folder)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def scribble(file):
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])


def replace(file):
    save_file({"embed": np.zeros((2, 2), np.float32)}, file)


@pytest.mark.parametrize("damage", [cut, scribble, replace])
def test_a_damaged_cache_file_is_rebuilt(tmp_path, damage):
    config = small_config("llama")
    weights = hf_weights(config)
    path = write_gguf(tmp_path / "m.gguf", "llama", config, weights)
    _, _, _, sha256 = load_gguf(path)
    file = cache.file_of(sha256, "float32")
    good = file.read_bytes()
    damage(file)
    config, arrays, _, _ = load_gguf(path)
    assert_same(arrays, native(config, weights), config)
    assert file.read_bytes() == good
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch):
    config = small_config("llama")
    path = write_gguf(tmp_path / "m.gguf", "llama", config, hf_weights(config))
    # a file where the folder should be stops root as well
    (tmp_path / "file").touch()
    monkeypatch.setenv("LCX_CACHE", str(tmp_path / "file"))
    warnings = []
    monkeypatch.setattr(cache.logging, "warning", lambda form, *args: warnings.append(form % args))
    _, arrays, _, _ = load_gguf(path)
    assert len(arrays) == len(param_shapes(config))
    assert len(warnings) == 1
    assert "set LCX_CACHE" in warnings[0]


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("LCX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "lcx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "lcx"


def test_a_dtype_that_is_not_allowed_is_refused(tmp_path):
    with pytest.raises(UserError, match="dtype='float8'; allowed are float32, bfloat16"):
        load_gguf(tmp_path / "m.gguf", "float8")
