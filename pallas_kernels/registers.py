"""Shared parts of the attention kernels: constants, register arrays in the layout of wgmma, and the writing of rows."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

HALF = 64  # rows of a consumer warpgroup: M of one wgmma; two of them make the 128 of a tile
PRODUCER = 2  # index of the producer's warpgroup
HIDDEN = -1e30  # logit of a pair that is not visible, in powers of two
LOG2E = math.log2(math.e)
LINE = 128  # bytes of a row that are written at a time


def swizzled(columns: int):
    """Return the transforms of shared memory for 16-bit operands of this number of columns."""
    inner = min(columns, 64)
    return plgpu.TilingTransform((8, inner)), plgpu.SwizzleTransform(2 * inner)


SWIZZLED = swizzled(64)


def empty(rows: int, columns: int | None = None):
    """Return float32 zeros in registers: [rows, columns], or one a row."""
    if columns is None:
        return plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), plgpu.Layout.WGMMA)


def line_buffer(dtype):
    """Return the shared memory that `write_rows` goes through, for both consumers."""
    columns = LINE // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(LINE))
    return plgpu.SMEM((2, HALF, columns), dtype, transforms=transforms)


def write_rows(acc, buffer, out_ref):
    """Write acc [HALF, D] to out_ref [HALF, D] of the type of `buffer` [HALF, columns], that number of columns at a time."""
    columns = buffer.shape[1]
    for c in range(0, acc.shape[1], columns):
        # the copy before this one, of this call or the last, has read the buffer
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = acc[:, c : c + columns].astype(buffer.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out_ref.at[:, pl.ds(c, columns)])


def rows_of(values, shape, axis: int):
    """Spread one value a row (axis 0) or a column (axis 1) over [rows, columns]."""
    return lax.broadcast_in_dim(values, shape, [axis])


def in_loop(index):
    """Return `index`, which the compiler takes for another in each turn of a loop, so that it moves nothing that follows from it out.

    It would keep the 16 descriptors of each operand of wgmma in registers for the whole loop: up to 120 bytes of a thread spilled.
    """
    return lax.optimization_barrier(index)
