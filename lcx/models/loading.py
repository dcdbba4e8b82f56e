"""A pretrained model ready to run: its layers on the device, and its tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from lcx.checks import kind
from lcx.errors import UserError
from lcx.model_config import ModelConfig, num_params, weight_bytes
from lcx.models.decoder import Layers, Model
from lcx.pretrained import Tokenizer, load_arrays
from lcx.text import visible


@dataclass(frozen=True)
class Pretrained:
    """Loaded model.  `name` is the requested one, `sha256` that of its file or folder, `licence` as the source states it."""

    layers: Layers
    tokenizer: Tokenizer
    name: str
    sha256: str
    licence: str

    def __repr__(self) -> str:
        c, dtype = self.config, self.layers.dtype
        return (
            f"{type(self).__name__} {visible(self.name, 200)}, {visible(self.licence or 'no licence stated', 100)}\n"
            f"  {num_params(c):,} weights in {dtype}, {weight_bytes(c, dtype):,} bytes; context {c.context:,} tokens\n"
            f"  {c.num_layers} layers, {c.num_heads} query and {c.num_kv_heads} KV heads of {c.head_dim} channels\n"
            f"  d_model {c.d_model:,}, MLP {c.d_ff:,}, vocabulary {c.vocab_size:,}\n"
            f"  sha256 {self.sha256}"
        )

    @property
    def config(self) -> ModelConfig:
        return self.layers.config

    @cached_property
    def tensors_sha256(self) -> str:
        """sha256 of the weights' values, see `tensors_sha256`; worked out when it is first asked for, about a second for 10^9 bytes."""
        return tensors_sha256(self.layers)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return self.tokenizer.stop_ids

    def choose(self, logits: jax.Array) -> np.ndarray:
        """Return the most likely token of each row [B] of logits [B,V], among those that stand for a text."""
        known = self.tokenizer.has_text[: logits.shape[-1]]
        if len(known) == logits.shape[-1] and known.all():
            return np.asarray(jnp.argmax(logits, -1))
        allowed = np.zeros(logits.shape[-1], bool)
        allowed[: len(known)] = known
        return np.asarray(jnp.argmax(jnp.where(allowed, logits, -jnp.inf), -1))

    def check_length(self, tokens: int, allow_extrapolation: bool = False) -> None:
        """Raise UserError when a text of `tokens` tokens is longer than the model was trained for."""
        if tokens > self.config.context and not allow_extrapolation:
            raise UserError(
                f"length={tokens} tokens is beyond the context of {self.name}, {self.config.context}; "
                "shorten it, or pass --allow_extrapolation"
            )


def tensors_sha256(layers: Layers, dtype: str | None = None) -> str:
    """Return the sha256 of a model's tensors: their shapes, and their values as float32, in lcx's own layout.

    Files that hold the same numbers have the same one, whatever their format, their names and the type that the numbers are stored in.

    Args:
      layers: the model.
      dtype: type that the values are rounded to before; None: none.  A model that is loaded in bfloat16 is another than in float32.
    """
    digest = hashlib.sha256()
    top = [layers.embed, layers.norm] + ([] if layers.config.tied else [layers.head])
    for leaf in [*top, *(x for _, state in layers.layers for x in jax.tree.leaves(state))]:
        values = np.asarray(leaf if dtype is None else leaf.astype(dtype)).astype("<f4")
        digest.update(f"{values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def load(name: str, dtype: str = "float32", accept_licence: bool = False) -> Pretrained:
    """Load a model by name, path or hub id; arguments and errors are those of `lcx.pretrained.load_arrays`."""
    kind("model", name, str)
    checkpoint = load_arrays(name, dtype, accept_licence)
    layers = Layers.of(Model(checkpoint.config, {n: jnp.asarray(a) for n, a in checkpoint.arrays.items()}))
    return Pretrained(layers, checkpoint.tokenizer, checkpoint.name, checkpoint.sha256, checkpoint.licence)
