"""Questions about one context: it is read and compressed once, and each question is answered from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lcx import checks
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.measure.quality import make_session
from lcx.models.loading import Pretrained
from lcx.recipe import Recipe
from lcx.tasks.local import QUESTION

TEMPLATE = QUESTION


@dataclass(frozen=True)
class Answer:
    """Answer to one question.

    Attributes:
      question: as it was asked.
      text: up to the first line's end, a stop token or the most tokens.
      ids: its tokens.
      seconds: the question's step and the answer's, without compiling.
    """

    question: str
    text: str
    ids: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Asked:
    """Context that was read under a method, and the answers from it.

    Attributes:
      tokens: of the context.
      read_seconds: prefill and compression, without compiling.
      cache_bytes: device bytes of the cache after the context, room for a question and its answer included.
      answers: in the order of the questions.
    """

    tokens: int
    read_seconds: float
    cache_bytes: int
    answers: tuple[Answer, ...]


def ask(
    model: Pretrained,
    method: Recipe | Experiment,
    context: str,
    questions: Sequence[str],
    *,
    max_tokens: int = 32,
    template: str = TEMPLATE,
    allow_extrapolation: bool = False,
) -> Asked:
    """Read a context under a method and answer each question from it, greedily.

    No question is seen while the context is compressed, and none sees another: each goes on from a copy of the context's cache.

    Args:
      model: as `lcx.load` gives it.
      method: a recipe, or an experiment with arrays and schedule.
      context: the text.
      questions: at least one.
      max_tokens: of an answer.
      template: what follows the context; `{question}` is the question.
      allow_extrapolation: beyond the model's context.

    Raises:
      UserError: an empty text, a template without its question, or more tokens than the model has room for; nothing has run then.
    """
    checks.kind("model", model, Pretrained)
    checks.kind("method", method, Recipe, Experiment)
    checks.whole("max_tokens", max_tokens, 1)
    experiment = Experiment(method) if isinstance(method, Recipe) else method
    listed = [_text("questions", q) for q in checks.listed("questions", questions)]
    if not listed:
        raise UserError("questions=[]: give at least one")
    if "{question}" not in template:
        raise UserError(f"template={checks.brief(template)} has no {{question}}")
    ids = model.tokenizer.text_ids(_text("context", context))
    asked = [model.tokenizer.encode(template.replace("{question}", q)) for q in listed]
    longest = max(map(len, asked))
    model.check_length(len(ids) + longest + max_tokens - 1, allow_extrapolation)
    experiment.check_weights(model.config, model.sha256, lambda: model.tensors_sha256)
    session = make_session(model.layers, experiment, len(ids), longest + max_tokens - 1)
    session.compile(len(ids), sorted({1, *map(len, asked)}))
    start = time.perf_counter()
    jax.block_until_ready(session.prefill(ids))
    read, size = time.perf_counter() - start, session.cache_bytes
    # a step writes in place, so each question gets arrays of its own
    kept, place = session.cache, (session.next_pos.copy(), session.written.copy())
    answers = []
    for question, tokens in zip(listed, asked, strict=True):
        session.cache = jax.tree.map(jnp.copy, kept)
        session.next_pos, session.written = place[0].copy(), place[1].copy()
        start = time.perf_counter()
        ids_of = _answer(model, session, tokens, max_tokens)
        seconds = time.perf_counter() - start
        text = model.tokenizer.decode(ids_of, skip_special=True).strip().split("\n")[0]
        answers.append(Answer(question, text, tuple(ids_of), seconds))
    return Asked(len(ids), read, size, tuple(answers))


def _answer(model: Pretrained, session, tokens: Sequence[int], max_tokens: int) -> list[int]:
    """The greedy tokens after a question, to the end of their first line with words on it."""
    ids: list[int] = []
    logits = session.step([tokens])
    while True:
        ids.append(int(np.asarray(model.choose(logits))[0]))
        ended = "\n" in model.tokenizer.decode(ids, skip_special=True).lstrip()
        if ended or ids[-1] in model.stop_ids or len(ids) == max_tokens:
            return ids
        logits = session.step([ids[-1:]])


def _text(name: str, value) -> str:
    checks.kind(name, value, str)
    if not value.strip():
        raise UserError(f"{name}={value!r} is empty")
    return value
