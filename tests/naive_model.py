"""A decoder in float64 numpy, token by token and head by head: the oracle of tests/test_model.py and tests/test_policies.py.

It shares no code with lcx; from `ModelConfig` it reads sizes and switches.  One text, one list of tokens held per layer and KV head.
A method is two functions: `allow(q_pos, kv_pos)` masks, `keep(layer)` names what stays after a step.
"""

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Held:
    """What one KV head of one layer remembers; `raw` are keys before RoPE, `mass` the attention that each got so far."""

    pos: np.ndarray
    raw: np.ndarray
    key: np.ndarray
    value: np.ndarray
    mass: np.ndarray
    prob: np.ndarray | None = None  # [G,T,held] of the last step
    query: np.ndarray | None = None  # [G,T,D] of the last step

    def take(self, index):
        return Held(self.pos[index], self.raw[index], self.key[index], self.value[index], self.mass[index])


def rms(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def turn(x, pos, frequencies, scale=1.0):
    """Rotate pairs (i, i + R/2) as complex numbers; channels from R on stay.  x [T,D], pos [T], frequencies [R/2]."""
    half = len(frequencies)
    z = (x[:, :half] + 1j * x[:, half : 2 * half]) * np.exp(1j * np.asarray(pos, np.float64)[:, None] * frequencies)
    return np.concatenate([scale * z.real, scale * z.imag, x[:, 2 * half :]], -1)


def activation(name, x):
    if name == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@dataclass
class NaiveModel:
    config: object
    weights: dict
    keep: object = None  # keep(list of Held, one a KV head) -> list of index arrays
    allow: object = None
    cache_positions: bool = False
    last_pos: int = -1
    held: list = field(default_factory=list)

    def __post_init__(self):
        c = self.config
        self.weights = {n: np.asarray(w).astype(np.float64) for n, w in self.weights.items()}
        none = lambda *shape: np.zeros((0, *shape))
        blank = lambda: Held(none().astype(int), none(c.head_dim), none(c.head_dim), none(c.head_dim), none())
        self.held = [[blank() for _ in range(c.num_kv_heads)] for _ in range(c.num_layers)]

    def frequencies(self, local):
        rope, dim = self.rope(local), self.rope(local).dim or self.config.head_dim
        divisors = list(rope.divisors) * (dim // 2 if len(rope.divisors) == 1 else 1)
        return np.array([rope.base ** (-2 * i / dim) / divisors[i] for i in range(dim // 2)])

    def rope(self, local):
        c = self.config
        return c.rope_local if local and c.rope_local is not None else c.rope

    def step(self, tokens):
        """Feed tokens; the residual stream [T,E] after the last layer."""
        c = self.config
        pos = self.last_pos + 1 + np.arange(len(tokens))
        self.last_pos += len(tokens)
        x = self.weights["embed"][np.asarray(tokens)] * c.embed_scale
        for layer in range(c.num_layers):
            x = self.block(layer, x, pos)
        return x

    def logits(self, x):
        head = self.weights["embed"].T if self.config.tied else self.weights["lm_head"]
        return rms(x, self.weights["norm"], self.config.norm_eps) @ head

    def block(self, layer, x, pos):
        c, D = self.config, self.config.head_dim
        w = {n.split(".", 2)[2]: a for n, a in self.weights.items() if n.startswith(f"layers.{layer}.")}
        local = c.window is not None
        if c.global_every is not None:
            local = (layer + 1) % c.global_every != 0
        if c.local_layers is not None:
            local = c.local_layers[layer]
        frequencies, amplitude = self.frequencies(local), self.rope(local).scale
        scale = 1 / math.sqrt(D) if c.attention_scale is None else c.attention_scale
        wide = rms(x, w["attn_norm"], c.norm_eps) @ w["qkv"]
        if c.qkv_bias:
            wide = wide + w["qkv_bias"]
        columns = [wide[:, i * D : (i + 1) * D] for i in range(c.num_heads + 2 * c.num_kv_heads)]
        queries, keys = columns[: c.num_heads], columns[c.num_heads : c.num_heads + c.num_kv_heads]
        values = columns[c.num_heads + c.num_kv_heads :]
        if c.qk_norm:
            queries = [rms(q, w["q_norm"], c.norm_eps) for q in queries]
            keys = [rms(k, w["k_norm"], c.norm_eps) for k in keys]
        group = c.num_heads // c.num_kv_heads
        outs = []
        for head in range(c.num_kv_heads):
            old = self.held[layer][head]
            n = len(old.pos)
            now = Held(
                pos=np.concatenate([old.pos, pos]),
                raw=np.concatenate([old.raw, keys[head]]),
                key=np.concatenate([old.key, turn(keys[head], pos, frequencies, amplitude)]),
                value=np.concatenate([old.value, values[head]]),
                mass=np.concatenate([old.mass, np.zeros(len(pos))]),
            )
            q_turn, read = pos, now.key
            if self.cache_positions:
                rank = np.argsort(np.argsort(now.pos))
                q_turn, read = rank[n:], turn(now.raw, rank, frequencies, amplitude)
            sees = now.pos[None] <= pos[:, None]
            if local:
                sees &= pos[:, None] - now.pos[None] < c.window
            if self.allow is not None:
                sees &= self.allow(pos[:, None], now.pos[None])
            now.query = np.stack(
                [turn(queries[head * group + g], q_turn, frequencies, amplitude) for g in range(group)]
            )
            logits = np.where(sees, now.query @ read.T * scale, -np.inf)
            prob = np.exp(logits - logits.max(-1, keepdims=True))
            now.prob = prob / prob.sum(-1, keepdims=True)
            now.mass = now.mass + now.prob.sum(1).mean(0)
            outs += list(now.prob @ now.value)
            self.held[layer][head] = now
        if self.keep is not None:
            chosen = self.keep(self.held[layer])
            self.held[layer] = [h.take(np.sort(i)) for h, i in zip(self.held[layer], chosen, strict=True)]
        out = np.concatenate(outs, -1) @ w["o"]
        if c.o_bias:
            out = out + w["o_bias"]
        x = x + (rms(out, w["post_attn_norm"], c.norm_eps) if c.post_norms else out)
        wide = rms(x, w["mlp_norm"], c.norm_eps) @ w["gate_up"]
        out = (activation(c.activation, wide[:, : c.d_ff]) * wide[:, c.d_ff :]) @ w["down"]
        return x + (rms(out, w["post_mlp_norm"], c.norm_eps) if c.post_norms else out)
