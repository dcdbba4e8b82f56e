"""Calibration of KVQuant: ranges of keys by channel, and codebooks by weighted k-means.

KVQuant, Hooper et al. 2024, arXiv:2401.18079.  Two passes over pieces of a text, each a text of its own whose first token takes no part:
one for the percentiles of the keys, one that adds up, by layer, the weight of normalised keys and values in fine bins.  The weights are
Fisher information, the squared gradient of the summed NLL, times the squared range of the entry (section 3.3 of the paper; the authors'
code leaves the range out).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcx import texts
from lcx.artefacts import store
from lcx.artefacts.source import AuxSource
from lcx.axes import Aux
from lcx.codecs.kvquant import BITS
from lcx.codecs.outliers import extremes, marked, num_outliers, value_range
from lcx.errors import UserError
from lcx.model_config import ModelConfig
from lcx.models.decoder import Layers, embed_program, enter, leave, logits_program, rotation
from lcx.models.loading import Pretrained

METHOD = "kvquant"
FOLDER = Path(__file__).parent / "kvquant_tables"
AGAIN = "python -m experiments.calibrate --method=kvquant --model=MODEL --out=FILE, then KVQuantTables(file=FILE)"
WEIGHTS = ("fisher * range^2", "fisher")
BINS = 8_192  # of [-1, 1]; the nearest centroids of two bits are 500 bins apart
ROWS = 256  # logits at a time
LEAST = 1e-6  # range of a channel that does not vary


@dataclass(frozen=True)
class Settings:
    """Settings that a calibration depends on, beside model and text.

    Args:
      tokens: of the text, from its beginning, a multiple of piece.
      piece: tokens of one text of the calibration.
      outliers: share of entries outside the ranges, on both sides together.
      weight: of an entry in k-means: the paper's, or the authors' code's.
      iterations: of k-means, at most.
    """

    tokens: int = 16_384
    piece: int = 1_024
    outliers: float = 0.01
    weight: str = WEIGHTS[0]
    iterations: int = 50

    def __post_init__(self):
        if self.piece < 2 or self.tokens < self.piece or self.tokens % self.piece:
            raise UserError(
                f"tokens={self.tokens} must be a positive multiple of piece={self.piece}, at least 2 tokens"
            )
        if not 0 <= self.outliers < 0.5:
            raise UserError(f"outliers={self.outliers} must be a share of at least 0 and below 0.5")
        if self.weight not in WEIGHTS:
            raise UserError(f"weight={self.weight!r}: allowed are {', '.join(map(repr, WEIGHTS))}")


# ---- the model, with gradients


@partial(jax.jit, static_argnames=("graph", "config", "local"))
def layer_program(state, x, shift_k, shift_v, *, graph, config: ModelConfig, local: bool):
    """One layer with dense attention and room for a gradient: x [1,T,E] -> (x, k, v), k before RoPE, both [1,K,T,D]."""
    w = {n: p[...] for n, p in vars(nnx.merge(graph, state)).items() if isinstance(p, nnx.Param)}
    q, k, v = enter(w, config, x)
    k, v = k + shift_k, v + shift_v
    pos, turn = jnp.arange(x.shape[1]), rotation(config, local)
    logits = jnp.einsum("BKGTD,BKSD->BKGTS", turn(q, pos), turn(k, pos)).astype(jnp.float32) * config.scale
    distance = pos[:, None] - pos
    seen = distance >= 0
    if local and config.window is not None:
        seen &= distance < config.window
    p = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), -1).astype(v.dtype)
    return leave(w, config, x, jnp.einsum("BKGTS,BKSD->BKGTD", p, v)), k, v


@partial(jax.jit, static_argnames=("graph", "config", "local"))
def gradient_program(state, x, shift, up, *, graph, config: ModelConfig, local: bool):
    """Gradients of the loss with respect to a layer's x, k and v, from that of its result; k and v as well."""
    run = lambda x, dk, dv: layer_program(state, x, dk, dv, graph=graph, config=config, local=local)
    out, pull, (k, v) = jax.vjp(lambda *a: (lambda x, k, v: (x, (k, v)))(*run(*a)), x, shift, shift, has_aux=True)
    return pull(up.astype(out.dtype)), k, v


@partial(jax.jit, static_argnames=("eps", "tied"))
def loss_gradient(x, targets, norm, head, *, eps, tied):
    """Summed NLL of the targets [N], and its gradient with respect to x [N,E]."""

    def loss(x):
        logits = logits_program(x, norm, head, eps=eps, tied=tied)
        return jnp.sum(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[:, None], -1)[:, 0])

    return jax.value_and_grad(loss)(x)


