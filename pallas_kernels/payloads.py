"""Payloads of the decode kernel: the layout of a page of 64 tokens of one KV head, and the way from its codes to operands of wgmma.

Integer codes lie in 16-bit words, `16 // bits` codes in each, ordered so that a code needs no other thread's word: the words of a page are
[64, D * bits / 16], loaded as the operand A of wgmma is held, and the codes at one place of all words (a plane) are such an operand.

    word (int4)     plane 3 | plane 2 | plane 1 | plane 0        channels of K:  [plane 0 | plane 1 | plane 2 | plane 3], a quarter each
    one plane:      (word & 0xF0) | exponent  =  float16(64 + code),  - 64 = code        two instructions for two codes
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from lcx.errors import UserError

PAGE = 64  # tokens of a page
HEAD_DIMS = (64, 128, 256)
BITS = {"bf16": 16, "f16": 16, "fp8": 8, "int8": 8, "int4": 4, "int2": 2}
FLOATS = {"bf16": jnp.bfloat16, "f16": jnp.float16, "fp8": jnp.float8_e4m3fn}
FP8_MAX = 448.0
MANTISSA = 10  # bits of a float16 below its leading one


@dataclass(frozen=True)
class Payload:
    """Format of a page.

    Attributes:
      kind: "bf16" and "f16" exactly; "fp8" (e4m3), "int8", "int4" and "int2" with float16 scales, the integers with zero points too:
        value = scale * code + zero, code 0 ... 2^bits - 1.
      by: unit that shares a scale of K: one "channel" of the page (KIVI), or one "token".  V has one for each token.
    """

    kind: str = "bf16"
    by: str = "channel"

    def __post_init__(self):
        if self.kind not in BITS:
            raise UserError(f"Payload: kind={self.kind!r}: allowed are {', '.join(BITS)}")
        if self.by not in ("channel", "token"):
            raise UserError(f"Payload: by={self.by!r}: allowed are 'channel', 'token'")

    @property
    def bits(self) -> int:
        """Bits of a value, without scales."""
        return BITS[self.kind]

    @property
    def exact(self) -> bool:
        """True where there are no scales."""
        return self.bits == 16

    @property
    def codes(self) -> bool:
        """True where values are integer codes in words."""
        return self.kind.startswith("int")

    @property
    def dtype(self):
        """Type in which q, P and the decoded values are multiplied; float16 holds every code of up to 10 bits exactly."""
        return FLOATS[self.kind] if self.exact else jnp.float16

    def width(self, head_dim: int) -> int:
        """Neighbouring columns of an array of words, or of values, that are read at a time: at most 64."""
        return min(64, head_dim * self.bits // 16) if self.codes else 64

    def columns(self, head_dim: int) -> int:
        """Columns of an operand of wgmma, which takes no fewer than 16: two planes where one is narrower."""
        return max(16, self.width(head_dim))

    def k_shape(self, head_dim: int) -> tuple[int, int]:
        """Return the shape of one page of `Pages.k`."""
        return (PAGE, head_dim * self.bits // 16 if self.codes else head_dim)

    def v_shape(self, head_dim: int) -> tuple[int, int]:
        """Return the shape of one page of `Pages.v`."""
        return self.k_shape(head_dim) if self.codes else (head_dim, PAGE)

    def rows(self, head_dim: int) -> dict[str, range]:
        """Return the rows of 64 in a page of `Pages.scales`, by name; empty without scales."""
        if self.exact:
            return {}
        k_rows = head_dim // 64 if self.by == "channel" else 1
        sizes = {"k_scale": k_rows, "k_zero": k_rows, "v_scale": 1, "v_zero": 1}
        if not self.codes:
            sizes = {name: size for name, size in sizes.items() if name.endswith("scale")}
        ends = [sum(list(sizes.values())[: i + 1]) for i in range(len(sizes))]
        return {name: range(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """A pool of pages, each of 64 tokens of one KV head; a page of an array is one contiguous piece of memory.

    Attributes:
      k: bf16, f16, fp8: [pages, 64, D], token-major.  Integers: int16 [pages, 64, D * bits / 16], words of codes, see `pack_pages`.
      v: bf16, f16, fp8: [pages, D, 64], channel-major.  Integers: int16 [pages, 64, D * bits / 16], row r holds channels r, 64 + r, ...
      scales: float16 [pages, rows, 64], `Payload.rows` names the rows; None where values are exact.
      payload: how to read them.
    """

    k: jax.Array
    v: jax.Array
    scales: jax.Array | None
    payload: Payload = field(metadata=dict(static=True))

    @property
    def head_dim(self) -> int:
        """Number of channels, one of HEAD_DIMS."""
        return self.k.shape[2] * 16 // self.payload.bits if self.payload.codes else self.k.shape[2]

    def check(self):
        """Raise UserError where the arrays do not fit each other and the payload."""
        p, D = self.payload, self.head_dim
        if D not in HEAD_DIMS:
            raise UserError(f"pages.k of {self.k.shape}: head_dim {D}, allowed are {HEAD_DIMS}; pack_pages pads")
        M = self.k.shape[0]
        rows = sum(map(len, p.rows(D).values()))
        want = [("k", (M, *p.k_shape(D))), ("v", (M, *p.v_shape(D))), ("scales", (M, rows, 64) if rows else None)]
        store = jnp.int16 if p.codes else FLOATS[p.kind]
        for name, shape in want:
            array = getattr(self, name)
            if (None if array is None else array.shape) != shape:
                raise UserError(
                    f"pages.{name} of {None if array is None else array.shape}: allowed is {shape} for {p} and {M} pages"
                )
            kind = jnp.float16 if name == "scales" else store
            if array is not None and array.dtype != kind:
                raise UserError(f"pages.{name} of {array.dtype}: allowed is {jnp.dtype(kind)} for {p}")


def page_bytes(payload: Payload, head_dim: int) -> int:
    """Return the bytes of one page, K and V of 64 tokens of one KV head with their scales; `head_dim` as stored (64, 128, 256)."""
    values = 2 * PAGE * head_dim * payload.bits // 8
    return values + sum(map(len, payload.rows(head_dim).values())) * 64 * 2


def pack_pages(k: jax.Array, v: jax.Array, payload: Payload, length=None) -> tuple[Pages, jax.Array]:
    """Write plain keys and values as pages, in the order of the text.

    Channel c of K lies in plane j, column w of its row's words, where c = (i * planes + j) * width + x and w = i * width + x.
    Channel h * 64 + r of V at token b * width + x lies in row r, where h * 64 / width + b = i * planes + j and w = i * width + x.

    Args:
      k: [B,K,D,S], v: [B,K,S,D], D at most 256 (padded to 64, 128 or 256).
      payload: how to write them.
      length: int32 [B] or [B,K], tokens in use; those behind it do not widen a channel's range.  None: S.

    Returns:
      The pages, and the table int32 [B,K,n], n = ceil(S / 64), that lists those of each KV head.
    """
    B, K, D, S = k.shape
    if v.shape != (B, K, S, D):
        raise UserError(f"v of {v.shape}: allowed is {(B, K, S, D)}, from k of {k.shape}")
    if not 1 <= D <= max(HEAD_DIMS) or S < 1:
        raise UserError(f"k of {k.shape}: head_dim is 1 ... {max(HEAD_DIMS)} and there is at least 1 token")
    n = -(-S // PAGE)
    more = ((0, 0), (0, 0), (0, n * PAGE - S), (0, 0))
    k, v = (rearrange(jnp.pad(x, more), "B K (n t) D -> (B K n) t D", t=PAGE) for x in (k.swapaxes(2, 3), v))
    tokens = jnp.asarray(S if length is None else length)
    length = jnp.broadcast_to(tokens if tokens.ndim == 2 else tokens.reshape(-1, 1), (B, K))
    valid = jnp.arange(n * PAGE) < length[..., None]
    table = jnp.arange(B * K * n, dtype=jnp.int32).reshape(B, K, n)
    return write_pages(k, v, rearrange(valid, "B K (n t) -> (B K n) t", t=PAGE), payload), table


def stored_head_dim(head_dim: int) -> int:
    """Return the channels of a page that holds heads of `head_dim`: the next of HEAD_DIMS.

    Raises:
      UserError: there is none.
    """
    if not 1 <= head_dim <= max(HEAD_DIMS):
        raise UserError(f"head_dim={head_dim}: pages hold 1 ... {max(HEAD_DIMS)} channels")
    return next(d for d in HEAD_DIMS if d >= head_dim)


def write_pages(k: jax.Array, v: jax.Array, valid: jax.Array, payload: Payload) -> Pages:
    """Return pages of k, v [M,64,D], any float type and D at most 256, and `valid` bool [M,64], places that hold a token.

    Scales and zero points are clipped to float16's range.  What lies in channels from D on means nothing.
    """
    D = k.shape[2]
    head_dim = stored_head_dim(D)
    k, v = (jnp.pad(x.astype(jnp.float32), ((0, 0), (0, 0), (0, head_dim - D))) for x in (k, v))
    # padding channels must not widen a token's range
    valid = valid[..., None] & (jnp.arange(head_dim) < D)
    k, v = (jnp.where(valid, x, 0.0) for x in (k, v))
    if payload.exact:
        k, v = (x.astype(FLOATS[payload.kind]) for x in (k, v))
        return Pages(k, v.swapaxes(1, 2), None, payload)

    k, k_scale, k_zero = _encode(k, valid, 1 if payload.by == "channel" else 2, payload)
    v, v_scale, v_zero = _encode(v, valid, 2, payload)
    scales = {"k_scale": k_scale, "k_zero": k_zero, "v_scale": v_scale, "v_zero": v_zero}
    rows = [rearrange(jnp.asarray(scales[name]), "M ... -> M (...)") for name in payload.rows(head_dim)]
    scales = rearrange(jnp.concatenate(rows, 1), "M (row x) -> M row x", x=64)
    if not payload.codes:
        return Pages(k, v.swapaxes(1, 2), scales, payload)
    width, count = payload.width(head_dim), 16 // payload.bits
    k = rearrange(k, "M t (i j x) -> M t i j x", j=count, x=width)
    v = rearrange(v, "M (b x) (h r) -> M r (h b) x", x=width, r=64)
    v = rearrange(v, "M r (i j) x -> M r i j x", j=count)
    return Pages(_words(k, payload.bits), _words(v, payload.bits), scales, payload)


def read_pages(pages: Pages) -> tuple[jax.Array, jax.Array]:
    """Return k, v float32 [M,64,D] of whole pages, by XLA; places without a token hold anything."""
    payload, head_dim = pages.payload, pages.head_dim
    if payload.codes:
        width = payload.width(head_dim)
        k = rearrange(_codes(pages.k, payload.bits, width), "M t i j x -> M t (i j x)")
        v = rearrange(_codes(pages.v, payload.bits, width), "M r i j x -> M r (i j) x")
        v = rearrange(v, "M r (h b) x -> M (b x) (h r)", h=head_dim // 64)
    else:
        k, v = pages.k, pages.v.swapaxes(1, 2)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    if pages.scales is None:
        return k, v
    rows, scales = payload.rows(head_dim), pages.scales.astype(jnp.float32)

    def line(name):
        values = scales[:, rows[name].start : rows[name].stop]
        by_channel = name[0] == "k" and payload.by == "channel"
        return rearrange(values, "M row x -> M 1 (row x)" if by_channel else "M 1 x -> M x 1")

    k, v = k * line("k_scale"), v * line("v_scale")
    return (k + line("k_zero"), v + line("v_zero")) if payload.codes else (k, v)


def _encode(x, valid, axis: int, payload: Payload):
    """Return the codes of x [pages, 64, D], and their float16 scale and zero over `axis`, which they keep with size 1."""
    low = jnp.min(jnp.where(valid, x, jnp.inf), axis, keepdims=True)
    high = jnp.max(jnp.where(valid, x, -jnp.inf), axis, keepdims=True)
    # a place without a token has no range
    low, high = (jnp.where(jnp.any(valid, axis, keepdims=True), y, 0.0) for y in (low, high))
    top = float(jnp.finfo(jnp.float16).max)
    zero = jnp.clip(low, -top, top).astype(jnp.float16)
    most = 2**payload.bits - 1
    # from the zero point as it is stored, so that its rounding is not added to every code
    step = (high - zero.astype(jnp.float32)) / most if payload.codes else jnp.maximum(-low, high) / FP8_MAX
    scale = jnp.clip(step, 2.0**-14, top).astype(jnp.float16)
    if not payload.codes:
        code = jnp.clip(x / scale.astype(jnp.float32), -FP8_MAX, FP8_MAX)
        return code.astype(FLOATS["fp8"]), scale, None
    code = jnp.round((x - zero.astype(jnp.float32)) / scale.astype(jnp.float32))
    return jnp.clip(jnp.where(valid, code, 0), 0, most).astype(jnp.int32), scale, zero


def _words(codes, bits: int):
    """Pack codes [..., i, j, x] into int16 [..., i * x]: code j of a word at bit `bits * j`."""
    shifts = bits * jnp.arange(16 // bits, dtype=jnp.int32)[:, None]
    words = jnp.sum(codes << shifts, -2, dtype=jnp.int32)
    return rearrange(words, "... i x -> ... (i x)").astype(jnp.uint16).astype(jnp.int16)


def _codes(words, bits: int, width: int):
    """Unpack int32 [..., i, j, x], the inverse of `_words`."""
    words = rearrange(words.astype(jnp.int32), "... (i x) -> ... i 1 x", x=width)
    shifts = bits * jnp.arange(16 // bits, dtype=jnp.int32)[:, None]
    return (words >> shifts) & (2**bits - 1)


def planes(words, bits: int):
    """Return, in a kernel, the planes of words int16 [64, width] in registers, as float16 [64, width] each, exact integers.

    A code at bit b of a word becomes the mantissa of a float16 whose exponent makes bit b worth 1; codes above bit 10 are shifted down
    first, so that most planes cost one logical instruction and one subtraction for two codes.
    """
    shift, shifted = 0, words
    for place in range(0, 16, bits):
        if place - shift + bits > MANTISSA:
            shift, shifted = place, lax.shift_right_logical(words, jnp.int16(place))
        at = place - shift
        exponent = (15 + MANTISSA - at) << MANTISSA
        code = (shifted & jnp.int16((2**bits - 1) << at)) | jnp.int16(exponent)
        yield lax.bitcast_convert_type(code, jnp.float16) - jnp.float16(2.0 ** (MANTISSA - at))
