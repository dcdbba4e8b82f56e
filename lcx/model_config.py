"""The shape of a decoder: one frozen dataclass for Llama, SmolLM2, Qwen2, Qwen3 and Gemma 3."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model that is not a weight.  Hashable: a static argument of jit.

    Lengths are in tokens.  `context` is the longest text that the model was trained for.

    Raises:
      ValueError: sizes that do not divide, an unknown activation, or a window without its period.
    """

    name: str
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    context: int
    rope_base: float = 10_000.0
    rope_base_local: float | None = None  # base of the window layers (Gemma 3: 10,000)
    rope_divisors: tuple[float, ...] | None = None  # [D/2], inverse frequencies are divided by it (Llama 3.1)
    rope_scale: float = 1.0  # linear position scaling: positions are divided by it
    norm_eps: float = 1e-5
    tied: bool = True  # logits use the embedding
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # RMSNorm per head on q and k before RoPE (Qwen3, Gemma 3)
    post_norms: bool = False  # RMSNorm after attention and after the MLP as well (Gemma 3)
    activation: str = "silu"
    embed_scale: float = 1.0  # Gemma: sqrt(d_model)
    attention_scale: float | None = None  # None: head_dim ** -0.5
    window: int | None = None  # tokens that a window layer sees, the current one included
    global_every: int | None = None  # layer i (from 0) is global when (i + 1) % global_every == 0

    def __post_init__(self):
        for name in ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "vocab_size", "context"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} of model {self.name!r} must be an integer of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: allowed are {', '.join(ACTIVATIONS)}")
        if (self.window is None) != (self.global_every is None):
            raise ValueError(f"window={self.window} and global_every={self.global_every} go together")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise ValueError(
                f"rope_divisors has {len(self.rope_divisors)} entries, head_dim // 2 is {self.head_dim // 2}"
            )

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        """What logits are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def is_local(self, layer: int) -> bool:
        """Whether this layer (from 0) sees only the model's own window."""
        return self.global_every is not None and (layer + 1) % self.global_every != 0


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight in lcx's own layout.

    Matrices are [in, out], because XLA:CPU multiplies a vector by [in, out] 7 times faster than by [out, in].  q, k and v are
    one matrix (columns: H*D of q, K*D of k, K*D of v), gate and up are one (columns: F of gate, F of up).
    """
    c = config
    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed": (c.vocab_size, c.d_model), "norm": (c.d_model,)}
    if not c.tied:
        shapes["lm_head"] = (c.d_model, c.vocab_size)
    for i in range(c.num_layers):
        layer = {
            "attn_norm": (c.d_model,),
            "qkv": (c.d_model, qkv),
            "o": (c.num_heads * c.head_dim, c.d_model),
            "mlp_norm": (c.d_model,),
            "gate_up": (c.d_model, 2 * c.d_ff),
            "down": (c.d_ff, c.d_model),
        }
        if c.qkv_bias:
            layer["qkv_bias"] = (qkv,)
        if c.qk_norm:
            layer |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
        if c.post_norms:
            layer |= {"post_attn_norm": (c.d_model,), "post_mlp_norm": (c.d_model,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


SCALE_BYTES = 2  # a float16 scale for each output channel of a matrix in 8 bits


def weight_table(config: ModelConfig, dtype, weight_bits: int | None = None) -> dict[str, int]:
    """Bytes of the weights by kind: "matrices" of the layers, "embed", "lm_head" and "vectors" (norms, biases).

    Args:
      config: the model, or its part on one device.
      dtype: of the weights.
      weight_bits: 8 for the layers' matrices in 8 bits with a float16 scale per output channel, as W8 schemes do; embedding, head
        and vectors stay in `dtype`.  None: everything in `dtype`.
    """
    size = np.dtype(dtype).itemsize
    table = {"matrices": 0, "embed": 0, "lm_head": 0, "vectors": 0}
    for name, dims in param_shapes(config).items():
        if name in ("embed", "lm_head"):
            table[name] += math.prod(dims) * size
        elif len(dims) == 2 and weight_bits is not None:
            table["matrices"] += math.prod(dims) * weight_bits // 8 + dims[1] * SCALE_BYTES
        else:
            table["matrices" if len(dims) == 2 else "vectors"] += math.prod(dims) * size
    return table


def weight_bytes(config: ModelConfig, dtype, weight_bits: int | None = None) -> int:
    """Bytes of all weights, the sum of `weight_table`."""
    return sum(weight_table(config, dtype, weight_bits).values())


def num_params(config: ModelConfig) -> int:
    """Weights of the model, the embedding counted once."""
    return weight_bytes(config, np.int8)
