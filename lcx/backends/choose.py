"""Which code computes attention over the keys of a source: XLA everywhere, the kernels of `pallas_kernels` on Hopper where they can.

None      the first of pallas, xla that can honour the call, source by source; xla alone where the device is not Hopper
"xla"     `lcx.ops.attention.attend`
"pallas"  the kernels, or an error that says why not
"cudnn"   cuDNN through jax.nn for this step's own tokens, XLA for what is held; or an error that says why not
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lcx.errors import UserError
from lcx.ops import block_scores as scores
from lcx.ops.attention import EMPTY, Near, Partial, Source, merge, used_length
from lcx.ops.attention import attend as xla_attend

IMPLEMENTATIONS = ("xla", "pallas", "cudnn")
PREFER_PALLAS = "pallas, else xla"
HOPPER = (9, 0)
DECODE_ROWS = 128  # query rows of a KV head that fill one tile of a kernel
BLOCKS = 132  # multiprocessors; a block of the kernel takes most of the shared memory of one
MOST_LISTED = 2**26  # tiles of a list for one head; beyond, the list takes more memory than what it saves


def resolve(implementation: str | None, capability: tuple[int, int] | None = None) -> str:
    """What a session runs, static in its programs.

    Args:
      implementation: None, "xla", "pallas" or "cudnn".
      capability: compute capability of the GPU that is compiled for; None: of this process's device.

    Raises:
      UserError: there is no such implementation, or the device cannot run it.
    """
    if implementation == PREFER_PALLAS:
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
    return PREFER_PALLAS if (capability or _capability()) == HOPPER else "xla"


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
    allow: Callable | None = None,
    reach: Callable | None = None,
    near: Near | None = None,
    softcap: float | None = None,
    implementation: str = "xla",
) -> Partial:
    """`lcx.ops.attention.attend` by an implementation.

    Args:
      q, sources, q_pos, scale, allow, reach, softcap: as there.
      near: `allow` as a window with sinks, where it is one.
      implementation: what `resolve` returned.

    Returns:
      Partial: as there.  More than 128 query rows of a KV head go through the kernel with results in the type of q, one rounding more.

    Raises:
      UserError: the one that was named cannot honour the call; says why.
    """
    asked: dict[str, Any] = {"scale": scale, "softcap": softcap}
    served: list[Partial] = []
    left = []
    sources = [s for s in sources if s.pos.shape[-1]]
    for source in sources if q.shape[3] else ():
        if implementation == "xla":
            left.append(source)
            continue
        why = (_no_cudnn if implementation == "cudnn" else _no_pallas)(q, source, allow, near, softcap)
        if why is None:
            serve = _cudnn if implementation == "cudnn" else _pallas
            served.append(serve(q, source, q_pos, near=near, **asked))
        elif implementation == PREFER_PALLAS or (implementation == "cudnn" and source.held):
            left.append(source)
        else:
            raise UserError(f"implementation={implementation!r}: {why}")
    if left or not served:
        served.append(xla_attend(q, left, q_pos, allow=allow, reach=reach, **asked))
    merged = merge(served)
    return merged._replace(out=merged.out.astype(jnp.float32))


def check_visits(implementation: str, visits: str) -> None:
    """Page lists, `Pattern.visits`, are attended by XLA.

    Raises:
      UserError: the implementation that was named would not do what is asked: "pallas" nothing of it, "cudnn" the step's own tokens.
    """
    if implementation == "pallas" or (implementation == "cudnn" and visits == "own"):
        raise UserError(
            f"implementation={implementation!r}: the pattern lists pages of {visits} keys, which XLA alone attends; leave it out"
        )


def score_minmax(q, low, high, *, implementation: str = "xla") -> jax.Array:
    """`lcx.ops.block_scores.score_minmax` by an implementation, with cuDNN by XLA.

    Raises:
      UserError: "pallas" was named and the kernel does not serve the types or the head_dim.
    """
    if not _scored_by_kernel(q, low, implementation):
        return scores.score_minmax(q, low, high)
    from pallas_kernels.score_blocks import score_minmax as kernel

    return kernel(q, low, high)


def score_probe(q, k, *, implementation: str = "xla", **asked) -> tuple[jax.Array, jax.Array]:
    """`lcx.ops.block_scores.score_probe` by an implementation, as `score_minmax`."""
    if not _scored_by_kernel(q, k, implementation):
        return scores.score_probe(q, k, **asked)
    from pallas_kernels.score_probe import score_probe as kernel

    return kernel(q, k, **asked)


def _scored_by_kernel(q, k, implementation: str) -> bool:
    served = q.dtype in (jnp.bfloat16, jnp.float16) and k.dtype == q.dtype and q.shape[-1] <= 256
    if implementation == "pallas" and not served:
        raise UserError(
            f"implementation='pallas': scores of {q.dtype} by {k.dtype}, head_dim={q.shape[-1]}; the kernels take bfloat16 or float16,"
            " at most 256"
        )
    return implementation in ("pallas", PREFER_PALLAS) and served


# pallas


def _no_pallas(q, source: Source, allow, near: Near | None, softcap) -> str | None:
    """Why the kernels cannot serve a source, or None."""
    from pallas_kernels.lists import ROWS, SIZE

    T, D = q.shape[3:]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries of {q.dtype}; the kernels take bfloat16 and float16"
    if D > 256:
        return f"head_dim={D}; the kernels take at most 256"
    if source.pages is not None and allow is None and T * q.shape[2] <= DECODE_ROWS:
        return None
    if not source.plain:
        return (
            "slots that are not keys and values in the model's own type are decoded by XLA, but for decode over pages"
        )
    if allow is not None and near is None:
        return "the mask is not a window with sinks, the only one that the kernels know"
    if -(-T // ROWS) * -(-source.pos.shape[-1] // SIZE) > MOST_LISTED:
        return f"{T:,} queries x {source.pos.shape[-1]:,} keys have more than {MOST_LISTED:,} tiles; read the prompt in chunks"
    return None


def _pallas(q, source: Source, q_pos, *, near: Near | None, scale, softcap) -> Partial:
    """The kernel over pages, or over the tiles that positions and window leave."""
    if source.pages is not None:
        return _paged(q, source, q_pos, scale=scale, softcap=softcap)
    from pallas_kernels.attend import attend as kernel
    from pallas_kernels.lists import from_mask
    from pallas_kernels.mask import Mask

    S = source.pos.shape[-1]
    k, v = (x.astype(q.dtype) for x in source.tile(0, S))
    window, sink = (None, 0) if near is None else near
    mask = Mask(causal=True, window=window, sink=sink if window is not None else 0, positions=True)
    shared: dict[str, Any] = {"scale": scale, "softcap": softcap, "mask": mask, "kv_pos": source.pos}
    T, G = q.shape[3], q.shape[2]
    if T * G <= DECODE_ROWS:
        return _split(q, k, v, q_pos, shared)
    blocks = from_mask(mask, T, S, q_pos=q_pos, kv_pos=source.pos)
    # several such parts live until they are merged: 2,048 queries of 32 heads take 32 MiB each in float32
    return kernel(q, k, v, blocks=blocks, q_pos=q_pos, out_dtype=q.dtype, **shared)


def _paged(q, source: Source, q_pos, *, scale, softcap) -> Partial:
    """The decode kernel; what is held in pages comes before the queries, so that each of them sees all of it."""
    from pallas_kernels.decode import decode

    B, K, G, T, D = q.shape
    n = source.pages.k.shape[0] // (B * K)
    table = jnp.arange(B * K * n, dtype=jnp.int32).reshape(B, K, n)
    length = used_length(source.pos, axis=-1)
    length = length[:, 0] if length.shape[1] == 1 else length
    out, lse = decode(q.reshape(B, K, G * T, 1, D), source.pages, table, length, scale=scale, softcap=softcap)
    real = (q_pos != EMPTY)[:, None, None]
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:-1])
    return Partial(jnp.where(real[..., None], out, 0.0), jnp.where(real, lse, -jnp.inf))


def _split(q, k, v, q_pos, shared) -> Partial:
    """Few queries: the group's rows share a tile, and the tiles of keys are dealt to several blocks whose parts are merged.

    Each part stands for a query head of the kernel's, [B,K,parts,rows,D], with its share of the list: rows of a tile that are not meant
    are neither read nor written.
    """
    from pallas_kernels.attend import attend as kernel
    from pallas_kernels.lists import SIZE, BlockList, from_mask

    B, K, G, T, D = q.shape
    S = k.shape[-1]
    most = -(-S // SIZE)
    parts = min(most, max(1, BLOCKS // (B * K)))
    rows = G * T
    folded = jnp.broadcast_to(q.reshape(B, K, 1, rows, D), (B, K, parts, rows, D))
    pos = jnp.tile(q_pos, (1, G))
    listed = from_mask(shared["mask"], rows, S, q_pos=pos, kv_pos=shared["kv_pos"])
    # the share follows what is held, so that a cache that is nearly empty still fills the device
    width = math.ceil(most / parts)
    share = -(-listed.count // parts)  # [b,r,1]
    first = share[..., None] * jnp.arange(parts)[:, None] + jnp.arange(width)[None]  # [b,r,parts,width]
    pick = jnp.minimum(first, most - 1)

    def of_parts(x):
        """[b,r,1,most] -> [b,K * parts,1,width]"""
        x = jnp.take_along_axis(jnp.broadcast_to(x, (*x.shape[:2], parts, most)), pick, -1)
        return jnp.broadcast_to(x, (x.shape[0], K, parts, width)).reshape(x.shape[0], K * parts, 1, width)

    count = jnp.clip(listed.count - share * jnp.arange(parts), 0, share)  # [b,r,parts]
    count = jnp.broadcast_to(count, (count.shape[0], K, parts)).reshape(count.shape[0], K * parts, 1)
    blocks = BlockList(of_parts(listed.index), count, of_parts(listed.flags))
    part = kernel(folded, k, v, blocks=blocks, q_pos=pos, **shared)
    out, lse = part.out.reshape(B, K, parts, G, T, D), part.lse.reshape(B, K, parts, G, T)
    top = lse.max(2, keepdims=True)
    weight = jnp.exp(lse - jnp.where(jnp.isneginf(top), 0.0, top))
    total = weight.sum(2)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    merged = jnp.einsum("bkpgtd,bkpgt->bkgtd", out, weight) / safe[..., None]
    return Partial(merged, jnp.where(some, top[:, :, 0] + jnp.log(safe), -jnp.inf))


# cuDNN


def _no_cudnn(q, source: Source, allow, near, softcap) -> str | None:
    """Why cuDNN cannot serve a source, or None."""
    T, D = q.shape[3:]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries of {q.dtype}; cuDNN takes bfloat16 and float16"
    if source.held or source.pos.shape[-1] != T:
        return "cuDNN serves this step's own tokens alone"
    if allow is not None or softcap is not None:
        return "cuDNN serves plain causal attention: no window, no softcap"
    if D % 8 or D > 256:
        return f"head_dim={D}; cuDNN takes multiples of 8 up to 256"
    return None


def _cudnn(q, source: Source, q_pos, *, near, scale, softcap) -> Partial:
    """This step's own tokens, padded on the right; row t reads the real ones up to itself."""
    B, K, G, T, D = q.shape
    k, v = source.tile(0, T)
    real = jnp.sum(q_pos != EMPTY, -1, dtype=jnp.int32)
    out, lse = jax.nn.dot_product_attention(
        q.reshape(B, K * G, T, D).swapaxes(1, 2),
        jnp.moveaxis(k.astype(q.dtype), 3, 1),
        v.astype(q.dtype).swapaxes(1, 2),
        scale=scale,
        is_causal=True,
        query_seq_lengths=real,
        key_value_seq_lengths=real,
        implementation="cudnn",
        return_residual=True,
    )
    some = (q_pos != EMPTY)[:, None, None]
    out = out.swapaxes(1, 2).reshape(B, K, G, T, D).astype(jnp.float32)
    lse = lse.swapaxes(1, 2).reshape(B, K, G, T).astype(jnp.float32)
    return Partial(jnp.where(some[..., None], out, 0.0), jnp.where(some, lse, -jnp.inf))
