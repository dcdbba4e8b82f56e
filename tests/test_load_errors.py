"""Whatever a file of a stranger holds: it loads, or its error is one printable line of at most 300 characters."""

import json
from dataclasses import replace

import numpy as np
import pytest
from pretrained_support import ARCHITECTURES, hf_json, hf_weights, small_config, write_gguf, write_hf

from lcx.errors import UserError
from lcx.pretrained import CheckpointFormatError, CheckpointMismatch, Tokenizer, load_arrays
from lcx.pretrained.checkpoints import load_gguf, load_hf
from lcx.pretrained.errors import one_line
from lcx.pretrained.gguf_header import GGUFFile, open_gguf
from lcx.pretrained.model_configs import config_from_gguf, config_from_hf

LONG = "x" * 5_000
HOSTILE = [
    *(LONG, "", "\x1b[31m\n\r\t", "\u202eabc", "\ud800", None, True, 0, -1, 10**400, 1e308, float("nan"), float("inf")),
    *([], [LONG] * 50, {}, {"a": {LONG: [LONG]}}, [[[]]], [float("nan")], 2**31, 0.5, [None], 1e-300, [1, 2]),
]
# values that the parser of a GGUF header gives
GGUF_HOSTILE = [v for v in HOSTILE if isinstance(v, (str, bool, int, float))]
GGUF_HOSTILE += [
    [],
    [LONG] * 50,
    [""] * 48,
    ["\x1b"] * 48,
    np.zeros(3),
    np.zeros(48, int),
    np.array([]),
    np.full(48, 3),
]
ROPE_KEYS = [
    "type",
    "rope_type",
    "factor",
    "rope_theta",
    "original_max_position_embeddings",
    "short_factor",
    "long_factor",
]
ROPE_KEYS += [
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "low_freq_factor",
    "partial_rotary_factor",
    "truncate",
]
ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64},
}


def assert_fine(load, what):
    """The result of `load`, or None where it was refused as it should."""
    try:
        return load()
    except UserError as error:
        text = str(error)
        assert len(text) <= 300, (what, len(text))
        assert text.isprintable() and text, (what, text)
        assert "did you mean" not in text, what
        return None


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_key_of_config_json_may_hold_anything(arch):
    raw = hf_json(arch, small_config(arch))
    keys = [
        *raw,
        "attention_bias",
        "sliding_window",
        "max_window_layers",
        "use_sliding_window",
        "layer_types",
        "rope_scaling",
    ]
    keys += ["rope_parameters", "partial_rotary_factor", "original_max_position_embeddings", "quantization_config"]
    keys += ["query_pre_attn_scalar", "rope_local_base_freq", "_name_or_path", "head_dim", "mlp_bias", "pretraining_tp"]
    for key in dict.fromkeys(keys):
        for value in HOSTILE:
            assert_fine(lambda key=key, value=value: config_from_hf(raw | {key: value}, "config.json"), (key, value))
        assert_fine(lambda key=key: config_from_hf({k: v for k, v in raw.items() if k != key}, "config.json"), key)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_every_key_of_rope_may_hold_anything(section, kind):
    raw = hf_json("phi3" if kind == "longrope" else "llama", small_config("llama"))
    rope = {"rope_type": kind, **ROPES[kind]}
    assert config_from_hf(raw | {section: rope}, "config.json").rope
    for key in ROPE_KEYS:
        for value in HOSTILE:
            changed = raw | {section: rope | {key: value}}
            assert_fine(lambda changed=changed: config_from_hf(changed, "config.json"), (key, value))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "phi3", "gemma3"])
def test_every_key_of_a_gguf_header_may_hold_anything(tmp_path, arch):
    config = small_config(arch)
    file = open_gguf(write_gguf(tmp_path / "m.gguf", arch, config, hf_weights(config)))
    keys = [key for key in file.fields if not key.startswith("tokenizer")]
    rope = ["scaling.type", "scaling.factor", "scaling.attn_factor", "scaling.original_context_length", "scale_linear"]
    keys += [f"{arch}.rope.{key}" for key in [*rope, "dimension_count", "freq_base_swa", "scaling.yarn_beta_fast"]]
    keys += [f"{arch}.attention.sliding_window", f"{arch}.expert_count", f"{arch}.final_logit_softcapping"]
    for key in keys:
        for value in GGUF_HOSTILE:
            fields = file.fields | {key: value}
            changed = GGUFFile(file.path, 3, fields, file.tensors, file.buffer)
            assert_fine(lambda changed=changed: config_from_gguf(changed), (key, value))


