"""ModelConfig from a GGUF header or from a Hugging Face config.json.

A checkpoint that lcx cannot compute exactly (soft-capping, partial rotation of other models, ...) is refused, never loaded wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lcx.model_config import ModelConfig, Rope
from lcx.pretrained.errors import CheckpointFormatError
from lcx.pretrained.families import HF_ARCHITECTURES, check_architecture
from lcx.pretrained.fields import Fields
from lcx.pretrained.gguf_header import GGUFFile
from lcx.pretrained.rope_settings import gguf_rope, hf_rope, model_values

MAX_LAYERS = 1_024
GEMMA3_PERIOD = 6
GEMMA3_WINDOW = 512
GEMMA3_LOCAL_BASE = 10_000.0
# llama.cpp tells Gemma 3 27B, whose scale is not head_dim ** -0.5, by its number of layers
GEMMA3_27B_LAYERS = 62
# values that transformers takes where config.json lacks the key
DEFAULT_WINDOW = {"MistralForCausalLM": 4_096, "Qwen2ForCausalLM": 4_096, "Qwen3ForCausalLM": 4_096}
DEFAULT_FULL_LAYERS = 28  # max_window_layers of Qwen2 and Qwen3

# models that a plan is made for without their weights; sizes of the published config.json files
SHAPES = {
    config.name: config
    for config in (
        ModelConfig("llama-7b", 32, 4_096, 32, 32, 128, 11_008, 32_000, 2_048, norm_eps=1e-6, tied=False),
        ModelConfig("llama2-7b", 32, 4_096, 32, 32, 128, 11_008, 32_000, 4_096, tied=False),
        ModelConfig("llama3-8b", 32, 4_096, 32, 8, 128, 14_336, 128_256, 8_192, rope=Rope(base=5e5), tied=False),
        ModelConfig("llama3-70b", 80, 8_192, 64, 8, 128, 28_672, 128_256, 8_192, rope=Rope(base=5e5), tied=False),
    )
}


def _build(path: str, **values) -> ModelConfig:
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise CheckpointFormatError(f"{path}: {error}") from None


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Return the ModelConfig of a GGUF file of arch llama, qwen2, qwen3, phi3 or gemma3.

    Raises:
      CheckpointFormatError: a key is missing, of the wrong type, or asks for what lcx does not compute.
    """
    f = Fields(file.fields, file.path)
    arch = f.text("general.architecture")
    check_architecture("general.architecture", arch, file.path)
    num_layers = f.integer(f"{arch}.block_count", most=MAX_LAYERS)
    d_model = f.integer(f"{arch}.embedding_length")
    num_heads = f.integer(f"{arch}.attention.head_count")
    derived = d_model // num_heads or None if arch in ("llama", "qwen2", "phi3") else None
    head_dim = f.integer(f"{arch}.attention.key_length", derived)
    context = f.integer(f"{arch}.context_length")
    f.refuse(f"{arch}.attention.value_length", (head_dim,))
    f.refuse(f"{arch}.expert_count", (0,))
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        f.refuse(f"{arch}.{key}", (0.0,))
    values = {
        "name": f.text("general.name", arch),
        "num_layers": num_layers,
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": f.integer(f"{arch}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "d_ff": f.integer(f"{arch}.feed_forward_length"),
        "vocab_size": _gguf_vocab_size(file, f, arch),
        "norm_eps": f.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "tied": "output.weight" not in file.tensors,
        # a layer has a bias where the file has its tensors, as in llama.cpp
        "qkv_bias": arch == "qwen2" or "blk.0.attn_q.bias" in file.tensors,
        "o_bias": "blk.0.attn_output.bias" in file.tensors,
        "qk_norm": arch in ("qwen3", "gemma3"),
        **model_values(gguf_rope(file, f, arch, head_dim, context), context),
    }
    window = f"{arch}.attention.sliding_window"
    if arch == "gemma3":
        f.refuse(f"{arch}.attention.sliding_window_pattern", (GEMMA3_PERIOD,))
        f.refuse(f"{arch}.rope.freq_base_swa", (GEMMA3_LOCAL_BASE,))
        values |= _gemma3(d_model, f.integer(window, GEMMA3_WINDOW))
        if num_layers == GEMMA3_27B_LAYERS:
            values["attention_scale"] = (d_model // num_heads) ** -0.5
    elif not _unset(f, window) and f.integer(window) < context:
        if arch != "phi3":
            raise f.fail(window, f"none, or at least {arch}.context_length={context}")
        # on every layer, as transformers has it; llama.cpp leaves it out
        values["window"] = f.integer(window)
    return _build(file.path, **values)


def _unset(f: Fields, key: str) -> bool:
    value = f.values.get(key)
    return value is None or (type(value) is int and value == 0)


def _gemma3(d_model: int, window: int) -> dict[str, object]:
    return {
        "post_norms": True,
        "activation": "gelu_tanh",
        "embed_scale": math.sqrt(d_model),
        "window": window,
        "global_every": GEMMA3_PERIOD,
        "rope_local": Rope(base=GEMMA3_LOCAL_BASE),
    }


def _gguf_vocab_size(file: GGUFFile, f: Fields, arch: str) -> int:
    embedding = file.tensors.get("token_embd.weight")
    size = embedding.shape[0] if embedding else f.integer(f"{arch}.vocab_size")
    f.refuse(f"{arch}.vocab_size", (size,))
    return size


def config_from_hf(raw: Mapping[str, object], path: str) -> ModelConfig:
    """Return the ModelConfig of a Hugging Face config.json.

    Args:
      raw: the parsed file.
      path: its name, for errors.

    Raises:
      CheckpointFormatError: a key is missing, of the wrong type, or asks for what lcx does not compute.
    """
    f = Fields(raw, path)
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise f.fail("architectures", f"one of {', '.join(HF_ARCHITECTURES)}")
    (arch,) = names
    check_architecture("architectures", arch, path)
    gemma3, phi3, qwen3 = (arch == name for name in ("Gemma3ForCausalLM", "Phi3ForCausalLM", "Qwen3ForCausalLM"))
    d_model, num_heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    num_layers = f.integer("num_hidden_layers", most=MAX_LAYERS)
    derived = None if gemma3 or qwen3 else d_model // num_heads or None
    head_dim = f.integer("head_dim", derived)
    context = f.integer("max_position_embeddings")
    for key in ("hidden_act", "hidden_activation"):
        f.refuse(key, ("gelu_pytorch_tanh" if gemma3 else "silu",))
    for key in ("mlp_bias", "use_bidirectional_attention"):
        f.refuse(key, (False,))
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "quantization_config"):
        f.refuse(key)
    f.refuse("pretraining_tp", (1,))
    biased = _attention_bias(f, arch)
    values = {
        "name": f.text("_name_or_path", "") or arch,
        "num_layers": num_layers,
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": f.integer("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "d_ff": f.integer("intermediate_size"),
        "vocab_size": f.integer("vocab_size"),
        "norm_eps": f.number("rms_norm_eps"),
        # a value that equals the class's default may be missing from the file
        "tied": f.boolean("tie_word_embeddings", gemma3),
        "qkv_bias": biased or arch == "Qwen2ForCausalLM",
        "o_bias": biased,
        "qk_norm": gemma3 or qwen3,
    }
    if gemma3:
        values |= _gemma3(d_model, f.integer("sliding_window", GEMMA3_WINDOW)) | _hf_gemma3(f, num_layers)
    else:
        values |= _hf_window(f, arch, num_layers, context)
    return _build(path, **(values | _hf_rope(f, arch, head_dim, context)))


