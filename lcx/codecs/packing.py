"""Small unsigned codes in bytes.  Halves of the axis share a byte, so that unpacking is a concatenation and interleaves nothing."""

from __future__ import annotations

import jax.numpy as jnp


def codes_per_byte(bits: int) -> int:
    """Return the number of codes that the packed axis is a multiple of; 3 bits are a plane of two and one of one, 3 bytes for 8 codes."""
    return 8 if bits == 3 else 8 // bits


def pack(codes, bits: int, axis: int):
    """Pack uint8 codes below 2**bits into uint8; the axis shrinks to bits / 8 of it and must be a multiple of `codes_per_byte`."""
    if bits == 3:
        return jnp.concatenate([pack(codes & 3, 2, axis), pack(codes >> 2, 1, axis)], axis)
    parts = jnp.split(codes.astype(jnp.uint8), 8 // bits, axis)
    packed = parts[0]
    for i, part in enumerate(parts[1:], 1):
        packed = packed | (part << (bits * i))
    return packed


def unpack(packed, bits: int, axis: int):
    """Unpack what `pack` returned; uint8."""
    if bits == 8:
        return packed
    if bits == 3:
        low, high = jnp.split(packed, [packed.shape[axis] * 2 // 3], axis)
        return unpack(low, 2, axis) | (unpack(high, 1, axis) << 2)
    mask = jnp.uint8(2**bits - 1)
    return jnp.concatenate([(packed >> (bits * i)) & mask for i in range(8 // bits)], axis)


def ranges(low, high, bits: int):
    """Return scale and minimum of an asymmetric quantiser as they are stored, float16, from the extremes of each group.

    The minimum is clipped to float16's range; the scale is taken from the stored minimum, so that the error of rounding the minimum
    stays at that and is not added to every code.
    """
    top = float(jnp.finfo(jnp.float16).max)
    minimum = jnp.clip(low, -top, top).astype(jnp.float16)
    scale = jnp.clip((high - minimum.astype(jnp.float32)) / (2**bits - 1), 0.0, top).astype(jnp.float16)
    return scale, minimum


def quantise(x, scale, minimum, bits: int):
    """Return the codes of x under a stored scale and minimum; a group of equal values has scale 0 and code 0."""
    step = scale.astype(jnp.float32)
    codes = (x - minimum.astype(jnp.float32)) / jnp.where(step > 0, step, 1.0)
    return jnp.clip(jnp.round(codes), 0, 2**bits - 1).astype(jnp.uint8)


def dequantise(codes, scale, minimum):
    return codes.astype(jnp.float32) * scale.astype(jnp.float32) + minimum.astype(jnp.float32)