def _statics(layers: Layers, i: int) -> tuple[Any, dict[str, Any]]:
    graph, state = layers.layers[i]
    return state, {"graph": graph, "config": layers.config, "local": layers.config.is_local(i)}


def forward(layers: Layers, ids) -> tuple[list[jax.Array], list[np.ndarray]]:
    """The residual stream before every layer and after the last, and each layer's keys before RoPE, [T, K * D]."""
    x = embed_program(layers.embed, jnp.asarray(ids, jnp.int32)[None], scale=layers.config.embed_scale)
    keys: list[np.ndarray] = []
    streams: list[jax.Array] = [x]
    for i in range(layers.config.num_layers):
        state, static = _statics(layers, i)
        x, k, _ = layer_program(state, x, 0.0, 0.0, **static)
        streams.append(x)
        keys.append(_by_token(k))
    return streams, keys


def gradients(layers: Layers, ids):
    """Yield (layer, k, v, dk, dv), [T, K * D] each, from the last layer to the first; the loss is the summed NLL of ids[1:]."""
    config = layers.config
    streams, _ = forward(layers, ids)
    targets = jnp.asarray(ids[1:], jnp.int32)
    x, parts = streams[-1][0], []
    head = {"eps": config.norm_eps, "tied": config.tied}
    for start in range(0, len(targets), ROWS):
        rows = slice(start, min(start + ROWS, len(targets)))
        parts.append(loss_gradient(x[rows], targets[rows], layers.norm, layers.head, **head)[1])
    # the last token predicts nothing
    up = jnp.concatenate([*parts, jnp.zeros_like(x[:1])])[None]
    shift = jnp.zeros((1, config.num_kv_heads, len(ids), config.head_dim), layers.dtype)
    for i in reversed(range(config.num_layers)):
        state, static = _statics(layers, i)
        (up, dk, dv), k, v = gradient_program(state, streams[i], shift, up, **static)
        yield i, *map(_by_token, (k, v, dk, dv))


def _by_token(x) -> np.ndarray:
    """[1,K,T,D] -> float32 [T, K * D]."""
    _, K, T, D = x.shape
    return np.asarray(x[0].swapaxes(0, 1).reshape(T, K * D), np.float32)


# ---- ranges and codebooks


class Bins:
    """Sums over the normalised inliers of one layer, by bins of [-1, 1]: weight, weight * x, count, x and x * x."""

    def __init__(self):
        self.sums = np.zeros((5, BINS))

    def add(self, x: np.ndarray, weight: np.ndarray, inlier: np.ndarray) -> None:
        """Add entries of equal shape; only those of `inlier` count."""
        x, weight = x[inlier].astype(np.float64), weight[inlier].astype(np.float64)
        at = np.clip(((x + 1) * (BINS / 2)).astype(np.int64), 0, BINS - 1)
        for row, part in zip(self.sums, (weight, weight * x, None, x, x * x), strict=True):
            row += np.bincount(at, part, BINS)

    def codebook(self, bits: int, iterations: int) -> np.ndarray:
        """Centroids of the weighted k-means, ascending, float64 [2**bits].

        Begins at equal shares of the weight; the result does not depend on a seed.
        """
        weight, moment = self.sums[:2]
        total = np.cumsum(weight)
        if total[-1] <= 0:
            return np.linspace(-1, 1, 2**bits)
        centre = (np.arange(BINS) + 0.5) * (2 / BINS) - 1
        start = np.searchsorted(total, total[-1] * (np.arange(2**bits) + 0.5) / 2**bits)
        centroids = np.maximum.accumulate(centre[start] + np.arange(2**bits) * 1e-9)
        sums = np.concatenate([np.zeros((2, 1)), np.cumsum([weight, moment], 1)], 1)
        for _ in range(iterations):
            cut = np.searchsorted(centre, (centroids[1:] + centroids[:-1]) / 2, side="right")
            edges = np.concatenate([[0], cut, [BINS]])
            w, m = (np.diff(s[edges]) for s in sums)
            # an empty cell keeps its centroid
            moved = np.where(w > 0, m / np.where(w > 0, w, 1), centroids)
            if np.array_equal(moved, centroids):
                break
            centroids = moved
        return np.sort(centroids)

    def levels(self, centroids: np.ndarray) -> np.ndarray:
        """Q-Norm: the centroids moved so that rounded inliers keep mean and deviation (section 3.6 of the paper)."""
        _, _, count, x, xx = self.sums
        n = count.sum()
        if n == 0:
            return centroids
        centre = (np.arange(BINS) + 0.5) * (2 / BINS) - 1
        rounded = centroids[np.searchsorted((centroids[1:] + centroids[:-1]) / 2, centre)]
        mean, mean2 = x.sum() / n, (count * rounded).sum() / n
        deviation = np.sqrt(max(xx.sum() / n - mean**2, 0))
        deviation2 = np.sqrt(max((count * rounded**2).sum() / n - mean2**2, 0))
        factor = deviation / deviation2 if deviation2 > 0 else 1.0
        return centroids * factor + mean - mean2 * factor


