"""A-shape: sinks and a window as a mask; nothing is forgotten."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lcx.axes import Pattern
from lcx.ops.masks import Near
from lcx.policies.base import check_tokens


@dataclass(frozen=True)
class AShape(Pattern):
    """Mask under which every query reads the first `sink` tokens and the `window` most recent ones, itself included.

    MInference, arXiv:2407.02490, section 3.1: the A-shape head, 1,024 sinks and a window of 4,096; StreamingLLM's mask at the text's
    positions.  Exact when sink + window covers the context.  No memory is saved: `policies.SinkWindow` forgets.

    Args:
      sink: first tokens, >= 0.
      window: most recent tokens, >= 1.
    """

    sink: int = 1_024
    window: int = 4_096

    exact = "While sink + window covers the context."
    small = {"sink": 2, "window": 7}

    def __post_init__(self):
        check_tokens("AShape", "sink", self.sink, 0)
        check_tokens("AShape", "window", self.window, 1)

    def mask(self, ctx):
        return Near(self.window, self.sink)

    def with_budget(self, budget):
        check_tokens("AShape", "budget", budget, self.sink + 1)
        return replace(self, window=budget - self.sink)
