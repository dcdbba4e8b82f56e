"""DuoAttention: retrieval heads keep all of the context, streaming heads keep sinks and a window."""

from __future__ import annotations

from lcx.axes import Codec, Exact
from lcx.policies.sink_window import SinkWindow
from lcx.segments import Segment


def duo(sink: int = 64, window: int = 256, codec: Codec | None = None) -> tuple[Segment, Segment]:
    """Return the two segments of DuoAttention, arXiv:2410.10819, section 3.3; `HeadSplit` says which heads they hold.

    Each step attends first and forgets afterwards, as the authors' prefill does: one token at a time the window is exact, in
    chunks it is up to a chunk longer, and a prompt in one step is read densely.  Exact when no head streams, and while
    sink + window covers the context.

    Args:
      sink, window: tokens that a streaming head keeps; the authors' sizes for long-context tasks.
      codec: of both segments; None: exact.
    """
    codec = Exact() if codec is None else codec
    return (
        Segment("retrieval", heads="retrieval", codec=codec),
        Segment("streaming", heads="streaming", policy=SinkWindow(sink, window), codec=codec),
    )
