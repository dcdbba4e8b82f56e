"""The shape of a decoder: one frozen dataclass for Llama, Mistral, SmolLM2, Qwen2, Qwen3, Phi-3 and Gemma 3."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from lcx.errors import UserError

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding as data: pair i of a head turns by base ** (-2 i / dim) / divisors[i] radians a token.

    Linear scaling, Llama 3, YaRN and longrope differ in their divisors, YaRN and longrope also scale cos and sin.

    Raises:
      ValueError: a number that is not above 0, or an odd number of channels.
    """

    base: float = 10_000.0
    divisors: tuple[float, ...] = (1.0,)  # one for all pairs (linear scaling), or one for each
    scale: float = 1.0  # cos and sin are multiplied by it
    dim: int | None = None  # the head's first channels, which turn; the others stay.  None: all

    def __post_init__(self):
        for name, value in (("base", self.base), ("scale", self.scale), *(("divisors", d) for d in self.divisors)):
            if not 0 < value < 1e30:
                raise ValueError(f"{name} of RoPE has {value!r}; allowed is a number above 0")
        if self.dim is not None and (self.dim < 2 or self.dim % 2):
            raise ValueError(f"dim={self.dim} of RoPE must be an even number of channels")

    def pairs(self, head_dim: int) -> int:
        """Number of pairs that turn in a head."""
        return (self.dim or head_dim) // 2


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a model, without its weights.  Hashable: a static argument of jit.

    Lengths are in tokens.  `context` is the longest text that the model was trained for.

    Raises:
      ValueError: sizes that do not divide, an unknown activation, local layers without a window, or RoPE that does not fit the head.
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
    rope: Rope = Rope()
    rope_local: Rope | None = None  # that of the local layers where it is another (Gemma 3)
    rope_limit: int | None = None  # longest text that `rope` is for; see `at_length`
    rope_long: Rope | None = None  # that of longer texts (longrope); None: they are refused (dynamic NTK)
    norm_eps: float = 1e-5
    tied: bool = True  # logits use the embedding
    qkv_bias: bool = False  # Qwen2, and Llama and Qwen3 with attention_bias
    o_bias: bool = False  # Llama and Qwen3 with attention_bias
    qk_norm: bool = False  # RMSNorm per head on q and k before RoPE (Qwen3, Gemma 3)
    post_norms: bool = False  # RMSNorm after attention and after the MLP as well (Gemma 3)
    activation: str = "silu"
    embed_scale: float = 1.0  # Gemma: sqrt(d_model)
    attention_scale: float | None = None  # None: head_dim ** -0.5
    window: int | None = (
        None  # tokens that a local layer sees, the current one included; without local layers: of every layer (Mistral)
    )
    global_every: int | None = None  # layer i (from 0) is global when (i + 1) % global_every == 0 (Gemma 3)
    local_layers: tuple[bool, ...] | None = None  # or one entry a layer (Qwen2, Qwen3)

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
        if self.window is not None and (isinstance(self.window, bool) or self.window < 1):
            raise ValueError(f"window={self.window} must be at least 1 token")
        local = [name for name in ("global_every", "local_layers") if getattr(self, name) is not None]
        if len(local) > (self.window is not None):
            raise ValueError(f"window={self.window} and {' and '.join(local)}: a window has at most one of them")
        if self.local_layers is not None and len(self.local_layers) != self.num_layers:
            raise ValueError(f"local_layers has {len(self.local_layers)} entries, num_layers is {self.num_layers}")
        for name in ("rope", "rope_local", "rope_long"):
            rope = getattr(self, name)
            if rope is None:
                continue
            pairs = rope.pairs(self.head_dim)
            if pairs > self.head_dim // 2 or len(rope.divisors) not in (1, pairs):
                raise ValueError(
                    f"{name} turns {pairs} pairs with {len(rope.divisors)} divisors; head_dim // 2 is {self.head_dim // 2}"
                )

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        """Factor that logits are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def rope_scale(self) -> float:
        """Largest number that a frequency is divided by: the factor of linear scaling, of YaRN and of Llama 3."""
        return max(self.rope.divisors)

    def is_local(self, layer: int) -> bool:
        """Return True where this layer (from 0) sees only the model's own window."""
        if self.local_layers is not None:
            return self.local_layers[layer]
        if self.global_every is not None:
            return (layer + 1) % self.global_every != 0
        return self.window is not None

    def at_length(self, tokens: int) -> ModelConfig:
        """Return the config for texts of up to `tokens` tokens: RoPE is fixed for a session, since keys are rotated once.

        longrope has one set of divisors up to `rope_limit` and another beyond.  transformers chooses at each call, so a text that grows
        past the limit mixes both there; here a session that has room for more than `rope_limit` tokens uses the long ones throughout.
        Dynamic NTK is plain RoPE up to `rope_limit` and another RoPE for each length beyond: that is refused.

        Raises:
          UserError: dynamic NTK beyond its limit.
        """
        if self.rope_limit is None or tokens <= self.rope_limit:
            return self
        if self.rope_long is None:
            raise UserError(
                f"length={tokens} tokens: dynamic RoPE scaling of {self.name[:80]} has another rotation for each length "
                f"beyond {self.rope_limit}, which a cache cannot hold; shorten the text"
            )
        return replace(self, rope=self.rope_long, rope_limit=None, rope_long=None)


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every weight in lcx's own layout.

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
        if c.o_bias:
            layer["o_bias"] = (c.d_model,)
        if c.qk_norm:
            layer |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
        if c.post_norms:
            layer |= {"post_attn_norm": (c.d_model,), "post_mlp_norm": (c.d_model,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


SCALE_BYTES = 2  # a float16 scale for each output channel of a matrix in 8 bits


def weight_table(config: ModelConfig, dtype, weight_bits: int | None = None) -> dict[str, int]:
    """Return the bytes of the weights by kind: "matrices" of the layers, "embed", "lm_head" and "vectors" (norms, biases).

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
    """Return the bytes of all weights, the sum of `weight_table`."""
    return sum(weight_table(config, dtype, weight_bits).values())


def num_params(config: ModelConfig) -> int:
    """Return the number of weights of the model, the embedding counted once."""
    return weight_bytes(config, np.int8)
