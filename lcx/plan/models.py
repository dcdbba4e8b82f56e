"""Models of a plan: shapes, counted weights, the part on one of several devices, and a head split where none is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.axes import Aux
from lcx.errors import UserError, nearest
from lcx.experiment import Experiment
from lcx.model_config import ModelConfig, param_shapes
from lcx.models.decoder import Block, Layers
from lcx.pretrained import cache
from lcx.pretrained.checkpoints import read_json
from lcx.pretrained.gguf_header import open_gguf
from lcx.pretrained.model_configs import SHAPES, config_from_gguf, config_from_hf
from lcx.pretrained.registry import MODELS, located


def shape(name: str) -> ModelConfig:
    """Return the shape of a model; no weights are read.

    Args:
      name: a name of SHAPES, a model that is installed, a GGUF file, or a folder with a config.json.

    Raises:
      UserError: there is no such model; names the nearest.
    """
    if name in SHAPES:
        return SHAPES[name]
    if name in MODELS:
        return config_from_gguf(open_gguf(_installed(name)))
    path = Path(name).expanduser()
    if path.is_file():
        return config_from_gguf(open_gguf(path))
    if name and path.is_dir():
        return config_from_hf(read_json(path / "config.json"), str(path / "config.json"))
    allowed = (*SHAPES, *MODELS)
    raise UserError(
        f"model={name!r}; allowed are {', '.join(allowed)}, a GGUF file, or a folder{nearest(name, allowed)}"
    )


def _installed(name: str) -> Path:
    parts = [path for path in located(MODELS[name]) if path is not None and path.is_file()]
    if len(parts) < len(MODELS[name].files):
        raise UserError(f"model={name!r} is not installed; run: {MODELS[name].install}")
    if len(parts) == 1:
        return parts[0]
    joined = cache.folder() / MODELS[name].file_name
    if not joined.is_file():
        raise UserError(
            f"model={name!r} comes in {len(parts)} parts that are joined when it is first loaded; run it once"
        )
    return joined


def abstract_layers(config: ModelConfig, dtype) -> Layers:
    """Return the model's arrays as shapes."""
    weights: dict[str, Any] = {n: jax.ShapeDtypeStruct(s, dtype) for n, s in param_shapes(config).items()}
    arrays = {n.removeprefix("layers.0."): w for n, w in weights.items() if n.startswith("layers.0.")}
    block = nnx.split(nnx.eval_shape(lambda: Block({n: jnp.zeros(w.shape, w.dtype) for n, w in arrays.items()})))
    head = weights["embed" if config.tied else "lm_head"]
    # layers have the same shapes
    return Layers(config, weights["embed"], weights["norm"], head, (block,) * config.num_layers)


def shard(config: ModelConfig, count: int) -> ModelConfig:
    """Return one device's part under tensor parallelism over KV heads: 1 / count of heads, MLP columns and vocabulary.

    Raises:
      UserError: the KV heads or MLP columns do not divide.
    """
    for what in ("num_kv_heads", "d_ff"):
        if getattr(config, what) % count:
            fits = [n for n in range(1, count) if config.num_kv_heads % n == 0 and config.d_ff % n == 0]
            raise UserError(
                f"device: {count} devices do not divide {what}={getattr(config, what)} of model {config.name!r}; use {fits[-1]}"
            )
    return replace(
        config,
        num_heads=config.num_heads // count,
        num_kv_heads=config.num_kv_heads // count,
        d_ff=config.d_ff // count,
        vocab_size=-(-config.vocab_size // count),
    )


def planned_aux(experiment: Experiment, config: ModelConfig, count: int = 1) -> tuple[Aux | None, str]:
    """Return the method's arrays, and a note where they are not the published ones.

    Args:
      experiment: the method.
      config: the whole model.
      count: devices that share it; then the arrays are those of one device.

    Raises:
      UserError: arrays that were named, by a file, do not fit.
    """
    source = experiment.aux
    if source is None:
        return None, ""
    if count == 1:
        try:
            return source.load(config), ""
        except UserError:
            # memory depends on shapes: a model without arrays of its own is planned with stand-ins
            return source.stand_in(config)
    return source.stand_in(shard(config, count))
