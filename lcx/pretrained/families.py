"""Model families by their names in files: loaded ones, and refused ones with the reason.  README's table is made from FAMILIES."""

from __future__ import annotations

from dataclasses import dataclass

from lcx.pretrained.errors import CheckpointFormatError


@dataclass(frozen=True)
class Family:
    """Checkpoints of one architecture.

    Attributes:
      checkpoints: the names that people use.
      hf: `architectures` of config.json.
      gguf: `general.architecture` of a GGUF file.
      refused: why lcx does not compute it, None where it does.
      tested: how that was tested; a refusal by its message.
    """

    checkpoints: str
    hf: str
    gguf: str
    refused: str | None = None
    tested: str = "refusal"


PEERS = "*peers*"  # README says what that is
FAMILIES = (
    Family("SmolLM, SmolLM2", "LlamaForCausalLM", "llama", tested=f"{PEERS}; SmolLM2-135M: llama.cpp, transformers on its own weights"),
    Family("Llama 1, 2, 3, 3.1, 3.2, 3.3 (text)", "LlamaForCausalLM", "llama", tested=f"{PEERS}, with each RoPE scaling and biases"),
    Family("Yi, TinyLlama, Vicuna, CodeLlama, Yarn-Llama-2", "LlamaForCausalLM", "llama", tested="as Llama"),
    Family("DeepSeek-LLM, DeepSeek-R1-Distill-Llama", "LlamaForCausalLM", "llama", tested="as Llama"),
    Family("Mistral 7B, Mistral-Nemo, Mistral-Small 22B/24B (text)", "MistralForCausalLM", "llama", tested=f"{PEERS}, with a window"),
    Family("Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen", "Qwen2ForCausalLM", "qwen2", tested=f"{PEERS}, with YaRN and windows"),
    Family("Qwen3 (dense)", "Qwen3ForCausalLM", "qwen3", tested=f"{PEERS}, with YaRN, windows and biases"),
    Family("Phi-3 mini, medium, Phi-3.5-mini, Phi-4, Phi-4-mini", "Phi3ForCausalLM", "phi3", tested=f"{PEERS}, with longrope and a window"),
    Family("Gemma 3 270M, 1B (text)", "Gemma3ForCausalLM", "gemma3", tested=f"{PEERS}; 270M: llama.cpp on its own weights"),
    Family("Gemma 3 4B, 12B, 27B", "Gemma3ForConditionalGeneration", "gemma3", "images beside text"),
    Family("Gemma 2", "Gemma2ForCausalLM", "gemma2", "soft-capped logits"),
    Family("Gemma", "GemmaForCausalLM", "gemma", "not checked against transformers"),
    Family("SmolLM3", "SmolLM3ForCausalLM", "smollm3", "some layers have no RoPE"),
    Family("OLMo 2", "Olmo2ForCausalLM", "olmo2", "norms over all heads of q and k, none before attention"),
    Family("OLMo", "OlmoForCausalLM", "olmo", "layer norms without weights"),
    Family("Granite 3", "GraniteForCausalLM", "granite", "multipliers on the residual stream and the logits"),
    Family("Phi-1, Phi-1.5, Phi-2", "PhiForCausalLM", "phi2", "layer norms, and attention beside the MLP"),
    Family("Phi-3-small", "Phi3SmallForCausalLM", "phi3small", "block-sparse attention"),
    Family("Phi-3.5-MoE", "PhimoeForCausalLM", "phimoe", "experts"),
    Family("Mixtral", "MixtralForCausalLM", "mixtral", "experts"),
    Family("Ministral 8B", "MinistralForCausalLM", "ministral", "not checked against transformers"),
    Family("Mistral-Small 3.1, 3.2, Pixtral", "Mistral3ForConditionalGeneration", "mistral3", "images beside text"),
    Family("Qwen (1)", "QWenLMHeadModel", "qwen", "code of its own"),
    Family("Qwen1.5-MoE, Qwen2-57B-A14B", "Qwen2MoeForCausalLM", "qwen2moe", "experts"),
    Family("Qwen3-30B-A3B, Qwen3-235B-A22B", "Qwen3MoeForCausalLM", "qwen3moe", "experts"),
    Family("Qwen3-Next", "Qwen3NextForCausalLM", "qwen3next", "linear attention layers"),
    Family("Qwen2-VL, Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", "qwen2vl", "images beside text"),
    Family("Llama 3.2 Vision", "MllamaForConditionalGeneration", "mllama", "images beside text"),
    Family("Llama 4", "Llama4ForConditionalGeneration", "llama4", "experts, layers without RoPE, images"),
    Family("DeepSeek-V2", "DeepseekV2ForCausalLM", "deepseek2", "latent attention and experts"),
    Family("DeepSeek-V3, R1, Kimi-K2", "DeepseekV3ForCausalLM", "deepseek2", "latent attention and experts"),
    Family("gpt-oss", "GptOssForCausalLM", "gpt-oss", "experts and learned sinks"),
    Family("InternLM2", "InternLM2ForCausalLM", "internlm2", "code of its own"),
    Family("ChatGLM, GLM-4", "GlmForCausalLM", "chatglm", "interleaved RoPE on half of the head"),
    Family("Falcon", "FalconForCausalLM", "falcon", "layer norms, and attention beside the MLP"),
    Family("Command R", "CohereForCausalLM", "command-r", "layer norms, and attention beside the MLP"),
    Family("StarCoder2", "Starcoder2ForCausalLM", "starcoder2", "layer norms and an MLP without a gate"),
    Family("StableLM 2", "StableLmForCausalLM", "stablelm", "layer norms"),
    Family("GPT-2", "GPT2LMHeadModel", "gpt2", "no RoPE, layer norms"),
    Family("Mamba", "MambaForCausalLM", "mamba", "no attention"),
)  # fmt: skip

HF_ARCHITECTURES = tuple(dict.fromkeys(f.hf for f in FAMILIES if f.refused is None))
GGUF_ARCHITECTURES = tuple(dict.fromkeys(f.gguf for f in FAMILIES if f.refused is None))


def check_architecture(key: str, name: str, path: str) -> None:
    """Raise CheckpointFormatError unless lcx loads this architecture; says why not where that is known.

    Args:
      key: "architectures" of config.json or "general.architecture" of a GGUF header.
      name: its value.
      path: of the file.
    """
    gguf = key == "general.architecture"
    allowed = GGUF_ARCHITECTURES if gguf else HF_ARCHITECTURES
    if name in allowed:
        return
    family = next((f for f in FAMILIES if (f.gguf if gguf else f.hf) == name), None)
    known = f" ({family.checkpoints})" if family else ""
    why = family.refused if family else "it is unknown to lcx"
    raise CheckpointFormatError(
        f"{path}: {key}={name[:40]!r}{known} is not loaded: {why}; allowed are {', '.join(allowed)}"
    )


def table() -> str:
    """Return README's table of model families, in Markdown; families that are refused for one reason share a row."""
    rows = ["| checkpoints | architecture | loads | tested |", "| --- | --- | --- | --- |"]
    rows += [f"| {f.checkpoints} | `{f.hf}` | yes | {f.tested} |" for f in FAMILIES if f.refused is None]
    for reason in dict.fromkeys(f.refused for f in FAMILIES if f.refused is not None):
        same = [f for f in FAMILIES if f.refused == reason]
        names, classes = ", ".join(f.checkpoints for f in same), ", ".join(f"`{f.hf}`" for f in same)
        rows.append(f"| {names} | {classes} | no: {reason} | refusal |")
    return "\n".join(rows)
