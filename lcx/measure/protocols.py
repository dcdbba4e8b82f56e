"""Protocols of quality: how a continuation is fed after a prompt that was read under a method.

prompt: the continuation is one step.  What a method does at the end of the prompt counts; what it does at each step of decoding does not,
as all tokens of a step see each other exactly.  The protocol of NVIDIA/kvpress.
decode: each token of the continuation is a step of its own, as in generation: it is evicted, encoded and chosen for as the method does it.

Methods whose steps are no more than their tokens (dense attention, codecs of single tokens, what is chosen at the end of the prompt) need
no 256 steps for `decode`: one step whose tokens read each other as they will be stored is the same up to rounding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lcx import checks
from lcx.errors import UserError
from lcx.session import Session
from lcx.session_programs import DECODE

PROTOCOLS = ("decode", "prompt")


def check(protocol: str) -> None:
    """Raise UserError for a protocol that does not exist."""
    checks.one_of("protocol", protocol, PROTOCOLS)


def decides(session: Session) -> str | None:
    """Name the part by which the two protocols feed another number of tokens a step; None where one step does for both."""
    return checks.by_step(session.recipes[DECODE])


def differ(session: Session) -> bool:
    """Return False where both protocols give the same by construction: nothing acts in decode."""
    plain = all(s.codec.plain for r in session.recipes[DECODE] for chain in r.chains for s in chain)
    return decides(session) is not None or not plain


def widths(session: Session, protocol: str, tokens: int) -> list[int]:
    """Return the widths of the steps that a continuation of `tokens` tokens is fed in."""
    return [1] * tokens if protocol == "decode" and decides(session) is not None else [tokens]


def continuation(session: Session, tokens, protocol: str) -> jax.Array:
    """Feed a continuation under a protocol.

    Args:
      session: that has read the prompts.
      tokens: int [B,M].
      protocol: of PROTOCOLS.

    Returns:
      x [B,M,E], the residual stream of its tokens.  Where `decode` was one step it is pending: nothing has been written.

    Raises:
      UserError: no such protocol, or tokens that do not fit.
    """
    check(protocol)
    tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise UserError(f"tokens have shape {tokens.shape}; allowed is [B,M]")
    if protocol == "prompt":
        return session.step(tokens, rows="all")
    if decides(session) is None:
        if session.order == "write":
            return session.step(tokens, rows="all")
        return session.peek(tokens, as_stored=True)
    return jnp.concatenate([session.step(tokens[:, i : i + 1], rows="all") for i in range(tokens.shape[1])], 1)
