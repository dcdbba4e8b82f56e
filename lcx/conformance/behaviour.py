"""Checks below the exact limit: who may matter to whom, and that what does not count leaves no trace."""

from __future__ import annotations

from typing import Any

import numpy as np

from lcx.conformance.measure import Failed, Measure, Skipped
from lcx.conformance.small_model import ATOL, TINY, layers
from lcx.conformance.subject import Subject, play
from lcx.errors import UserError
from lcx.models.decoder import embed_program, last_rows, logits_program
from lcx.programs import block_program, repack_program
from lcx.recipe import Recipe
from lcx.schedules.chunked import Chunked
from lcx.session import Session

PROGRAMS: tuple[Any, ...] = (block_program, repack_program, embed_program, logits_program, last_rows)


def acts(s: Subject, m: Measure) -> None:
    """At small sizes it differs from dense attention; a method that does nothing would make the other checks empty."""
    plain = Recipe(rounding=s.at("small").rounding)
    if s.at("small") == plain:
        raise Skipped("it is dense attention")
    small = ", ".join(
        f"{c.name}({', '.join(f'{k}={v}' for k, v in c.settings.items())})" for c in s.at("small").describe()
    )
    words = (
        f"{small} equals dense attention on {s.prompt} tokens; give its class `small`, a dict of fields at which it acts, "
        "or take a longer prompt"
    )
    m.apart(s.ragged("small")[0], s.dense(), 10 * ATOL, words)


def finite(s: Subject, m: Measure) -> None:
    """Logits at small sizes are finite."""
    m.finite(s.ragged("small")[0], "logits [step, text, token id]")


def causality(s: Subject, m: Measure) -> None:
    """A token does not matter to those before it, nor to the other text; at the exact limit where the prompt's end chooses for all."""
    recipe = s.at("limit" if s.at("small").one_shot else "small")
    streams = []
    for where in ((), (0, 21), (1, s.prompt - 1)):
        tokens = s.texts[:, : s.prompt].copy()
        if where:
            tokens[where] = (tokens[where] + 1) % TINY.vocab_size
        streams.append(np.asarray(s.session(recipe).prefill(tokens, rows="all")))
    first, early, late = streams
    # queries of a block choose together
    block = recipe.pattern.step_multiple
    before = lambda n: n - n % block
    end = before(s.prompt - 1)
    m.near(early[0, : before(21)], first[0, : before(21)], 1e-5, "tokens before token 21, with and without its change,")
    m.equal(early[1], first[1], "tokens of the other text, with and without a change of token 21,")
    m.near(late[1, :end], first[1, :end], 1e-5, "tokens before the last one, with and without its change,")
    m.equal(late[0], first[0], "tokens of the other text, with and without a change of the last token,")
    # a difference that must be there is none of the largest
    if not np.abs(early[0, 21] - first[0, 21]).max() > 1e-4:
        raise Failed("token 21 does not matter to itself")


def any_chunk(s: Subject, m: Measure) -> None:
    """At small sizes the prompt in one step is finite, and gives what chunks give where the method says so; one-shot ones refuse chunks."""
    recipe = s.at("small")
    if recipe.one_shot:
        try:
            Session(layers(TINY), recipe, s.prompt, schedule=Chunked(s.chunk))
        except UserError as error:
            m.holds("whole prompt" in str(error), f"chunks are refused with other words: {error}")
            return
        raise Failed("chunks are not refused")
    logits, _ = play(s.session(recipe, chunk=None), s.texts, s.lengths)
    m.finite(logits, "logits of the prompt in one step")
    if s.any_chunk:
        m.near(logits, s.ragged("small")[0], ATOL, "logits in one step and in chunks")


def batch_mates(s: Subject, m: Measure) -> None:
    """Each text gives the same in the other row, beside another text of another length."""
    got, recipe = s.ragged("small")[0], s.at("small")
    other = (s.texts[0] + 7) % TINY.vocab_size
    again, _ = play(s.session(recipe), np.stack([s.texts[1], other]), [s.short, s.prompt - 3])
    m.near(again[:, 0], got[:, 1], ATOL, "logits of the short text beside another")
    again, _ = play(s.session(recipe), np.stack([other, s.texts[0]]), [5, s.prompt])
    m.near(again[:, 1], got[:, 0], ATOL, "logits of the long text beside another")


def alone(s: Subject, m: Measure) -> None:
    """Each text of a batch gives what it gives alone."""
    got = s.ragged("small")[0]
    for row, length in enumerate(s.lengths):
        tokens = np.concatenate([s.texts[row][:length], s.texts[row][s.prompt :]])[None]
        want, _ = play(s.session(s.at("small"), batch=1), tokens)
        m.near(got[:, row], want[:, 0], ATOL, f"logits of the text of {length} tokens, in the batch and alone,")


def padding(s: Subject, m: Measure) -> None:
    """Tokens in the padding leave no trace, bit for bit."""
    tokens = s.texts.copy()
    tokens[1, s.short : s.prompt] = 5
    logits, _ = play(s.session(s.at("small")), tokens, s.lengths)
    m.equal(logits, s.ragged("small")[0], "logits with other tokens in the padding")


def empty_slots(s: Subject, m: Measure) -> None:
    """Garbage in slots without a token, nan or the largest integer, leaves no trace, bit for bit."""
    m.equal(s.ragged("small", poisoned=True)[0], s.ragged("small")[0], "logits with garbage in empty slots")


def no_recompilation(s: Subject, m: Measure) -> None:
    """A second session of the same sizes compiles nothing."""
    s.ragged("small")
    count = lambda: sum(program._cache_size() for program in PROGRAMS)
    before = count()
    play(s.session(s.at("small")), s.texts, s.lengths)
    m.same(count(), before, "compiled programs")
