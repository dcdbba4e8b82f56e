"""Memory of this process and of a recipe's cache."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from lcx.axes import Aux
from lcx.ctx import Ctx
from lcx.model_config import ModelConfig
from lcx.recipe import Recipe
from lcx.segments import Chain, num_rows
from lcx.storage import Shape

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def reset_peak_rss() -> bool:
    """Make the peak of resident memory count from now on.  False where the system does not allow it: then it is the process's."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")
        return True
    return False


def peak_rss_bytes() -> int | None:
    """Return the peak of resident memory (VmHWM) since the last reset; None where the system does not report it."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def machine_bytes() -> int | None:
    """Return the memory of this machine, or of the process's control group where that is less; None where the system reports neither."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):
        # the file says "max" where there is no limit
        limits.append(int(_CGROUP.read_text()))
    return min(limits, default=None)


def bits_per_value(
    recipe: Recipe, model: ModelConfig, prompt: int, new_tokens: int, *, aux: Aux | None = None, dtype
) -> float:
    """Return the bits of the decode cache per key and value channel that it holds once all new tokens are there.

    Scales, positions, state and the slots that stay empty are among the bits; the values are those of the tokens that are held.
    """
    values, shape = 0, Shape(model, prompt, new_tokens)
    # slots that are there for the rounding alone never hold a token
    exact = replace(recipe, rounding=1)
    for layer in range(model.num_layers):
        sizes = exact.capacities("decode", layer, shape)
        for chain in exact.at("decode", layer, model).chains:
            rows = num_rows(model, chain[0].heads, aux, layer)
            # the segments of a chain are never all full: each token is in one of them
            tokens = _kept(chain, prompt) + new_tokens
            values += 2 * model.head_dim * rows * min(tokens, sum(sizes[s.name] for s in chain))
    return 8 * recipe.bytes(model, prompt, new_tokens, aux=aux, dtype=dtype) / values


def _kept(chain: Chain, prompt: int) -> int:
    """Return the tokens per KV head that a chain holds at the end of a prompt of `prompt` tokens, if its policies let all stay."""
    compress = chain[0].compress
    if compress is None:
        return prompt
    # a budget may depend on the length; `keep` reads the settings and nothing else of a step
    ctx = Ctx(q=None, pos=None, scale=1.0, rotate=None, data=compress.data())  # pyrefly: ignore
    return min(int(compress.keep(ctx, np.int32(prompt))), prompt)  # pyrefly: ignore
