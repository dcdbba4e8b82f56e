"""Pages of 64 tokens as the decode kernel reads them: fp8, 8, 4 or 2 bits."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange

from lcx.axes import Codec, Compress
from lcx.cache import Leaf
from lcx.errors import UserError
from lcx.ops.attention import EMPTY
from lcx.policies.flush import Flush
from lcx.segments import Segment
from pallas_kernels.payloads import FLOATS, PAGE, Pages, Payload, read_pages, stored_head_dim, write_pages

KINDS = ("fp8", "int8", "int4", "int2")


@dataclass(frozen=True)
class Paged(Codec):
    """Keys and values of 64 neighbouring tokens in one page, in the layout that a decode step on Hopper reads.

    No paper's own: the quantiser is KIVI's, Liu et al. 2024, arXiv:2402.02750, section 3.2 (asymmetric, keys after RoPE per channel,
    values per token), with a page for the group of keys and a whole head for that of values; `by="token"` is `Int`'s.  float16 scales
    and zero points (fp8: only scales).  At D = 128, bits a value: int4 4.375 by channel, 4.25 by token.

    On Hopper a step of at most 128 query rows a KV head goes through `pallas_kernels.decode`, which rounds queries and probabilities to
    float16; everything else is decoded by XLA.  Its segment follows one that holds the newest tokens exactly: see `chain`.

    Args:
      kind: "fp8" (e4m3), "int8", "int4" or "int2".
      by: unit that shares a scale of keys, one "channel" of the page or one "token".
    """

    kind: str = "int4"
    by: str = "channel"

    exact = "Never: values are rounded, but for the newest tokens, which the segment before holds."
    page = PAGE

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"Paged: kind={self.kind!r}: allowed are {', '.join(KINDS)}")
        if self.by not in ("channel", "token"):
            raise UserError(f"Paged: by={self.by!r}: allowed are channel, token")

    @property
    def payload(self) -> Payload:
        """Payload of a page."""
        return Payload(self.kind, self.by)

    def check(self, size):
        stored_head_dim(size.head_dim)

    def leaves(self, size):
        payload, stored = self.payload, stored_head_dim(size.head_dim)
        kind = jnp.int16 if payload.codes else FLOATS[self.kind]
        rows = sum(map(len, payload.rows(stored).values()))
        # a page is one entry of the slots' axis
        return {
            "k": Leaf(kind, after=payload.k_shape(stored), per=PAGE),
            "v": Leaf(kind, after=payload.v_shape(stored), per=PAGE),
            "scales": Leaf(jnp.float16, after=(rows, PAGE), per=PAGE),
        }

    def encode(self, ctx, tokens, pick):
        B, R, N, _ = tokens.k.shape
        valid = jnp.broadcast_to(tokens.pos != EMPTY, (B, R, N))
        k, v = (rearrange(x, "B R (n t) D -> (B R n) t D", t=PAGE) for x in (tokens.k, tokens.v))
        pages = write_pages(k, v, rearrange(valid, "B R (n t) -> (B R n) t", t=PAGE), self.payload)
        arrays = {"k": pages.k, "v": pages.v, "scales": pages.scales}
        return {name: rearrange(x, "(B R n) ... -> B R n ...", B=B, R=R) for name, x in arrays.items()}

    def decode(self, ctx, payload, pick):
        B, R = payload["k"].shape[:2]
        k, v = read_pages(self.pages(payload))
        k = rearrange(k, "(B R n) t D -> B R D (n t)", B=B, R=R)
        return k, rearrange(v, "(B R n) t D -> B R (n t) D", B=B, R=R)

    def pages(self, payload):
        k, v, scales = (rearrange(payload[n], "B R n ... -> (B R n) ...") for n in ("k", "v", "scales"))
        return Pages(k, v, scales, self.payload)


def chain(
    kind: str = "int4", by: str = "channel", residual: int = 64, heads: str = "all", compress: Compress | None = None
) -> tuple[Segment, Segment]:
    """Return an exact tail of the newest `residual` ... `residual + 63` tokens, and the pages that leave it.

    Args:
      kind, by: as in `Paged`.
      residual: newest tokens that are never quantised, 64 by default: half of KIVI's.
      heads, compress: as in `Segment`.
    """
    tail = Segment("tail", heads=heads, policy=Flush(page=PAGE, keep=residual), compress=compress)
    return tail, Segment("pages", heads=heads, codec=Paged(kind, by))
