"""Retrieval heads of a model: scores of its KV heads, and the split that follows from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcx.artefacts.source import AuxSource
from lcx.axes import Aux
from lcx.errors import UserError
from lcx.model_config import ModelConfig

FOLDER = Path(__file__).parent / "head_splits"
AGAIN = "make one: python -m experiments.calibrate --model=MODEL --out=FILE, then HeadSplit(file=FILE)"
SIZES = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "d_model", "d_ff", "vocab_size")


def split_by_score(scores, streaming: float) -> Aux:
    """Divide the KV heads of every layer by a ranking over the whole model: layers may differ, and may lack one kind.

    Args:
      scores: [L,K], the higher, the rather a retrieval head.  Of equal ones the first in order streams first.
      streaming: fraction of the L * K heads that stream, 0 to 1: those below its quantile, linearly interpolated between neighbours, as in
        the authors' code.  All stream at 1, none at 0.
    """
    scores = np.asarray(scores)
    rank = np.empty(scores.size)
    rank[np.argsort(scores, axis=None, kind="stable")] = np.arange(scores.size)
    # the quantile at 1 is the largest score, which is not below itself
    streams = rank < (scores.size if streaming >= 1 else np.quantile(rank, streaming))
    find = lambda kind: np.flatnonzero(kind).astype(np.int32)
    return [{"heads": {"retrieval": find(~row), "streaming": find(row)}} for row in streams.reshape(scores.shape)]


@dataclass(frozen=True)
class HeadSplit(AuxSource):
    """Retrieval heads by scores that were measured once per model.

    The splits that lcx ships are found by the model's sizes, and `check_weights` compares the sha256 of the tensors: the same weights get
    the same split from a GGUF file and from a folder.  They rank by the attention that the second copy of a repeated passage gives to
    far tokens (`lcx.artefacts.head_mass`), which stands in for the paper's trained gates; mass on plain text finds heads that copy no
    better than random ones.

    Args:
      streaming: fraction of all KV heads of the model that stream, 0 to 1; the paper has 0.5 with GQA, 0.75 without.
      file: a JSON file that experiments/calibrate.py wrote, for whatever model has its sizes; None: the one that lcx ships for this model.
    """

    streaming: float = 0.5
    file: str | None = None

    def __post_init__(self):
        if isinstance(self.streaming, bool) or not 0 <= self.streaming <= 1:
            raise UserError(f"HeadSplit: streaming={self.streaming!r} must be a fraction from 0 to 1")

    def load(self, model: ModelConfig) -> Aux:
        path = _shipped(model) if self.file is None else Path(self.file)
        return split_by_score(_scores(path, _read(path), model), self.streaming)

    def check_weights(self, model: ModelConfig, sha256: str, tensors: Callable[[], str] | None = None) -> None:
        if self.file is not None:
            # who names a file may give the split of a model to what was tuned from it
            return
        record = _read(_shipped(model))
        if sha256 == record.get("model_sha256"):
            return
        known = record.get("tensors_sha256")
        if tensors is None or not isinstance(known, dict) or tensors() not in known.values():
            raise UserError(
                f"HeadSplit: the split for the sizes of model {model.name!r} is of other weights, {record.get('model')!r}; {AGAIN}"
            )

    def stand_in(self, model: ModelConfig) -> tuple[Aux, str]:
        """Return a split of the right sizes, for the memory of models that have none: the streaming heads spread evenly over the layers."""
        if self.file is not None:
            # a file that was named must be right
            return self.load(model), ""
        aux = split_by_score([list(range(model.num_kv_heads))] * model.num_layers, self.streaming)
        return aux, f"head split not measured: {self.streaming:.0%} streaming heads spread evenly over the layers"


def _shipped(model: ModelConfig) -> Path:
    """Return the shipped file for a model of these sizes; of several that of the model's own name."""
    records = {path: _read(path) for path in sorted(FOLDER.glob("*.json"))}
    fit = [path for path, record in records.items() if record.get("sizes") == sizes_of(model)]
    named = [path for path in fit if records[path].get("config_name") == model.name]
    if not fit:
        names = ", ".join(repr(record.get("config_name")) for record in records.values())
        raise UserError(f"HeadSplit: model={model.name!r} has no head split; there are those of {names}; {AGAIN}")
    return (named or fit)[0]


def sizes_of(model: ModelConfig, names: Iterable[str] = SIZES) -> dict[str, int]:
    """Return the sizes that a split is for."""
    return {name: getattr(model, name) for name in names}


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"HeadSplit: file={str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"HeadSplit: file={str(path)!r} is not a JSON mapping as experiments/calibrate.py writes it")
    return record


def _scores(path: Path, record: dict[str, Any], model: ModelConfig) -> np.ndarray:
    """Return the scores, float64 [L,K], checked against the model's sizes."""
    sizes = record.get("sizes")
    # files that were written before all of SIZES were recorded have the first four
    wanted = sizes_of(model, SIZES if isinstance(sizes, dict) and set(SIZES) <= sizes.keys() else SIZES[:4])
    if sizes != wanted:
        raise UserError(f"HeadSplit: file={str(path)!r} is for sizes {sizes}; model {model.name!r} has {wanted}")
    try:
        scores = np.asarray(record.get("scores"), np.float64)
    except (TypeError, ValueError):
        scores = np.zeros(0)
    shape = (model.num_layers, model.num_kv_heads)
    if scores.shape != shape or not np.isfinite(scores).all():
        raise UserError(f"HeadSplit: scores in file={str(path)!r} must be {shape[0]} x {shape[1]} finite numbers")
    return scores
