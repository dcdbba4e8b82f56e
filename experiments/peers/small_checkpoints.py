"""Small random checkpoints whose logits transformers computes once: config.json of each, and its weights from numpy.

`families_reference.py` (torch, transformers) and tests/test_families.py (lcx) both build them from here.
"""

from __future__ import annotations

import numpy as np

V, E, F, H, K, D, L = 64, 48, 56, 4, 2, 16, 3
BASE = {
    "hidden_size": E,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": D,
    "vocab_size": V,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
SHORT, LONG = [1.0 + 0.05 * i for i in range(D // 2)], [1.0 + 1.5 * i for i in range(D // 2)]
LONGROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
PHI3 = {"head_dim": None, "hidden_size": H * D, "original_max_position_embeddings": 64}
PART = {"partial_rotary_factor": 0.75}
KINDS = ["full_attention", "sliding_attention", "full_attention"]
GEMMA3 = {
    "hidden_act": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 9,
    "query_pre_attn_scalar": 16,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "num_hidden_layers": 7,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
}

NEW_LINEAR = {"rope_theta": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e3}}
YARN_RATIO = {"factor": None, "original_max_position_embeddings": 128}
TRAINED_64 = {"original_max_position_embeddings": 64}
PART_LONGROPE = {**LONGROPE, "short_factor": SHORT[:6], "long_factor": LONG[:6]}
WINDOW_8 = {"use_sliding_window": True, "sliding_window": 8}

# name -> (class without "ForCausalLM", what differs from BASE, tokens of the text)
CASES: dict[str, tuple[str, dict, int]] = {
    "llama": ("Llama", {}, 40),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}, 40),
    "llama_biases": ("Llama", {"attention_bias": True}, 40),
    "llama_derived_head_dim": ("Llama", {"head_dim": None}, 40),
    "llama_linear": ("Llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, 40),
    "llama_linear_new": ("Llama", {**NEW_LINEAR}, 40),
    "llama_llama3": ("Llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 40),
    "llama_dynamic_within": ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 40}, 40),
    "llama_yarn_old": ("Llama", {"rope_scaling": {"type": "yarn", "finetuned": True, **YARN}, "max_position_embeddings": 128}, 100),
    "llama_yarn_new": ("Llama", {"rope_theta": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **YARN}}, 100),
    "llama_yarn_attention_factor": ("Llama", {"rope_scaling": {"rope_type": "yarn", "attention_factor": 0.7, **YARN}}, 100),
    "llama_yarn_mscale": ("Llama", {"rope_scaling": {"rope_type": "yarn", "mscale": 1.3, "mscale_all_dim": 0.6, **YARN}}, 100),
    "llama_yarn_betas": ("Llama", {"rope_scaling": {"rope_type": "yarn", "beta_fast": 8, "beta_slow": 0.5, **YARN}}, 100),
    "llama_yarn_no_truncate": ("Llama", {"rope_scaling": {"rope_type": "yarn", "truncate": False, **YARN}}, 100),
    "llama_yarn_context_ratio": ("Llama", {"rope_scaling": {"rope_type": "yarn", **YARN_RATIO}}, 100),
    "llama_yarn_biases": ("Llama", {"attention_bias": True, "rope_scaling": {"rope_type": "yarn", **YARN}}, 100),
    "llama_longrope_short": ("Llama", {"rope_scaling": {**LONGROPE, **TRAINED_64}}, 64),
    "llama_longrope_long": ("Llama", {"rope_scaling": {**LONGROPE, **TRAINED_64}}, 65),
    "llama_longrope_factor": ("Llama", {"rope_scaling": {**LONGROPE, "factor": 3.0, **TRAINED_64}}, 100),
    "mistral_no_window": ("Mistral", {"sliding_window": None}, 40),
    "mistral_window": ("Mistral", {"sliding_window": 7}, 40),
    "mistral_window_yarn": ("Mistral", {"sliding_window": 33, "rope_scaling": {"rope_type": "yarn", **YARN}}, 100),
    "mistral_wide_head": ("Mistral", {"sliding_window": None, "head_dim": 20}, 40),
    "mistral_window_one": ("Mistral", {"sliding_window": 1}, 40),
    "qwen2": ("Qwen2", {"head_dim": None}, 40),
    "qwen2_yarn": ("Qwen2", {"head_dim": None, "rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}}, 100),
    "qwen2_window_from_layer": ("Qwen2", {**WINDOW_8, "max_window_layers": 1, "head_dim": None}, 40),
    "qwen2_window_all": ("Qwen2", {**WINDOW_8, "max_window_layers": 0, "head_dim": None}, 40),
    "qwen2_layer_types": ("Qwen2", {**WINDOW_8, "layer_types": KINDS, "head_dim": None}, 40),
    "qwen2_window_off": ("Qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1, "head_dim": None}, 40),
    "qwen3": ("Qwen3", {}, 40),
    "qwen3_biases": ("Qwen3", {"attention_bias": True}, 40),
    "qwen3_yarn": ("Qwen3", {"rope_scaling": {"rope_type": "yarn", **YARN}}, 100),
    "qwen3_layer_types": ("Qwen3", {**WINDOW_8, "layer_types": KINDS}, 40),
    "phi3": ("Phi3", PHI3, 40),
    "phi3_window": ("Phi3", {**PHI3, "sliding_window": 11}, 40),
    "phi3_longrope_short": ("Phi3", {**PHI3, "rope_scaling": LONGROPE, "sliding_window": 2_048}, 64),
    "phi3_longrope_long": ("Phi3", {**PHI3, "rope_scaling": LONGROPE}, 100),
    "phi3_longrope_window": ("Phi3", {**PHI3, "rope_scaling": LONGROPE, "sliding_window": 11}, 100),
    "phi3_part": ("Phi3", {**PHI3, **PART}, 40),
    "phi3_part_longrope": ("Phi3", {**PHI3, **PART, "tie_word_embeddings": True, "rope_scaling": PART_LONGROPE}, 100),
    "gemma3": ("Gemma3", GEMMA3, 40),
    "gemma3_linear": ("Gemma3", {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 40),
}  # fmt: skip


def config_json(name: str) -> dict:
    """Return config.json of a case, a dictionary."""
    kind, changes, _ = CASES[name]
    # None removes a key, except where null is what files hold
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower() + ("_text" if kind == "Gemma3" else ""),
        **{k: v for k, v in {**BASE, **changes}.items() if v is not None or k == "sliding_window"},
    }


def ids(name: str) -> np.ndarray:
    """Return int64 [T], the text of a case."""
    return np.random.default_rng(7).integers(0, V, CASES[name][2])


def weights(name: str) -> dict[str, np.ndarray]:
    """Return the float32 weights of a case under the names of transformers, (out, in); tied ones without a head."""
    c = config_json(name)
    hidden, layers, kind = c["hidden_size"], c["num_hidden_layers"], CASES[name][0]
    head = c.get("head_dim") or hidden // H
    q, kv, phi3, gemma3 = H * head, K * head, kind == "Phi3", kind == "Gemma3"
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, hidden), "model.norm.weight": (hidden,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, hidden)
    biased = c.get("attention_bias", False)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.down_proj.weight": (hidden, F),
    }
    if phi3:
        layer |= {"self_attn.qkv_proj.weight": (q + 2 * kv, hidden), "mlp.gate_up_proj.weight": (2 * F, hidden)}
    else:
        layer |= {f"self_attn.{x}_proj.weight": (n, hidden) for x, n in (("q", q), ("k", kv), ("v", kv))}
        layer |= {"mlp.gate_proj.weight": (F, hidden), "mlp.up_proj.weight": (F, hidden)}
    if biased or kind == "Qwen2":
        layer |= {f"self_attn.{x}_proj.bias": (n,) for x, n in (("q", q), ("k", kv), ("v", kv))}
    if biased:
        layer["self_attn.o_proj.bias"] = (hidden,)
    if kind in ("Qwen3", "Gemma3"):
        layer |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    if gemma3:
        layer |= {"pre_feedforward_layernorm.weight": (hidden,), "post_feedforward_layernorm.weight": (hidden,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{part}": shape for part, shape in layer.items()}
    made = {}
    rng = np.random.default_rng(list(CASES).index(name))
    for key, shape in sorted(shapes.items()):
        # uniform numbers are the same in every version of numpy
        x = (rng.random(shape) * 2 - 1).astype(np.float32)
        if "norm" in key:
            x = 0.3 * x + (0 if gemma3 else 1)
        elif key.endswith("bias"):
            x = 0.7 * x
        elif "embed" in key:
            # as a head it gives logits with a spread of 1, as the other heads do
            x = x * np.float32(1.7 / shape[-1] ** 0.5 if c["tie_word_embeddings"] else 1)
        else:
            # queries and keys so large that attention is not flat: a wrong angle shows
            x = x * np.float32((2.5 if "self_attn.q" in key or "self_attn.k" in key else 1.7) / shape[-1] ** 0.5)
        made[key] = x.astype(np.float32)
    return made
