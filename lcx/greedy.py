"""Greedy decoding: one token a step, or several where a draft is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lcx import checks
from lcx.errors import NotFinite, UserError
from lcx.measure.finite import first_not_finite
from lcx.ops.attention import EMPTY
from lcx.schedules.lookup import Draft
from lcx.session import Session
from lcx.session_programs import DECODE

Choose = Callable[[jax.Array], Any]  # logits [N,V] -> token ids [N]


def generate(
    session: Session,
    prompt,
    num_tokens: int,
    *,
    stop: Sequence[int] = (),
    choose: Choose | None = None,
    draft: Draft | None = None,
) -> Iterator[int]:
    """Return the greedy tokens of one text, one by one, until `num_tokens` or one of `stop`.

    Args:
      session: of batch 1; what it has read before is forgotten.
      prompt: int [T].
      num_tokens: at most so many, the session's new_tokens + 1 at most.
      stop: ids after which it ends; they are yielded.
      choose: which token a row of logits stands for; None: the one with the highest logit.
      draft: drafts tokens that one step checks together, such as `lcx.schedules.lookup.Lookup()`; the iterator is a `Speculation` then.

    Raises:
      UserError: sizes or ids that do not fit, before anything runs; NotFinite: logits that are not finite, with layer and step.
    """
    checks.kind("session", session, Session)
    checks.whole("num_tokens", num_tokens, 1)
    if session.batch != 1:
        raise UserError(f"generate: the session has batch {session.batch}; allowed is 1")
    if num_tokens - 1 > session.new_tokens:
        raise UserError(
            f"num_tokens={num_tokens} needs a session with new_tokens of at least {num_tokens - 1}, it has {session.new_tokens}"
        )
    vocab = session.config.vocab_size
    ids = checks.token_ids(prompt, 1, vocab)[0]
    checks.fits("prompt", len(ids), session.prompt)
    last = checks.listed("stop", stop)
    ends = frozenset(checks.token_ids(last, 1, vocab)[0].tolist()) if last else frozenset()
    if draft is None:
        return _one_by_one(session, ids, num_tokens, ends, choose)
    if session.order != "attend":
        raise UserError(f"draft: order={session.order!r} writes before it reads; make the session with order='attend'")
    return Speculation(session, ids, num_tokens, ends, choose, draft)


def _one_by_one(session: Session, prompt, num_tokens: int, stop: frozenset[int], choose) -> Iterator[int]:
    ids = [int(t) for t in prompt]
    logits = _logits(session.prefill, prompt)
    for i in range(num_tokens):
        token = int(best_tokens(session, ids, len(prompt), logits, choose)[0])
        ids.append(token)
        yield token
        if token in stop or i + 1 == num_tokens:
            return
        logits = _logits(session.step, [[token]])


def _logits(read: Callable[[Any], jax.Array], tokens) -> jax.Array | None:
    """Logits after `tokens`; None where the session says that they are nan, for `best_tokens` to look for the layer."""
    try:
        return read(tokens)
    except NotFinite:
        return None


def best_tokens(
    session: Session, ids: Sequence[int], prompt: int, logits: jax.Array | None, choose=None, count: int = 1
) -> np.ndarray:
    """Return int [count], the token that each of the first `count` rows of logits [N,V] stands for; None: logits that are nan.

    Raises:
      NotFinite: a row has a value that is nan, or infinite where it was chosen; names layer and step of a run of `ids`, which was read
        in a prompt of `prompt` tokens and in steps of one.
    """
    if logits is not None:
        rows = np.asarray(logits)[:count]
        # all rows at once where a program chooses: one shape
        chosen = rows.argmax(-1) if choose is None else np.asarray(choose(logits))[:count]
        if not np.isnan(rows).any() and np.isfinite(np.take_along_axis(rows, chosen[:, None], -1)).all():
            return chosen

    def again():
        session.prefill(np.asarray(ids[:prompt]))
        for token in ids[prompt:]:
            session.step([[token]])

    raise NotFinite(f"no token can be chosen after {len(ids)} tokens: {first_not_finite(session, again)}")


class Speculation:
    """The tokens of `generate` with a draft: each step checks the drafted tokens together and keeps those that it would have chosen.

    Steps have two widths, 1 and 1 + draft.num_tokens, so that nothing is compiled after the first of each.

    Attributes:
      drafted, accepted: tokens so far.
      widths: tokens that each step since the prompt wrote.
      decides: why the output is that of the same recipe fed these widths; None: it is that of plain decoding, up to ties, and for codes
        up to values that round the other way: widths differ in the last bit of a sum.
    """

    def __init__(
        self, session: Session, prompt: np.ndarray, num_tokens: int, stop: frozenset[int], choose, draft: Draft
    ):
        self.drafted = self.accepted = 0
        self.widths: list[int] = []
        self.decides = decides_by_step(session)
        self._tokens = self._run(session, prompt, num_tokens, stop, choose, draft)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        return next(self._tokens)

    def _run(self, session, prompt, num_tokens, stop, choose, draft) -> Iterator[int]:
        ids, start = [int(t) for t in prompt], len(prompt)
        new = best_tokens(session, ids, start, _logits(session.prefill, prompt), choose)
        while True:
            for token in new:
                ids.append(int(token))
                yield int(token)
                if token in stop or len(ids) - start == num_tokens:
                    return
            new = self._step(session, ids, start, num_tokens - (len(ids) - start) - 1, stop, choose, draft)

    def _step(self, session, ids, start, most, stop, choose, draft) -> np.ndarray:
        """The tokens after `ids`, whose last one has not been fed yet; at most `most` of them are drafted."""
        drafted = np.asarray(draft.draft(np.asarray(ids, np.int32), most), np.int32)
        if not len(drafted):
            self.widths.append(1)
            return best_tokens(session, ids, start, _logits(session.step, [ids[-1:]]), choose)
        width, real = 1 + draft.num_tokens, 1 + len(drafted)
        tokens, pos = np.zeros((1, width), np.int32), np.full((1, width), EMPTY, np.int32)
        tokens[0, :real] = [ids[-1], *drafted]
        pos[0, :real] = session.next_pos[0] + np.arange(real)
        x = session.peek(tokens, pos, as_stored=self.decides is None)
        logits = session.layers.logits(x[0])
        best = best_tokens(session, [*ids, *drafted.tolist()], start, logits, choose, real)
        wrong = np.flatnonzero(best[:-1] != drafted)
        right = int(wrong[0]) if len(wrong) else len(drafted)
        ends = [i for i in range(right) if int(best[i]) in stop]
        new = best[: (ends[0] if ends else right) + 1]
        # the last of them is fed by the next step
        session.commit([len(new)])
        self.drafted += len(drafted)
        self.accepted += right
        self.widths.append(len(new))
        return new


def decides_by_step(session: Session) -> str | None:
    """Name the part by which drafted tokens give the text of the same steps, not that of plain decoding; None where no part does."""
    return checks.by_step(session.recipes[DECODE])


def all_plain(session: Session) -> bool:
    """Return True where every slot holds floats, so that the last bit of a sum stays the last bit of the stored number."""
    return all(s.codec.plain for recipe in session.recipes[DECODE] for chain in recipe.chains for s in chain)
