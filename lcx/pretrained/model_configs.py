"""ModelConfig from a GGUF header or from a Hugging Face config.json.

What lcx cannot compute exactly (YaRN, soft-capping, a sliding window on other layers, ...) is refused, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lcx.errors import nearest
from lcx.model_config import ModelConfig
from lcx.pretrained.gguf_header import CheckpointFormatError, GGUFFile

MAX_LAYERS = 1_024
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
HF_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
}
GEMMA3_PERIOD = 6
GEMMA3_WINDOW = 512
GEMMA3_LOCAL_BASE = 10_000.0
# llama.cpp tells Gemma 3 27B, whose scale is not head_dim ** -0.5, by its number of layers
GEMMA3_27B_LAYERS = 62

# models that a plan is made for without their weights; sizes of the published config.json files
SHAPES = {
    config.name: config
    for config in (
        ModelConfig("llama-7b", 32, 4_096, 32, 32, 128, 11_008, 32_000, 2_048, norm_eps=1e-6, tied=False),
        ModelConfig("llama2-7b", 32, 4_096, 32, 32, 128, 11_008, 32_000, 4_096, tied=False),
        ModelConfig("llama3-8b", 32, 4_096, 32, 8, 128, 14_336, 128_256, 8_192, rope_base=5e5, tied=False),
        ModelConfig("llama3-70b", 80, 8_192, 64, 8, 128, 28_672, 128_256, 8_192, rope_base=5e5, tied=False),
    )
}


class Fields:
    """Typed reads from a mapping of untrusted values; every error names the file, the key and the value."""

    def __init__(self, values: Mapping[str, object], path: str):
        self.values, self.path = values, path

    def fail(self, key: str, allowed: str) -> CheckpointFormatError:
        # an array's repr has line breaks
        value = " ".join(repr(self.values.get(key)).split())[:80]
        got = f"{key}={value}" if key in self.values else f"{key} is missing"
        return CheckpointFormatError(f"{self.path}: {got}; allowed is {allowed}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, most: int = 1 << 31) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= most:
            raise self.fail(key, f"an integer from 1 to {most:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise self.fail(key, "a number above 0")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, "a text")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def section(self, key: str) -> Fields:
        """A nested mapping; empty where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.fail(key, "a mapping")
        return Fields({f"{key}.{name}": inner for name, inner in value.items()}, self.path)

    def refuse(self, key: str, allowed: tuple[object, ...] = ()) -> None:
        """Raises unless the key is absent, null or one of the allowed values."""
        value = self.values.get(key)
        # numpy arrays have no truth value, so `in` is for plain values only
        if value is not None and not (isinstance(value, (bool, int, float, str)) and value in allowed):
            raise self.fail(
                key, " or ".join(repr(value) for value in allowed) or "no such key: lcx does not compute it"
            )


def _build(path: str, **values) -> ModelConfig:
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise CheckpointFormatError(f"{path}: {error}") from None


