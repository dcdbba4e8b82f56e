"""Sources of a method's arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lcx.axes import Aux
from lcx.model_config import ModelConfig


class AuxSource(Protocol):
    """Source of a method's arrays; frozen, so that a config can hold it."""

    def load(self, model: ModelConfig) -> Aux:
        """Return one dict a layer, see `lcx.axes.Aux`.  Raises UserError when there is none for this model."""
        ...

    def stand_in(self, model: ModelConfig) -> tuple[Aux, str]:
        """Return arrays of the right shapes for a model that has none, with a note about it: a plan of memory needs them."""
        ...

    def check_weights(self, model: ModelConfig, sha256: str, tensors: Callable[[], str] | None = None) -> None:
        """Raise UserError where the arrays belong to other weights than these.  The base knows of none.

        Args:
          model: its sizes.
          sha256: of the file or folder that the weights were read from.
          tensors: returns the sha256 of their values (`lcx.models.loading.tensors_sha256`), by which the same weights are known in
            another file; None where it is not at hand.
        """
        return None
