"""A plan beside the measured memory of an installed device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.measure.memory import peak_rss_bytes, reset_peak_rss
from lcx.model_config import ModelConfig, param_shapes
from lcx.models.decoder import Block, Layers
from lcx.plan.devices import Device
from lcx.plan.models import planned_aux
from lcx.plan.rows import check_lengths, estimate
from lcx.session import Session

GIB = 2**30


def meaningless_layers(config: ModelConfig, dtype) -> Layers:
    """Return weights of the model's shapes that are all 0.01: memory does not depend on their values."""
    fill = {n: s for n, s in param_shapes(config).items() if not n.startswith("layers.")}
    top = {n: jnp.full(s, 0.01, dtype) for n, s in fill.items()}

    def block(i: int):
        start = f"layers.{i}."
        shapes = {n.removeprefix(start): s for n, s in param_shapes(config).items() if n.startswith(start)}
        return nnx.split(Block({n: jnp.full(s, 0.01, dtype) for n, s in shapes.items()}))

    head = top["embed" if config.tied else "lm_head"]
    return Layers(config, top["embed"], top["norm"], head, tuple(block(i) for i in range(config.num_layers)))


def measured_peak(
    config: ModelConfig, experiment: Experiment, length: int, new_tokens: int, dtype: Any, batch: int = 1
) -> tuple[int, str]:
    """Return the measured peak in bytes of a prompt and two steps on this machine's first device, and the name of the measure.

    A GPU's allocator counts exactly, since the process began; on a CPU it is how much the resident memory grew.
    """
    where = jax.devices()[0]
    reset_peak_rss()
    before = peak_rss_bytes() or 0
    aux, _ = planned_aux(experiment, config)
    layers = meaningless_layers(config, dtype)
    session = Session(layers, experiment.recipe, length, new_tokens, aux=aux, batch=batch, schedule=experiment.schedule)
    tokens = np.arange(batch * length, dtype=np.int32).reshape(batch, length) % config.vocab_size
    session.prefill(tokens)
    for _ in range(min(2, new_tokens)):
        jax.block_until_ready(session.step(np.zeros((batch, 1), np.int32)))
    stats = where.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], f"peak_bytes_in_use of {where.device_kind}"
    return (peak_rss_bytes() or 0) - before, "growth of resident memory, programs included"


def check(
    config: ModelConfig,
    experiments: Mapping[str, Experiment],
    lengths: Sequence[int],
    chunk_size: int,
    settings: Mapping[str, Any],
) -> Iterator[str]:
    """Return one line for the one method and length: predicted beside measured.

    Raises:
      UserError: more than one point, since a device's peak is that of the process; or 8-bit weights, which do not run.
    """
    check_lengths(lengths)
    if len(experiments) != 1 or len(lengths) != 1:
        raise UserError(
            "check: give one --config and one of --lengths; a device counts its peak since the process began"
        )
    if settings["weight_bits"] is not None:
        raise UserError(f"check: weight_bits={settings['weight_bits']} is counted and does not run; leave it out")
    ((method, experiment),), (length,) = experiments.items(), lengths
    experiment = experiment if experiment.recipe.one_shot else experiment.with_chunks(chunk_size)
    if experiment.recipe.has_budget:
        experiment = experiment.with_budget(length, settings["budget"], settings["keep_ratio"])
    new_tokens, dtype, batch = (settings[name] for name in ("new_tokens", "dtype", "batch"))
    # the machine's own device, whatever its kind; its memory is not read
    local = Device("this machine", None, 1, 1 << 62)
    row = estimate(config, experiment, length, new_tokens, dtype, local, batch)
    measured, source = measured_peak(config, experiment, length, new_tokens, jnp.dtype(dtype), batch)
    yield (
        f"{method}, {length:,} tokens: predicted {row.at.peak_bytes / GIB:.3f} GiB ({row.at.program}), measured {measured / GIB:.3f} GiB "
        f"({source}), predicted / measured {row.at.peak_bytes / max(measured, 1):.3f}"
    )
