"""Synthetic long-context tasks, made offline for any tokenizer; nothing here imports JAX or needs a model.

    from lcx import tasks
    samples = tasks.generate("niah_single_2", tokenizer.text_ids, budget=1_024, num_samples=5)
    tasks.score(samples[0], output)

RULER's 13 tasks, the needle grid, passkey and key-value retrieval, and the arithmetic of windowed perplexity and LongPPL.
`lcx.measure.task_scores` runs them on a model.
"""

from lcx.tasks.grid import kv_retrieval, needle_depths, needle_grid, needle_lengths, passkey
from lcx.tasks.local import Record, load, local_samples
from lcx.tasks.perplexity import (
    Window,
    longppl,
    longppl_keys,
    longppl_windows,
    sliding_windows,
)
from lcx.tasks.ruler import RULER, TaskSpec, generate
from lcx.tasks.sample import (
    EFFECTIVE_THRESHOLD,
    Sample,
    effective_length,
    score,
    weighted_means,
)

__all__ = [
    "EFFECTIVE_THRESHOLD",
    "RULER",
    "Record",
    "Sample",
    "TaskSpec",
    "Window",
    "effective_length",
    "generate",
    "kv_retrieval",
    "load",
    "local_samples",
    "longppl",
    "longppl_keys",
    "longppl_windows",
    "needle_depths",
    "needle_grid",
    "needle_lengths",
    "passkey",
    "score",
    "sliding_windows",
    "weighted_means",
]