def _attention_bias(f: Fields, arch: str) -> bool:
    """Return True for biases on q, k, v and o.  Qwen2 has its own on q, k and v whatever the key says."""
    if arch in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        return f.boolean("attention_bias", False)
    f.refuse("attention_bias", (True, False) if arch == "Qwen2ForCausalLM" else (False,))
    return False


def _hf_gemma3(f: Fields, num_layers: int) -> dict[str, object]:
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        f.refuse(key, (GEMMA3_PERIOD,))
    kinds = ["sliding_attention" if (i + 1) % GEMMA3_PERIOD else "full_attention" for i in range(num_layers)]
    if f.has("layer_types") and f.values["layer_types"] != kinds:
        raise f.fail("layer_types", f"full_attention on every {GEMMA3_PERIOD}th layer, sliding_attention on the others")
    if not f.has("query_pre_attn_scalar"):
        raise f.fail("query_pre_attn_scalar", "a number above 0")
    return {"attention_scale": f.number("query_pre_attn_scalar") ** -0.5}


def _hf_window(f: Fields, arch: str, num_layers: int, context: int) -> dict[str, object]:
    """Return `window` and `local_layers`.  A window of at least the context is dropped."""
    given = f.values.get("sliding_window", DEFAULT_WINDOW.get(arch))
    if arch in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        kinds = _layer_types(f, num_layers)
        used = f.boolean("use_sliding_window", False) and given is not None
        if kinds is None:
            full = f.values.get("max_window_layers", DEFAULT_FULL_LAYERS)
            if type(full) is not int:
                raise f.fail("max_window_layers", "an integer")
            kinds = tuple(used and i >= full for i in range(num_layers))
        if not any(kinds):
            return {}
        if not used:
            raise f.fail("layer_types", "full_attention on every layer where use_sliding_window is not true")
        window = f.integer("sliding_window", DEFAULT_WINDOW[arch])
        if window >= context:
            return {}
        return {"window": window, "local_layers": None if all(kinds) else kinds}
    if any(_layer_types(f, num_layers) or ()):
        raise f.fail("layer_types", "full_attention on every layer")
    if given is None:
        return {}
    window = f.integer("sliding_window", DEFAULT_WINDOW.get(arch))
    if window >= context:
        return {}
    if arch == "LlamaForCausalLM":
        # transformers leaves it out there, which its author may not have known
        raise f.fail("sliding_window", f"none, or at least max_position_embeddings={context}")
    return {"window": window}