def test_every_field_of_a_gguf_tokenizer_may_hold_anything(tmp_path):
    config = small_config("llama")
    fields = open_gguf(write_gguf(tmp_path / "m.gguf", "llama", config, hf_weights(config))).fields
    keys = [key for key in fields if key.startswith("tokenizer")]
    keys += [
        f"tokenizer.ggml.{key}" for key in ("bos_token_id", "eos_token_id", "eot_token_id", "add_bos_token", "scores")
    ]
    for key in keys:
        for value in GGUF_HOSTILE:
            changed = fields | {key: value}
            assert_fine(lambda changed=changed: Tokenizer.from_gguf(changed, f"/{LONG}/m.gguf"), (key, value))


@pytest.mark.parametrize("setting", ["bos_token", "eos_token", "add_bos_token", "chat_template"])
def test_every_setting_of_a_tokenizer_may_hold_anything(tmp_path, setting):
    from test_tokenizer import saved

    path = saved(tmp_path)
    for value in HOSTILE:
        assert_fine(lambda value=value: Tokenizer.from_json(path, {setting: value}), value)
        ids = {f"{setting.removesuffix('_token')}_token_id": value}
        assert_fine(lambda ids=ids: Tokenizer.from_json(path, None, ids, ids), value)


@pytest.mark.parametrize("count", [1, 2, 9, 3_000])
def test_a_mismatch_of_any_length_is_one_short_line(tmp_path, count):
    config = small_config("llama")
    weights = hf_weights(config) | {f"{i}.{'y' * 60}": np.zeros(1, np.float32) for i in range(count)}
    folder = tmp_path / ("z" * 100)
    with pytest.raises(CheckpointMismatch) as caught:
        load_hf(write_hf(folder, hf_json("llama", config), weights))
    assert_fine(lambda: (_ for _ in ()).throw(caught.value), count)
    assert len(caught.value.problems) == count
    shown = str(caught.value).count("is in the file but not in the model")
    assert 1 <= shown <= count and (shown == count or f"; and {count - shown} more" in str(caught.value))


@pytest.mark.parametrize("name", [LONG, f"/{LONG}", f"{LONG}.gguf", "~nobody-of-this-name/m", "\0", "a/\x1b[31m", ""])
def test_a_model_of_any_name_is_refused_in_one_short_line(name):
    with pytest.raises(UserError) as caught:
        load_arrays(name)
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[" * 100_000, b'"' + b"x" * 9_999, b"\xff" * 99, b"7", b"[" + b"1," * 999]
)
def test_json_of_any_kind_is_refused_in_one_short_line(tmp_path, raw):
    folder = tmp_path / ("f" * 120)
    folder.mkdir()
    (folder / "config.json").write_bytes(raw)
    assert assert_fine(lambda: load_arrays(str(folder)), raw[:9]) is None


@pytest.mark.parametrize("arch", ["Phi2ForCausalLM", "SmolLM3ForCausalLM", "LamaForCausalLM", LONG, "Phi4ForCausalLM"])
def test_no_other_architecture_is_proposed(tmp_path, arch):
    raw = hf_json("llama", small_config("llama")) | {"architectures": [arch]}
    folder = write_hf(tmp_path / "m", raw, {"a": np.zeros(1, np.float32)})
    with pytest.raises(CheckpointFormatError, match="is not loaded: ") as caught:
        load_arrays(str(folder))
    assert "did you mean" not in str(caught.value) and len(str(caught.value)) <= 300


def test_a_damaged_gguf_file_is_refused_in_one_short_line(tmp_path):
    config = replace(small_config("llama"), vocab_size=48)
    path = write_gguf(tmp_path / "m.gguf", "llama", config, hf_weights(config))
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(raw)
        for at in rng.integers(0, 2_500, 3):
            broken[at] = rng.integers(256)
        path.write_bytes(broken)
        assert_fine(lambda: load_gguf(path), bytes(broken[:64]))
        assert_fine(lambda: Tokenizer.from_gguf(open_gguf(path).fields, str(path)), bytes(broken[:64]))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: b", "a: b"),
        ("a:\n\x1b[0m b", "a: [0m b"),
        ("p" * 300 + ": key is missing", "..." + "p" * 77 + ": key is missing"),
        ("q: " + "x" * 400, "q: " + "x" * 293 + " ..."),
        ("", ""),
    ],
)
def test_a_line_is_cut_where_it_says_least(text, line):
    assert one_line(text) == line
    assert len(line) <= 300


def test_json_of_a_folder_may_hold_anything(tmp_path):
    from test_tokenizer import saved

    config = small_config("llama")
    folder = write_hf(tmp_path / "m", hf_json("llama", config), hf_weights(config))
    saved(folder)
    for name in ("tokenizer_config.json", "generation_config.json"):
        for raw in ({}, [], 7, {"eos_token_id": LONG}, {"eos_token": LONG}, {"eos_token": {"content": [1]}}):
            (folder / name).write_text(json.dumps(raw))
            assert_fine(lambda: load_arrays(str(folder)), (name, raw))
        (folder / name).unlink()
