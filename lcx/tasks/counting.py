"""RULER's aggregation tasks: the words that occur most often in a list."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass

from lcx.tasks.sizing import Draft, Form
from lcx.tasks.words import distinct_words, word_pools

CWE_ANSWER_TOKENS, FWE_ANSWER_TOKENS = 120, 50
NUM_COMMON = 10
LONG = 4_096  # tokens: from here on words are repeated as often as in RULER
ZETA_2 = math.pi**2 / 6
DOTS = "..."


@dataclass(frozen=True)
class Counts:
    """Words of a list: `num_common` words `common` times each, the others `rare` times each."""

    num_common: int
    common: int
    rare: int


@dataclass(frozen=True)
class CwePlan:
    """List of words, and the worked example before it with `num_others` uncommon words."""

    counts: Counts
    example: Counts
    num_others: int


# RULER's two settings each, then smaller ones for budgets that these do not fit
LARGE_EXAMPLE, SMALL_EXAMPLE, LEAST_EXAMPLE = (Counts(10, 10, 3), 30), (Counts(10, 3, 1), 10), (Counts(3, 2, 1), 3)
CWE_LONG = [CwePlan(Counts(NUM_COMMON, 30, 3), *example) for example in (LARGE_EXAMPLE, SMALL_EXAMPLE)]
CWE_SHORT = [CwePlan(Counts(NUM_COMMON, 6, 1), *example) for example in (SMALL_EXAMPLE, LEAST_EXAMPLE)]
CWE_LEAST = [CwePlan(Counts(NUM_COMMON, 3, 1), *LEAST_EXAMPLE)]
NUMBER_WORDS = {3: "three", NUM_COMMON: "ten"}


def _list_question(order, words: list[str], counts: Counts) -> tuple[str, str]:
    """Return (list and question, answer prefix); the first words are the common ones."""
    common, others = words[: counts.num_common], words[counts.num_common :]
    items = common * counts.common + others * counts.rare
    items = [items[i] for i in order.permutation(len(items))]
    numbered = " ".join(f"{i + 1}. {word}" for i, word in enumerate(items))
    number = NUMBER_WORDS[counts.num_common]
    body = (
        "Below is a numbered list of words. Some of them occur more often than the others; memorize those.\n"
        f"{numbered}\nQuestion: Which {number} words occur most often in the list above?"
    )
    return body, f"Answer: The {number} words that occur most often in the list are:"


def _cwe(rng, shared, size, plan: CwePlan) -> Draft:
    in_example = plan.example.num_common + plan.num_others
    words = distinct_words(rng, in_example + NUM_COMMON + size)
    worked, words = words[:in_example], words[in_example:]
    example, prefix = _list_question(shared, worked, plan.example)
    answer = " ".join(f"{i + 1}. {word}" for i, word in enumerate(worked[: plan.example.num_common]))
    body, last = _list_question(shared, words, plan.counts)
    question = body[body.rindex("Question:") :]
    return Draft(f"{example}\n{prefix} {answer}\n\n{body}", last, tuple(words[:NUM_COMMON]), question=question)


def cwe(name: str) -> Form:
    """Build common words: ten words 30 times, the others 3 times (6 and 1 below 4,096 tokens).  Unit of size: uncommon words.

    A worked example comes first, of other words than the list: 40 words 10 and 3 times (20 words, 3 and 1 times, below 4,096
    tokens), ten of them common.  Where list and example do not fit with ten uncommon words, these are tried in turn: at 4,096 and above
    the small example, then the settings below 4,096; then an example of six words, three of them twice; then the list with
    3 and 1 occurrences.  The shuffle is the same in all samples of one size.
    """

    def plans(budget: int, count) -> list[CwePlan]:
        return [*(CWE_LONG if budget >= LONG else []), *CWE_SHORT, *CWE_LEAST]

    most = len(word_pools()[-1]) - NUM_COMMON - sum((LARGE_EXAMPLE[0].num_common, LARGE_EXAMPLE[1]))
    return Form(name, CWE_ANSWER_TOKENS, "all", _cwe, NUM_COMMON, most, plans)


def _fwe(rng, shared, size, vocabulary: int) -> Draft:
    letters = string.ascii_lowercase
    coded: dict[str, None] = {}
    while len(coded) < vocabulary:
        coded["".join(letters[i] for i in rng.integers(0, 26, 6))] = None
    words = [DOTS, *list(coded)[1:]]
    times = [math.floor(size / (ZETA_2 * rank**2)) for rank in range(1, vocabulary + 1)]
    items = [word for word, n in zip(words, times, strict=True) for _ in range(n)]
    text = " ".join(items[i] for i in rng.permutation(len(items)))
    question = "Question: Which three coded words occur most often in the text above?"
    body = (
        "Below is a text in coded words. Memorize which of them occur most often, and ignore the dots.\n"
        f"{text}\n{question}"
    )
    prefix = "Answer: The three coded words that occur most often are:"
    return Draft(body, prefix, tuple(words[1:4]), question=question)


def fwe(name: str) -> Form:
    """Build frequent words: coded words of six letters, the word of rank r floor(n r^-2 / zeta(2)) times, rank 1 written as dots.

    The answer is ranks 2, 3, 4.  The vocabulary is (budget - 50) / 50 words, at least 5.  Unit of size: n; at least 74, from where on
    rank 4 is above rank 5.
    """
    return Form(name, FWE_ANSWER_TOKENS, "all", _fwe, 74, 1 << 30, lambda budget, count: [max(5, (budget - 50) // 50)])
