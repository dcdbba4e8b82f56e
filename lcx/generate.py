"""Greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from lcx.checks import whole
from lcx.errors import UserError
from lcx.session import Session


class NotFinite(UserError):
    """Logits that are not finite: the model or the method has failed."""


def best_token(logits: jax.Array, step: int, choose: Callable | None = None) -> int:
    """Return the id with the highest logit of [1,V]; raise NotFinite where one is nan, or none is finite.

    `choose`: logits [B,V] -> token ids [B], such as `Pretrained.choose`; None: the largest logit.
    """
    row = np.asarray(logits)[0]
    if not np.isfinite(row[int(row.argmax())]):
        raise NotFinite(f"logits of step {step} after the prompt are not finite: no token can be chosen")
    return int(row.argmax() if choose is None else choose(logits)[0])


def generate(
    session: Session, prompt, num_tokens: int, *, stop: Sequence[int] = (), choose: Callable | None = None
) -> Iterator[int]:
    """Greedy tokens of one text, one by one, until `num_tokens` or one of `stop`.

    Args:
      session: of batch 1; what it has read before is forgotten.
      prompt: int [T].
      num_tokens: at most so many, the session's new_tokens + 1 at most.
      stop: ids after which it ends; they are yielded.
      choose: as in `best_token`.

    Raises:
      UserError: sizes or ids that do not fit, before anything runs; NotFinite: logits that are not finite.
    """
    whole("num_tokens", num_tokens, 1)
    if session.batch != 1:
        raise UserError(f"generate: the session has batch {session.batch}; allowed is 1")
    if num_tokens - 1 > session.new_tokens:
        raise UserError(
            f"num_tokens={num_tokens} needs a session with new_tokens of at least {num_tokens - 1}, it has {session.new_tokens}"
        )
    return _generate(session, prompt, num_tokens, frozenset(stop), choose)


def _generate(session: Session, prompt, num_tokens: int, stop: frozenset[int], choose) -> Iterator[int]:
    logits = session.prefill(prompt)
    for i in range(num_tokens):
        token = best_token(logits, i, choose)
        yield token
        if token in stop or i + 1 == num_tokens:
            return
        logits = session.step([[token]])
