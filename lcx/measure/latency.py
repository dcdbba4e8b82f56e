"""Times on a monotonic clock, of finished work: device results are waited for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np


def device_name() -> str:
    """Return the name of the device that times were measured on: its kind, with the number of cores for a CPU."""
    kind = jax.devices()[0].device_kind
    return f"{kind}, {os.cpu_count()} cores" if jax.default_backend() == "cpu" else kind


def timed(call: Callable):
    """Return (result, seconds) of one call."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, 10th and 90th percentile in seconds, and the number of samples."""
    low, median, high = np.percentile(seconds, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high), "n": len(seconds)}
