"""Choice of the code that computes attention over a source: XLA everywhere, the kernels of `pallas_kernels` on Hopper where they can.

None      "auto" on Hopper, "xla" elsewhere
"auto"    the kernels for each source and page list that they can honour, XLA for the others
"xla"     `lcx.ops`
"pallas"  the kernels, or an error that says why not
"cudnn"   cuDNN through jax.nn for this step's own tokens, XLA for what is held; or an error that says why not
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lcx.backends import cudnn, pallas
from lcx.errors import UserError
from lcx.ops import attention as ops
from lcx.ops import block_scores, visits
from lcx.ops.attention import Partial, Source, merge
from lcx.ops.masks import Mask
from lcx.ops.visits import Visit

IMPLEMENTATIONS = ("xla", "pallas", "cudnn")
AUTO = "auto"
HOPPER = (9, 0)


def resolve(implementation: str | None, capability: tuple[int, int] | None = None) -> str:
    """Return the implementation that a session runs, static in its programs.

    Args:
      implementation: None, "auto", "xla", "pallas" or "cudnn".
      capability: compute capability of the GPU that is compiled for; None: of this process's device.

    Raises:
      UserError: there is no such implementation, or the device cannot run it.
    """
    if implementation == AUTO:
        return implementation
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise UserError(f"implementation={implementation!r}: allowed are {', '.join(IMPLEMENTATIONS)}, or None")
        capability = capability or _capability()
        if implementation == "pallas" and capability != HOPPER:
            raise UserError(
                f"implementation='pallas': the kernels are for Hopper (H100, H200), not {_named(capability)}"
            )
        if implementation == "cudnn" and capability is None:
            raise UserError(f"implementation='cudnn': it needs an NVIDIA GPU, not {_named(capability)}")
        return implementation
    return AUTO if (capability or _capability()) == HOPPER else "xla"


def _named(capability: tuple[int, int] | None) -> str:
    return (
        f"this {jax.default_backend()}" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
    )


def _capability() -> tuple[int, int] | None:
    if jax.default_backend() != "gpu":
        return None
    major, _, minor = str(getattr(jax.devices()[0], "compute_capability", "0.0")).partition(".")
    return int(major), int(minor or 0)


def attend(
    q: jax.Array,
    sources: Sequence[Source],
    q_pos: jax.Array,
    *,
    scale: float,
    mask: Mask | None = None,
    implementation: str = "xla",
) -> Partial:
    """Compute `ops.attention.attend` by an implementation.

    Args:
      q, sources, q_pos, scale, mask: as there.
      implementation: result of `resolve`.

    Returns:
      Partial: as there.  More than 128 query rows of a KV head go through the kernel with results in the type of q, one rounding more.

    Raises:
      UserError: the one that was named cannot honour the call; says why.
    """
    backend = {"cudnn": cudnn, "pallas": pallas, AUTO: pallas}.get(implementation)
    served: list[Partial] = []
    left = []
    sources = [s for s in sources if s.pos.shape[-1]]
    for source in sources if q.shape[3] else ():
        if backend is None:
            left.append(source)
            continue
        why = backend.why_not(q, source, mask)
        if why is None:
            served.append(backend.attend(q, source, q_pos, mask=mask, scale=scale))
        elif implementation == AUTO or (backend is cudnn and source.held):
            left.append(source)
        else:
            raise UserError(f"implementation={implementation!r}: {why}")
    if left or not served:
        served.append(ops.attend(q, left, q_pos, mask=mask, scale=scale))
    merged = merge(served)
    return merged._replace(out=merged.out.astype(jnp.float32))


def attend_visits(
    q: jax.Array,
    source: Source,
    q_pos: jax.Array,
    visit: Visit,
    *,
    scale: float,
    mask: Mask | None = None,
    implementation: str = "xla",
) -> tuple[Partial, jax.Array]:
    """Compute `ops.visits.attend_visits` by an implementation, as `attend`.

    Raises:
      UserError: "pallas" was named and cannot honour the list, or "cudnn" was named for the step's own tokens.
    """
    if implementation in ("pallas", AUTO):
        why = pallas.why_no_visit(q, source, visit, mask)
        if why is None:
            return pallas.attend_visits(q, source, q_pos, visit, mask=mask, scale=scale)
        if implementation == "pallas":
            raise UserError(f"implementation='pallas': {why}")
    if implementation == "cudnn" and not source.held:
        raise UserError("implementation='cudnn' cannot attend this step's own tokens by page list; use 'auto' or 'xla'")
    return visits.attend_visits(q, source, q_pos, visit, scale=scale, mask=mask)


def score_minmax(q, low, high, *, implementation: str = "xla") -> jax.Array:
    """Compute `ops.block_scores.score_minmax` by an implementation; XLA stands in for cuDNN.

    Raises:
      UserError: "pallas" was named and the kernel does not serve the types or the head_dim.
    """
    if not _scored_by_kernel(q, low, implementation):
        return block_scores.score_minmax(q, low, high)
    from pallas_kernels.score_blocks import score_minmax as kernel

    return kernel(q, low, high)


def score_probe(q, k, *, implementation: str = "xla", **asked) -> tuple[jax.Array, jax.Array]:
    """Compute `ops.block_scores.score_probe` by an implementation, as `score_minmax`."""
    if not _scored_by_kernel(q, k, implementation):
        return block_scores.score_probe(q, k, **asked)
    from pallas_kernels.score_probe import score_probe as kernel

    return kernel(q, k, **asked)


def _scored_by_kernel(q, k, implementation: str) -> bool:
    served = q.dtype in (jnp.bfloat16, jnp.float16) and k.dtype == q.dtype and q.shape[-1] <= 256
    if implementation == "pallas" and not served:
        raise UserError(
            f"implementation='pallas': scores of {q.dtype} by {k.dtype}, head_dim={q.shape[-1]}; the kernels take bfloat16 or float16,"
            " at most 256"
        )
    return implementation in ("pallas", AUTO) and served