def _layer_types(f: Fields, num_layers: int) -> tuple[bool, ...] | None:
    """Return True for each layer that slides; None where the file has no list."""
    kinds = f.values.get("layer_types")
    if kinds is None:
        return None
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in known for kind in kinds):
        raise f.fail("layer_types", f"{num_layers} entries of {' and '.join(known)}")
    return tuple(kind == "sliding_attention" for kind in kinds)


def _hf_rope(f: Fields, arch: str, head_dim: int, context: int) -> dict[str, object]:
    """Return the RoPE of `rope_theta` + `rope_scaling` (older files) or `rope_parameters` (newer ones)."""
    key = "rope_parameters" if f.has("rope_parameters") else "rope_scaling"
    scaling = f.section(key)
    if key == "rope_parameters" and f.section("rope_scaling").values:
        # transformers takes rope_scaling and drops the other with its rope_theta; the file does not say which of the two is valid
        raise f.fail("rope_scaling", "none beside rope_parameters")
    if arch != "Gemma3ForCausalLM":
        for kind in ("full_attention", "sliding_attention"):
            scaling.refuse(f"{key}.{kind}")
        settings = hf_rope(f, scaling, key, head_dim, context, 10_000.0, arch == "Phi3ForCausalLM")
        return dict(model_values(settings, context))
    local = scaling.section(f"{key}.sliding_attention")
    rope_local = Rope(base=f.number("rope_local_base_freq", GEMMA3_LOCAL_BASE))
    if local.values:
        local.refuse(f"{key}.sliding_attention.rope_type", ("default",))
        rope_local = Rope(base=local.number(f"{key}.sliding_attention.rope_theta"))
        key = f"{key}.full_attention"
        scaling = scaling.section(key)
    settings = hf_rope(f, scaling, key, head_dim, context, 1_000_000.0)
    return {**model_values(settings, context), "rope_local": rope_local}
