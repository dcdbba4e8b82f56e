"""Protocols of quality: how a continuation is fed after a prompt that was read under a method.

prompt: the continuation is one step.  What a method does at the end of the prompt counts; what it does at each step of decoding does not,
as all tokens of a step see each other exactly.  The protocol of NVIDIA/kvpress.
decode: each token of the continuation is a step of its own, as in generation: it is evicted, encoded and chosen for as the method does it.

Methods whose steps are no more than their tokens (dense attention, codecs of single tokens, what is chosen at the end of the prompt) need
no 256 steps for `decode`: one step whose tokens read each other as they will be stored is the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def peeked(session: Session, names: Sequence[str]) -> str | None:
    """Return the protocol of `names` that is fed without being written, so that the other goes on from the same prompt; None: none."""
    if session.order != "attend" or len(names) < 2:
        return None
    return "decode" if decides(session) is None else "prompt"


def widths(session: Session, protocol: str, tokens: int) -> list[int]:
    """Return the widths of the steps that a continuation of `tokens` tokens is fed in."""
    return [1] * tokens if protocol == "decode" and decides(session) is not None else [tokens]


def continuation(session: Session, tokens, protocol: str, *, written: bool = True) -> jax.Array:
    """Feed a continuation under a protocol.

    Args:
      session: that has read the prompts.
      tokens: int [B,M].
      protocol: of PROTOCOLS.
      written: False, for the protocol that `peeked` names: nothing is written and nothing stays pending.

    Returns:
      x [B,M,E], the residual stream of its tokens.  `decode` of a method whose steps are no more than their tokens writes nothing.

    Raises:
      UserError: no such protocol, or tokens that do not fit.
    """
    check(protocol)
    tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise UserError(f"tokens have shape {tokens.shape}; allowed is [B,M]")
    one_step = protocol == "prompt" or decides(session) is None
    as_stored = protocol == "decode" and differ(session)
    if one_step and session.order == "attend" and (as_stored or not written):
        x = session.peek(tokens, as_stored=as_stored)
        session.discard()
        return x
    if one_step:
        return session.step(tokens, rows="all")
    return jnp.concatenate([session.step(tokens[:, i : i + 1], rows="all") for i in range(tokens.shape[1])], 1)
