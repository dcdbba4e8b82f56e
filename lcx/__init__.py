"""A JAX laboratory for long-context attention.

    import lcx
    model = lcx.load("smollm2-135m")
    session = lcx.Session(model.layers, lcx.Recipe(), prompt=1_024)

Names are imported where they are first used, so that `lcx.pretrained` on its own stays free of JAX.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "load": "lcx.models.loading",
    "Pretrained": "lcx.models.loading",
    "load_config": "lcx.config_files",
    "Experiment": "lcx.experiment",
    "Sweep": "lcx.experiment",
    "Variant": "lcx.experiment",
    "Recipe": "lcx.recipe",
    "Segment": "lcx.segments",
    "Session": "lcx.session",
    "ask": "lcx.questions",
    "generate": "lcx.greedy",
    "score_text": "lcx.measure.quality",
    "score_continuation": "lcx.measure.quality",
    "run_methods": "lcx.sweep.runner",
    "check": "lcx.conformance.run",
    "look": "lcx.measure.kept",
    "compose": "lcx.composition",
    "UserError": "lcx.errors",
}
__all__ = [
    "Experiment",
    "Pretrained",
    "Recipe",
    "Segment",
    "Session",
    "Sweep",
    "UserError",
    "Variant",
    "__version__",
    "ask",
    "check",
    "compose",
    "generate",
    "load",
    "load_config",
    "look",
    "run_methods",
    "score_continuation",
    "score_text",
]

if TYPE_CHECKING:
    from lcx.composition import compose
    from lcx.config_files import load_config
    from lcx.conformance.run import check
    from lcx.errors import UserError
    from lcx.experiment import Experiment, Sweep, Variant
    from lcx.greedy import generate
    from lcx.measure.kept import look
    from lcx.measure.quality import score_continuation, score_text
    from lcx.models.loading import Pretrained, load
    from lcx.questions import ask
    from lcx.recipe import Recipe
    from lcx.segments import Segment
    from lcx.session import Session
    from lcx.sweep.runner import run_methods


def __dir__() -> list[str]:
    # what a notebook completes after `lcx.`: the public names, though submodules that were imported are attributes too
    return list(__all__)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'lcx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
