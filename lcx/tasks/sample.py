"""Prompts with their references, the scoring of outputs, and the figures over lengths that RULER reports."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

SEEN, UNSEEN = QUESTIONS = ("seen", "unseen")  # whether a method sees the question while it compresses
EFFECTIVE_THRESHOLD = 85.6  # RULER's: Llama-2-7B at 4K


@dataclass(frozen=True)
class Sample:
    """Prompt with the references that its output is scored against.

    Attributes:
      task: name.
      prompt: the whole text given to the model, answer prefix included; a model's bos token is not in it.
      references: strings looked for in the output.
      answer_tokens: most tokens that the model may generate.
      match: how `score` compares: "all", "any", "first_integer", "token", "f1" or "rouge_l".
      budget: tokens of prompt and answer together, at most.
      prompt_tokens: tokens of the prompt as the given tokenizer counts them; prompt_tokens + answer_tokens <= budget.
      depths: where the needles were asked to lie, 0 to 100 percent of the context, in the order of the text; () where none.
      question_at: character of the prompt at which the question begins, for prompts whose context is compressed before it is asked; None:
        context and question cannot be told apart.
    """

    task: str
    prompt: str
    references: tuple[str, ...]
    answer_tokens: int
    match: str
    budget: int
    prompt_tokens: int
    depths: tuple[float, ...] = ()
    question_at: int | None = None


def score(sample: Sample, output: str) -> float:
    """Return the score of an output, 0 to 100.  Case does not matter; control characters count as newlines.

    "all": share of the references that are substrings of the output; "any": 100 if one of them is (RULER, section 1 of the fact sheet).
    "first_integer": 100 if the first run of digits is the reference (passkey); "token": 100 if a reference is a word of the output
    after punctuation other than hyphens became spaces (key-value retrieval; section 2).  "f1": of the words of output and reference as
    SQuAD counts them (arXiv:1606.05250: case, punctuation and articles left out), the best reference; "rouge_l": F1 of their longest
    common subsequence of words (Lin 2004, beta 1, no stemming), the best reference.  LongBench takes these two for questions and summaries.

    The caller caps the output at `answer_tokens`: a model that echoes its prompt would score 100.
    """
    text = re.sub(r"[\x00-\x1f\x7f]", "\n", output).lower()
    references = [reference.lower() for reference in sample.references]
    if sample.match == "first_integer":
        number = re.search(r"[0-9]+", text)
        return 100.0 * (number is not None and number.group() in references)
    if sample.match == "token":
        text = re.sub(r"[^\w\s-]", " ", text)
        return 100.0 * any(reference in text.split() for reference in references)
    if sample.match in ("f1", "rouge_l"):
        common = _common_words if sample.match == "f1" else _common_sequence
        split = _squad_words if sample.match == "f1" else lambda t: re.findall(r"\w+", t)
        return 100.0 * max(_f1(split(text), split(reference), common) for reference in references)
    hits = [reference in text for reference in references]
    return 100.0 * (any(hits) if sample.match == "any" else sum(hits) / len(hits))


def _squad_words(text: str) -> list[str]:
    text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    return [word for word in text.split() if word not in ("a", "an", "the")]


def _common_words(a: list[str], b: list[str]) -> int:
    return (Counter(a) & Counter(b)).total()


def _common_sequence(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        above = row
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1]


def _f1(output: list[str], reference: list[str], common: Callable[[list[str], list[str]], int]) -> float:
    if not output or not reference:
        return float(output == reference)
    return 2.0 * common(output, reference) / (len(output) + len(reference))


def effective_length(means: Mapping[int, float], threshold: float = EFFECTIVE_THRESHOLD) -> int:
    """Return the largest length whose mean score is at least `threshold`, 0 if there is none.  RULER, section 1.

    Args:
      means: length in tokens -> mean score of the tasks, 0 to 100.
    """
    return max((length for length, mean in means.items() if mean >= threshold), default=0)


def weighted_means(means: Mapping[int, float]) -> tuple[float, float]:
    """Return (mean with weights 1..n rising with length, mean with weights n..1 falling), 0 to 100.  RULER, section 1.

    Args:
      means: length in tokens -> mean score of the tasks, at least one.
    """
    values = np.array([means[length] for length in sorted(means)], np.float64)
    weights = np.arange(1, len(values) + 1)
    return float(np.average(values, weights=weights)), float(np.average(values, weights=weights[::-1]))
