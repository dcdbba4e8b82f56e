"""Times that a device cannot beat, from operations and bytes: predicted, never measured."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lcx.axes import Aux
from lcx.cache import shape_bytes
from lcx.experiment import Experiment
from lcx.model_config import ModelConfig, weight_table
from lcx.plan.programs import Setting
from lcx.plan.targets import GpuTarget
from lcx.recipe import Recipe
from lcx.segments import Chain, num_rows
from lcx.storage import Shape


@dataclass(frozen=True)
class Roofline:
    """Operations and bytes of one device, and the seconds they take at the vendor's figures; a lower bound.

    Attributes:
      linear_flops, attention_flops: of the prefill; every key that a query may read is counted.
      prefill_bytes: weights once a step, and the cache of half of the prompt once a step.
      decode_flops, decode_bytes: of one token after the prompt: weights and the cache, once.
      prefill_s, decode_s: the larger of operations and bytes.
    """

    linear_flops: float
    attention_flops: float
    prefill_bytes: float
    decode_flops: float
    decode_bytes: float
    prefill_s: float
    decode_s: float


def roofline(
    setting: Setting, experiment: Experiment, length: int, aux: Aux | None, weight_bits: int | None, target: GpuTarget
) -> Roofline:
    """Return the roofline of a prefill of `length` tokens and of the decode step that follows."""
    config, recipe, batch = setting.config, experiment.recipe, setting.batch
    width = experiment.schedule.width(length)
    table = weight_table(config, setting.dtype, weight_bits)
    # a lookup reads one row of the embedding; tied, it is the head as well
    read = sum(table.values()) - (0 if config.tied else table["embed"])
    matrices = weight_table(config, jnp.int8)["matrices"]  # a byte each: their number
    head = config.d_model * config.vocab_size
    linear = 2.0 * batch * (matrices * length + head)
    attention, decode_attention, cache = 0.0, 0.0, 0.0
    for layer in range(config.num_layers):
        attention += batch * _attention_flops(config, recipe, "prefill", layer, length, width, aux)
        decode_attention += batch * _attention_flops(config, recipe, "decode", layer, length, 1, aux)
        cache += _read_bytes(setting, recipe, layer, length, aux)
    held = recipe.bytes(config, length, 0, phase="prefill", aux=aux, batch=batch, dtype=setting.dtype)
    prefill_bytes = -(-length // width) * (read + held / 2)
    decode_flops = 2.0 * batch * (matrices + head) + decode_attention
    decode_bytes = read + cache
    flops, bandwidth = target.bf16_flops, target.bandwidth
    return Roofline(
        linear,
        attention,
        prefill_bytes,
        decode_flops,
        decode_bytes,
        max((linear + attention) / flops, prefill_bytes / bandwidth),
        max(decode_flops / flops, decode_bytes / bandwidth),
    )


def _attention_flops(
    config: ModelConfig, recipe: Recipe, phase: str, layer: int, length: int, width: int, aux: Aux | None
) -> float:
    """Return the operations of q.k and p.v, 4 a channel for every (query, readable key) pair.  A step sees itself whole."""
    acting, sizes = recipe.at(phase, layer, config), recipe.capacities(phase, layer, Shape(config, length))
    total = 0.0
    for chain in acting.chains:
        most = sum(sizes[s.name] for s in chain)
        if phase == "decode":
            pairs = float(min(length, most) + 1)
        else:
            start = np.arange(0, length, width, dtype=np.float64)
            count = np.minimum(width, length - start)
            pairs = float((count * np.minimum(start, most) + count * (count + 1) / 2).sum())
        if config.is_local(layer):
            pairs = min(pairs, float(config.window or 0) * (1 if phase == "decode" else length))
        total += 4.0 * config.head_dim * config.group * num_rows(config, chain[0].heads, aux, layer) * pairs
    return total


def _read_bytes(setting: Setting, recipe: Recipe, layer: int, length: int, aux: Aux | None) -> float:
    """Return the cache bytes that a decode step reads: all, or state and at most the budget of each query head where pages are chosen."""
    acting = recipe.at("decode", layer, setting.config)
    shape = Shape(setting.config, length, 0, setting.batch, setting.dtype)
    cache = jax.eval_shape(lambda: recipe.init_layer("decode", layer, shape, aux))
    return sum(_chain_bytes(acting, chain, cache, setting.config.group) for chain in acting.chains)


def _chain_bytes(recipe: Recipe, chain: Chain, cache, group: int) -> float:
    total = 0.0
    for s in chain:
        slots = cache[s.name]
        share = recipe.pattern.share(slots.pos.shape[-1], group)
        total += shape_bytes((slots.payload, slots.pos)) * share + shape_bytes(slots.state)
    return total