def _architecture(arch: str, found: str, allowed, path: str) -> None:
    if found not in allowed:
        raise CheckpointFormatError(
            f"{path}: {arch}={found[:80]!r}; allowed are {', '.join(allowed)}{nearest(found, allowed)}"
        )


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """ModelConfig of a GGUF file of arch llama, qwen2, qwen3 or gemma3.

    Raises:
      CheckpointFormatError: a key is missing, of the wrong type, or asks for what lcx does not compute.
    """
    f = Fields(file.fields, file.path)
    arch = f.text("general.architecture")
    _architecture("general.architecture", arch, GGUF_ARCHITECTURES, file.path)
    num_layers = f.integer(f"{arch}.block_count", most=MAX_LAYERS)
    d_model = f.integer(f"{arch}.embedding_length")
    num_heads = f.integer(f"{arch}.attention.head_count")
    derived = d_model // num_heads or None if arch in ("llama", "qwen2") else None
    head_dim = f.integer(f"{arch}.attention.key_length", derived)
    f.refuse(f"{arch}.attention.value_length", (head_dim,))
    f.refuse(f"{arch}.rope.dimension_count", (head_dim,))
    f.refuse(f"{arch}.rope.scaling.type", ("none", "linear"))
    f.refuse(f"{arch}.expert_count", (0,))
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        f.refuse(f"{arch}.{key}", (0.0,))
    linear = f.values.get(f"{arch}.rope.scaling.type") == "linear"
    factor = f.number(f"{arch}.rope.scaling.factor", 1.0) if linear else f.number(f"{arch}.rope.scale_linear", 1.0)
    values = {
        "name": f.text("general.name", arch),
        "num_layers": num_layers,
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": f.integer(f"{arch}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "d_ff": f.integer(f"{arch}.feed_forward_length"),
        "vocab_size": _gguf_vocab_size(file, f, arch),
        "context": f.integer(f"{arch}.context_length"),
        "rope_base": f.number(f"{arch}.rope.freq_base", 10_000.0),
        "rope_scale": factor,
        "rope_divisors": _gguf_divisors(file, head_dim),
        "norm_eps": f.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "tied": "output.weight" not in file.tensors,
        "qkv_bias": arch == "qwen2",
        "qk_norm": arch in ("qwen3", "gemma3"),
    }
    if arch == "gemma3":
        f.refuse(f"{arch}.attention.sliding_window_pattern", (GEMMA3_PERIOD,))
        f.refuse(f"{arch}.rope.freq_base_swa", (GEMMA3_LOCAL_BASE,))
        values |= _gemma3(d_model, f.integer(f"{arch}.attention.sliding_window", GEMMA3_WINDOW))
        if num_layers == GEMMA3_27B_LAYERS:
            values["attention_scale"] = (d_model // num_heads) ** -0.5
    else:
        f.refuse(f"{arch}.attention.sliding_window", (0,))
    return _build(file.path, **values)


def _gemma3(d_model: int, window: int) -> dict[str, object]:
    return {
        "post_norms": True,
        "activation": "gelu_tanh",
        "embed_scale": math.sqrt(d_model),
        "window": window,
        "global_every": GEMMA3_PERIOD,
        "rope_base_local": GEMMA3_LOCAL_BASE,
    }


def _gguf_vocab_size(file: GGUFFile, f: Fields, arch: str) -> int:
    embedding = file.tensors.get("token_embd.weight")
    size = embedding.shape[0] if embedding else f.integer(f"{arch}.vocab_size")
    f.refuse(f"{arch}.vocab_size", (size,))
    return size


def _gguf_divisors(file: GGUFFile, head_dim: int) -> tuple[float, ...] | None:
    info = file.tensors.get("rope_freqs.weight")
    if info is None:
        return None
    if info.shape != (head_dim // 2,) or info.type.name != "F32":
        raise CheckpointFormatError(
            f"{file.path}: tensor 'rope_freqs.weight' is {info.type.name} {info.shape}; "
            f"allowed is F32 {(head_dim // 2,)}"
        )
    divisors = tuple(float(value) for value in file.values("rope_freqs.weight"))
    if not all(0 < value < 1e30 for value in divisors):
        raise CheckpointFormatError(f"{file.path}: tensor 'rope_freqs.weight' holds a divisor that is not above 0")
    return divisors


def config_from_hf(raw: Mapping[str, object], path: str) -> ModelConfig:
    """ModelConfig of a Hugging Face config.json.

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
    _architecture("architectures", names[0], tuple(HF_ARCHITECTURES), path)
    arch = HF_ARCHITECTURES[names[0]]
    d_model, num_heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    num_layers = f.integer("num_hidden_layers", most=MAX_LAYERS)
    derived = d_model // num_heads or None if arch in ("llama", "qwen2") else None
    head_dim = f.integer("head_dim", derived)
    context = f.integer("max_position_embeddings")
    activation = "gelu_pytorch_tanh" if arch == "gemma3" else "silu"
    for key in ("hidden_act", "hidden_activation"):
        f.refuse(key, (activation,))
    for key in ("mlp_bias", "use_bidirectional_attention"):
        f.refuse(key, (False,))
    f.refuse("attention_bias", (arch == "qwen2", False) if arch == "qwen2" else (False,))
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "quantization_config"):
        f.refuse(key)
    for key in ("partial_rotary_factor", "pretraining_tp"):
        f.refuse(key, (1, 1.0))
    values = {
        "name": f.text("_name_or_path", "") or names[0],
        "num_layers": num_layers,
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": f.integer("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "d_ff": f.integer("intermediate_size"),
        "vocab_size": f.integer("vocab_size"),
        "context": context,
        "norm_eps": f.number("rms_norm_eps"),
        # a value that equals the class's default may be missing from the file
        "tied": f.boolean("tie_word_embeddings", arch == "gemma3"),
        "qkv_bias": arch == "qwen2",
        "qk_norm": arch in ("qwen3", "gemma3"),
    }
    if arch == "gemma3":
        values |= _gemma3(d_model, f.integer("sliding_window", GEMMA3_WINDOW)) | _hf_gemma3(f, num_layers)
    else:
        _refuse_window(f, arch, context)
    return _build(path, **(values | _hf_rope(f, head_dim, arch)))


def _hf_gemma3(f: Fields, num_layers: int) -> dict[str, object]:
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        f.refuse(key, (GEMMA3_PERIOD,))
    kinds = ["sliding_attention" if (i + 1) % GEMMA3_PERIOD else "full_attention" for i in range(num_layers)]
    if f.has("layer_types") and f.values["layer_types"] != kinds:
        raise f.fail("layer_types", f"full_attention on every {GEMMA3_PERIOD}th layer, sliding_attention on the others")
    if not f.has("query_pre_attn_scalar"):
        raise f.fail("query_pre_attn_scalar", "a number above 0")
    return {"attention_scale": f.number("query_pre_attn_scalar") ** -0.5}


def _refuse_window(f: Fields, arch: str, context: int) -> None:
    # Qwen2 files carry a window that use_sliding_window=false turns off
    used = f.has("sliding_window") if arch == "llama" else f.boolean("use_sliding_window", False)
    if used and f.integer("sliding_window") < context:
        raise f.fail("sliding_window", f"none, or at least max_position_embeddings={context}")
    kinds = f.values.get("layer_types")
    if kinds is not None and not used and (not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"}):
        raise f.fail("layer_types", "full_attention on every layer")


def _hf_rope(f: Fields, head_dim: int, arch: str) -> dict[str, object]:
    """RoPE settings from `rope_theta` + `rope_scaling` (older files) or `rope_parameters` (newer ones)."""
    key = "rope_parameters" if f.has("rope_parameters") else "rope_scaling"
    scaling = f.section(key)
    values: dict[str, object] = {}
    if arch == "gemma3":
        local = scaling.section(f"{key}.sliding_attention")
        if local.values:
            local.refuse(f"{key}.sliding_attention.rope_type", ("default",))
            values["rope_base_local"] = local.number(f"{key}.sliding_attention.rope_theta")
            key = f"{key}.full_attention"
            scaling = scaling.section(key)
        else:
            values["rope_base_local"] = f.number("rope_local_base_freq", GEMMA3_LOCAL_BASE)
    default_base = 1_000_000.0 if arch == "gemma3" else 10_000.0
    values["rope_base"] = scaling.number(f"{key}.rope_theta", f.number("rope_theta", default_base))
    scaling.refuse(f"{key}.partial_rotary_factor", (1, 1.0))
    kind_key = f"{key}.rope_type" if scaling.has(f"{key}.rope_type") else f"{key}.type"
    kind = scaling.text(kind_key, "default")
    if kind == "linear":
        values["rope_scale"] = scaling.number(f"{key}.factor")
    elif kind == "llama3":
        values["rope_divisors"] = _llama3_divisors(scaling, key, head_dim, values["rope_base"])
    elif kind != "default":
        raise scaling.fail(kind_key, "'default', 'linear' or 'llama3'")
    return values


def _llama3_divisors(scaling: Fields, key: str, head_dim: int, base: float) -> tuple[float, ...]:
    """Divisors of the inverse frequencies.  Source: Llama 3.1, as in `transformers.modeling_rope_utils`."""
    factor, low, high = (scaling.number(f"{key}.{name}") for name in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = scaling.integer(f"{key}.original_max_position_embeddings")
    if not low < high:
        raise scaling.fail(f"{key}.high_freq_factor", f"a number above low_freq_factor={low}")
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (i / head_dim)
        # 0 where a wavelength does not fit into the trained context, 1 where it fits often, in between interpolated
        smooth = min(max((trained / wavelength - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(divisors)
