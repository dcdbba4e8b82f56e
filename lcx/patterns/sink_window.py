"""A-shape: sinks and a window as a mask; nothing is forgotten."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lcx.errors import UserError
from lcx.ops.attention import Near
from lcx.recipe import Pattern


@dataclass(frozen=True)
class AShape(Pattern):
    """Every query reads the first `sink` tokens and the `window` most recent ones, itself included.

    MInference, arXiv:2407.02490, section 3.1: the A-shape head, 1,024 sinks and a window of 4,096; StreamingLLM's mask at the text's
    positions.  Exact when sink + window covers the context.  No memory is saved: `policies.SinkWindow` forgets.

    Args:
      sink: first tokens, >= 0.
      window: most recent tokens, >= 1.
    """

    sink: int = 1_024
    window: int = 4_096

    def __post_init__(self):
        _check("sink", self.sink, 0)
        _check("window", self.window, 1)

    def allow(self, ctx, q_pos, kv_pos):
        return (kv_pos < self.sink) | (q_pos - kv_pos < self.window)

    def reach(self, ctx, bounds):
        some = (bounds.kv_lo < self.sink) | (bounds.q_lo - bounds.kv_hi < self.window)
        return some, (bounds.kv_hi < self.sink) | (bounds.q_hi - bounds.kv_lo < self.window)

    def near(self, ctx):
        return Near(self.window, self.sink)

    def with_budget(self, budget):
        _check("budget", budget, self.sink + 1)
        return replace(self, window=budget - self.sink)


def _check(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"AShape: {name}={value!r} must be an integer of at least {least} tokens")
