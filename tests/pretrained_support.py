"""Small random checkpoints: GGUF files through gguf's writer, folders in Hugging Face layout through safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

from lcx.model_config import ModelConfig, Rope

SIZES = {
    "num_layers": 2,
    "d_model": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 64,
    "vocab_size": 48,
    "context": 128,
}
# the parts of ModelConfig that an architecture fixes
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "gemma3": {
        "qk_norm": True,
        "head_dim": 16,
        "post_norms": True,
        "activation": "gelu_tanh",
        "embed_scale": 32**0.5,
        "attention_scale": 16**-0.5,
        "window": 16,
        "global_every": 6,
        "rope_local": Rope(base=10_000.0),
    },
}
ARCHITECTURES["phi3"] = {}
HF_CLASS = {
    "phi3": "Phi3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


# a byte-level vocabulary as long as SIZES says
TOKENS = [chr(i) for i in range(ord("A"), ord("A") + 45)] + ["ab", "abc", "<|end|>"]


def small_config(arch: str, tied: bool = True) -> ModelConfig:
    values = SIZES | ARCHITECTURES[arch]
    return ModelConfig(name=HF_CLASS[arch], rope=Rope(base=50_000.0), norm_eps=1e-6, tied=tied, **values)


def hf_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face names, (out, in)."""
    c, rng = config, np.random.default_rng(seed)
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = {"model.embed_tokens.weight": (c.vocab_size, c.d_model), "model.norm.weight": (c.d_model,)}
    if not c.tied:
        shapes["lm_head.weight"] = (c.vocab_size, c.d_model)
    for i in range(c.num_layers):
        layer = {
            "input_layernorm.weight": (c.d_model,),
            "post_attention_layernorm.weight": (c.d_model,),
            "self_attn.q_proj.weight": (q, c.d_model),
            "self_attn.k_proj.weight": (kv, c.d_model),
            "self_attn.v_proj.weight": (kv, c.d_model),
            "self_attn.o_proj.weight": (c.d_model, q),
            "mlp.gate_proj.weight": (c.d_ff, c.d_model),
            "mlp.up_proj.weight": (c.d_ff, c.d_model),
            "mlp.down_proj.weight": (c.d_model, c.d_ff),
        }
        if c.name == HF_CLASS["phi3"]:
            for name in [
                n
                for n in layer
                if n.startswith(("self_attn.q_", "self_attn.k_", "self_attn.v_", "mlp.gate_", "mlp.up_"))
            ]:
                del layer[name]
            layer |= {
                "self_attn.qkv_proj.weight": (q + 2 * kv, c.d_model),
                "mlp.gate_up_proj.weight": (2 * c.d_ff, c.d_model),
            }
        if c.o_bias:
            layer["self_attn.o_proj.bias"] = (c.d_model,)
        if c.qkv_bias:
            layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
        if c.qk_norm:
            layer |= {"self_attn.q_norm.weight": (c.head_dim,), "self_attn.k_norm.weight": (c.head_dim,)}
        if c.post_norms:
            layer |= {
                "pre_feedforward_layernorm.weight": (c.d_model,),
                "post_feedforward_layernorm.weight": (c.d_model,),
            }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def hf_json(arch: str, config: ModelConfig) -> dict:
    c = config
    raw = {
        "architectures": [HF_CLASS[arch]],
        "hidden_size": c.d_model,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.d_ff,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope.base,
        "tie_word_embeddings": c.tied,
        "hidden_act": "silu",
    }
    if arch == "qwen2":
        raw |= {"sliding_window": 16, "use_sliding_window": False}
    if arch == "gemma3":
        del raw["hidden_act"]
        raw |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": c.window,
            "query_pre_attn_scalar": c.head_dim,
            "rope_local_base_freq": 10_000.0,
            "layer_types": ["sliding_attention", "sliding_attention"],
        }
    return raw


def write_hf(folder: Path, raw: dict, weights: dict[str, np.ndarray], shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names, table = sorted(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        save_file(part, folder / file)
        table |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Half-split to interleaved rows, element by element: the converter's reshape written out."""
    out = np.empty_like(weight)
    head_dim = weight.shape[0] // num_heads
    for head in range(num_heads):
        for i in range(head_dim // 2):
            out[head * head_dim + 2 * i] = weight[head * head_dim + i]
            out[head * head_dim + 2 * i + 1] = weight[head * head_dim + i + head_dim // 2]
    return out


def write_gguf(path: Path, arch: str, config: ModelConfig, weights: dict[str, np.ndarray], extra=(), keys=None) -> Path:
    """A GGUF file of the same model: what a converter would do to the Hugging Face weights.

    `keys` are further keys: number, text or bool; {arch} in a name is the architecture.
    """
    c = config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(c.name)
    writer.add_block_count(c.num_layers)
    writer.add_embedding_length(c.d_model)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_context_length(c.context)
    writer.add_vocab_size(c.vocab_size)
    writer.add_rope_freq_base(c.rope.base)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    if c.window:
        writer.add_sliding_window(c.window)
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in (keys or {}).items():
        add[type(value)](key.format(arch=arch), value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (c.vocab_size - 1) + [3])
    writer.add_token_merges(["a b", "ab c"])
    layer = GGUF_NAMES | (
        {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
        if c.post_norms
        else {"post_attention_layernorm": "ffn_norm"}
    )
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, weight in weights.items():
        stem, kind = name.rsplit(".", 1)
        if stem in top:
            target = top[stem]
        else:
            _, _, index, inner = stem.split(".", 3)
            target = f"blk.{index}.{layer[inner]}"
            if arch == "llama" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = permute(weight, c.num_heads if "q_proj" in inner else c.num_kv_heads)
        if c.post_norms and "norm" in stem:
            weight = weight + 1
        writer.add_tensor(f"{target}.{kind}", weight)
    for name, weight in extra:
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