def key_ranges(keys: np.ndarray, outliers: float) -> tuple[np.ndarray, np.ndarray]:
    """Middle and half width of every channel's range, float32 [C], from keys [N,C]."""
    low, high = np.quantile(keys, [outliers / 2, 1 - outliers / 2], axis=0)
    return ((high + low) / 2).astype(np.float32), np.maximum((high - low) / 2, LEAST).astype(np.float32)


@partial(jax.jit, static_argnames=("count",))
def _value_program(v, *, count: int):
    """Middle and half width [N,1] of values [N,C] as the codec stores them, and which entries are outliers."""
    outside = marked(v.shape, extremes(v, count))
    zero, scale = value_range(v, outside)
    return zero.astype(jnp.float32), jnp.maximum(scale.astype(jnp.float32), LEAST), outside


def tables(layers: Layers, pieces, settings: Settings, note=lambda text: None) -> dict[str, np.ndarray]:
    """Calibrated arrays of a model, [L, ...]: what `KVQuantTables` reads.

    Args:
      layers: of the model.
      pieces: int [P,T], texts; the first token of each takes no part.
      settings: as in `Settings`.
      note: called with a line on how far it has come.
    """
    config = layers.config
    L, shape = config.num_layers, (config.num_kv_heads, config.head_dim)
    held: list[list[np.ndarray]] = [[] for _ in range(L)]
    for p, ids in enumerate(pieces):
        note(f"keys of piece {p + 1} of {len(pieces)}")
        for i, k in enumerate(forward(layers, ids)[1]):
            held[i].append(k[1:])
    ranges = []
    for i in range(L):
        ranges.append(key_ranges(np.concatenate(held[i]), settings.outliers))
        held[i] = []
    bins = {name: [Bins() for _ in range(L)] for name in ("key", "value")}
    scaled = settings.weight == WEIGHTS[0]
    count = num_outliers(settings.outliers, config.num_kv_heads * config.head_dim)
    for p, ids in enumerate(pieces):
        note(f"gradients of piece {p + 1} of {len(pieces)}")
        for i, k, v, dk, dv in gradients(layers, ids):
            k, v, dk, dv = (x[1:] for x in (k, v, dk, dv))
            zero, scale = ranges[i]
            x = (k - zero) / scale
            bins["key"][i].add(x, dk**2 * (scale**2 if scaled else 1), np.abs(x) <= 1)
            zero, scale, outside = (np.asarray(a) for a in _value_program(v, count=count))
            bins["value"][i].add((v - zero) / scale, dv**2 * (scale**2 if scaled else 1), ~outside)
    tables = {
        "key_zero": np.stack([z.reshape(shape) for z, _ in ranges]),
        "key_scale": np.stack([s.reshape(shape) for _, s in ranges]),
    }
    for name, by_layer in bins.items():
        for bits in BITS:
            books = [b.codebook(bits, settings.iterations) for b in by_layer]
            tables[f"{name}_codebook_{bits}"] = np.stack(books).astype(np.float32)
            levels = [b.levels(c) for b, c in zip(by_layer, books, strict=True)]
            tables[f"{name}_levels_{bits}"] = np.stack(levels).astype(np.float32)
    return tables


