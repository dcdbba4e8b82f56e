"""Fitting a prompt to a budget of tokens: a search over the size of the haystack with a bounded number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import numpy as np

from lcx.errors import UserError
from lcx.tasks.sample import Sample

FULL = 0.98  # of the budget: a prompt that uses so much is not searched further


class Encoder(Protocol):
    """Interface of a tokenizer that the tasks need."""

    def encode(self, text: str, /) -> Sized: ...


Encode = Encoder | Callable[[str], Sized | int]


@dataclass(frozen=True)
class Draft:
    """Text that a task builds at one size.

    Attributes:
      body: goes through the chat template.
      prefix: the answer's opening words, after it.
      references, depths: see `Sample`.
      question: the last words of the body, which ask.
    """

    body: str
    prefix: str
    references: tuple[str, ...]
    depths: tuple[float, ...] = ()
    question: str = field(kw_only=True)

    def __post_init__(self):
        if not (self.question and self.body.endswith(self.question)):
            raise ValueError("a body ends with its question")


@dataclass(frozen=True)
class Form:
    """Construction that all samples of a task share.

    Attributes:
      task: name, for samples and errors.
      answer_tokens: tokens left for the answer.
      match: see `Sample`.
      build: (random numbers of this sample, those that all samples share, size, plan) -> Draft; pure but for its generators.
      least: smallest size of the haystack, in units of the task.
      most: largest size.
      plans: (budget, counter of tokens) -> settings that suit the budget, the best first; a sample takes the first that fits.
    """

    task: str
    answer_tokens: int
    match: str
    build: Callable[[np.random.Generator, np.random.Generator, int, Any], Draft]
    least: int
    most: int
    plans: Callable[[int, Callable[[str], int]], list[Any]] = lambda budget, count: [None]


def counter(encode: Encode) -> Callable[[str], int]:
    """Return text -> number of tokens, from a tokenizer, its `encode`, or a function that returns the number itself."""
    call: Callable[[str], Any] = getattr(encode, "encode", encode)

    def count(text: str) -> int:
        result = call(text)
        return int(result) if isinstance(result, (int, np.integer)) else len(result)

    return count


def generator(*key: int) -> np.random.Generator:
    """Return a generator of random numbers that depend only on these integers."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def plain(body: str) -> str:
    """Apply the template of a base model: the answer's opening words start a new line."""
    return body + "\n"


def fit_samples(
    form: Form,
    encode: Encode,
    budget: int,
    keys: Sequence[tuple[int, ...]],
    shared: tuple[int, ...],
    template: Callable[[str], str] | None = None,
) -> list[Sample]:
    """Return a sample for each key of random numbers.  The size that suits the first is tried first for the others.

    A sample depends on its own key, `shared`, the budget, the tokenizer and the first sample's size; not on how many there are.

    Raises:
      UserError: the budget is too small for a task at its least size.
    """
    count = counter(encode)
    fits = [_Fit(form, count, template or plain, key, shared) for key in keys]
    plans = form.plans(budget, count)
    size, samples = None, []
    for fit in fits:
        fitted = fit.sample(budget, plans, size)
        if fitted is None:
            raise UserError(
                f"task={form.task!r}: budget={budget:,} tokens is too small; give at least {_least(fits, budget):,}"
            )
        sample, used = fitted
        size = used if size is None else size
        samples.append(sample)
    return samples


class _Fit:
    """Search for the size of one sample."""

    def __init__(self, form: Form, count, template, key: tuple[int, ...], shared: tuple[int, ...]):
        self.form, self.count, self.template, self.key, self.shared = form, count, template, key, shared

    def draft(self, size: int, plan) -> tuple[Draft, str]:
        draft = self.form.build(generator(0, *self.key), generator(1, *self.shared), size, plan)
        return draft, self.template(draft.body) + draft.prefix

    def need(self, size: int, plan) -> int:
        """Return the tokens of prompt and answer."""
        return self.count(self.draft(size, plan)[1]) + self.form.answer_tokens

    def least(self, budget: int) -> int:
        """Return the tokens of the smallest setting for this budget."""
        return min(self.need(self.form.least, plan) for plan in self.form.plans(budget, self.count))

    def sample(self, budget: int, plans: list[Any], guess: int | None) -> tuple[Sample, int] | None:
        """Return the sample and its size, or None where the budget is too small.  `guess` is tried before the search."""
        form = self.form
        fitting = [plan for plan in plans if self.need(form.least, plan) <= budget]
        if not fitting:
            return None
        plan = fitting[0]
        need = cache(lambda size: self.need(size, plan))
        size = form.least if guess is None else guess
        if not FULL * budget <= need(size) <= budget:
            # a unit is worth more than an eighth of a token; if not, the search must end all the same
            most = min(form.most, form.least + 8 * budget)
            size = largest(lambda size: need(size) <= budget, size, form.least, most)
        draft, prompt = self.draft(size, plan)
        tokens = need(size) - form.answer_tokens
        references, depths = draft.references, draft.depths
        asked = prompt.rindex(draft.question)
        return Sample(
            form.task, prompt, references, form.answer_tokens, form.match, budget, tokens, depths, asked
        ), size


def largest(fits: Callable[[int], bool], start: int, low: int, high: int) -> int:
    """Return a size in low..high that fits while the next one does not; the largest of all where larger sizes never fit better.

    `low` is known to fit.  Strides from `start` double, then halve: at most 2 log2(high - low) + 4 calls.
    """
    good, bad, step = low, high + 1, 1
    size = min(max(start, low), high)
    if size == low or fits(size):
        good = size
        while good < high:
            size = min(good + step, high)
            if not fits(size):
                bad = size
                break
            good, step = size, 2 * step
    else:
        bad = size
        while bad > low + 1:
            size = max(bad - step, low)
            if size == low or fits(size):
                good = size
                break
            bad, step = size, 2 * step
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _least(fits: list[_Fit], budget: int) -> int:
    """Return a budget that every sample fits in.  Settings depend on the budget, so the answer is tried again."""
    least = budget
    for _ in range(8):
        again = max(fit.least(least) for fit in fits)
        if again <= least:
            break
        least = again
    return least