def calibrate(model: Pretrained, text: str, settings: Settings, command: str, note=lambda text: None):
    """The calibrated arrays of a model on shipped texts, and their record.

    Args:
      text: a name of `lcx.texts`, or several with commas between: pieces are taken from each in turn, from its beginning.

    Raises:
      UserError: no such text, or fewer tokens in a text or in the model's context.
    """
    if settings.piece > model.config.context:
        raise UserError(f"piece={settings.piece}; the context of {model.name} allows at most {model.config.context}")
    names = text.split(",")
    if len(set(names)) < len(names):
        raise UserError(f"text={text!r}: give each once")
    count = settings.tokens // settings.piece
    each = [count // len(names) + (i < count % len(names)) for i in range(len(names))]
    rows = []
    for name, pieces_of in zip(names, each, strict=True):
        ids, needed = model.tokenizer.text_ids(texts.read(name)), pieces_of * settings.piece
        if needed > len(ids):
            raise UserError(f"tokens={settings.tokens} need {needed} of text {name!r}, which has {len(ids)}")
        rows.append(np.asarray(ids[:needed], np.int32).reshape(-1, settings.piece))
    pieces = np.concatenate(rows)
    arrays = tables(model.layers, pieces, settings, note)
    # k-means begins at quantiles, and no chance takes part
    return arrays, store.make_record(METHOD, model, text, vars(settings), 0, command)


# ---- the arrays of a recipe


@dataclass(frozen=True)
class KVQuantTables(AuxSource):
    """Ranges of keys and levels of one model, for `codecs.kvquant.KVQuant` of any bits.

    Args:
      file: a file that experiments/calibrate.py --method=kvquant wrote; None: the one that lcx ships for this model.
      q_norm: bits whose levels are read with Q-Norm, which keeps mean and deviation; the authors' checkpoints use it for 2 bits alone.
    """

    file: str | None = None
    q_norm: tuple[int, ...] = (2,)

    def __post_init__(self):
        for bits in self.q_norm:
            if bits not in BITS:
                raise UserError(f"KVQuantTables: q_norm={self.q_norm!r}: allowed are {', '.join(map(str, BITS))}")

    def _read(self, model: ModelConfig) -> store.Artefact:
        path = store.shipped(FOLDER, METHOD, model, AGAIN) if self.file is None else Path(self.file)
        return store.read(path, METHOD, AGAIN)

    def load(self, model: ModelConfig) -> Aux:
        artefact = self._read(model)
        store.check_model(artefact, model)
        return self._aux(_checked(artefact, model), model.num_layers)

    def check_weights(self, model: ModelConfig, sha256: str, tensors: Callable[[], str] | None = None) -> None:
        store.check_model(self._read(model), model, sha256)

    def stand_in(self, model: ModelConfig) -> tuple[Aux, str]:
        """Ranges of one, and levels at equal distances, for the memory of models that have none."""
        if self.file is not None:
            # a file that was named must be right
            return self.load(model), ""
        shape = (model.num_layers, model.num_kv_heads, model.head_dim)
        arrays = {"key_zero": np.zeros(shape, np.float32), "key_scale": np.ones(shape, np.float32)}
        for name in (f"{x}_{kind}" for x in ("key", "value") for kind in ("codebook", "levels")):
            for bits in BITS:
                even = np.linspace(-1, 1, 2**bits, dtype=np.float32)
                arrays[f"{name}_{bits}"] = np.broadcast_to(even, (model.num_layers, 2**bits))
        return self._aux(arrays, model.num_layers), "KVQuant not calibrated: ranges of one and even levels stand in"

    def _aux(self, arrays, num_layers: int) -> Aux:
        layers = []
        for i in range(num_layers):
            layer = {name: arrays[name][i] for name in ("key_zero", "key_scale")}
            for name in ("key", "value"):
                table = np.zeros((len(BITS), 2, 2 ** max(BITS)), np.float32)
                for row, bits in zip(table, BITS, strict=True):
                    row[0, : 2**bits] = arrays[f"{name}_codebook_{bits}"][i]
                    read = "levels" if bits in self.q_norm else "codebook"
                    row[1, : 2**bits] = arrays[f"{name}_{read}_{bits}"][i]
                layer[f"{name}_levels"] = table
            layers.append({"arrays": layer})
        return layers


def _checked(artefact: store.Artefact, model: ModelConfig) -> dict[str, np.ndarray]:
    """The arrays of a file in the shapes of the model; raise UserError for others."""
    L, channels = model.num_layers, (model.num_kv_heads, model.head_dim)
    want = {"key_zero": (L, *channels), "key_scale": (L, *channels)}
    for name in ("key", "value"):
        for bits in BITS:
            want |= {f"{name}_{kind}_{bits}": (L, 2**bits) for kind in ("codebook", "levels")}
    arrays = artefact.arrays
    where = f"{METHOD}: file={artefact.file!r}"
    if arrays.keys() != want.keys():
        odd = sorted(arrays.keys() ^ want.keys())[0]
        raise UserError(f"{where}: array {odd[:40]!r} is missing or unknown; make it again: {AGAIN}")
    for name, shape in want.items():
        x = arrays[name]
        if x.shape != shape or x.dtype != np.float32:
            raise UserError(f"{where}: array {name!r} is {x.dtype} {x.shape}; allowed is float32 {shape}")
        if ("codebook" in name and (np.diff(x) < 0).any()) or (name == "key_scale" and (x <= 0).any()):
            raise UserError(f"{where}: array {name!r} must be {'positive' if name == 'key_scale' else 'ascending'}")
    return dict(arrays)
