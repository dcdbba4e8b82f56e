"""Tasks from a file of one's own: JSON Lines of {context, question, answers}."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcx.errors import UserError
from lcx.tasks.sample import Sample
from lcx.tasks.sizing import Encode, counter, largest

SUFFIX = ".jsonl"
QUESTION = "\n\nQuestion: {question}\nAnswer:"  # after the context
CUT = "\n...\n"  # where the middle of a context that is too long was
FIELDS = ("context", "question", "answers", "task", "match", "answer_tokens")
ANSWER_TOKENS = 32
LOCAL_MATCHES = ("any", "all", "f1", "rouge_l")  # of `tasks.score`, those that make sense for any text


@dataclass(frozen=True)
class Record:
    """A line of the file.

    Attributes:
      context: the text that is compressed.
      question: asked after it.
      answers: references, at least one.
      task: name under which scores are averaged.
      match: how an output is scored, of LOCAL_MATCHES.
      answer_tokens: most tokens of the answer.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    task: str
    match: str = "any"
    answer_tokens: int = ANSWER_TOKENS


def load(path: str | Path) -> list[Record]:
    """Return the records of a file.

    Raises:
      UserError: the file cannot be read, is empty, or has a line that is not a record; names the line and what is wrong in it.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tasks={str(path)!r}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    records = [
        _record(line, f"tasks={str(path)!r}, line {n}", file.stem) for n, line in enumerate(lines, 1) if line.strip()
    ]
    if not records:
        raise UserError(
            f'tasks={str(path)!r} has no line; each is {{"context": ..., "question": ..., "answers": [...]}}'
        )
    return records


def sha256(path: str | Path) -> str:
    """Return the digest of a file that `load` reads."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"tasks={str(path)!r}: {error.strerror}") from None


def _record(line: str, where: str, stem: str) -> Record:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {str(error)[:80]}") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where} is a {type(entry).__name__}; allowed is an object with context, question and answers")
    unknown = [str(name) for name in entry if name not in FIELDS]
    if unknown:
        raise UserError(f"{where} has {unknown[0][:40]!r}; allowed are {', '.join(FIELDS)}")
    for name in FIELDS[:3]:
        if name not in entry:
            raise UserError(f"{where} has no {name!r}")
    for name in ("context", "question", "task"):
        value = entry.get(name, stem)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {name} must be a text that is not empty")
    answers = [entry["answers"]] if isinstance(entry["answers"], str) else entry["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise UserError(f"{where}: answers must be texts, at least one, none empty")
    match, most = entry.get("match", "any"), entry.get("answer_tokens", ANSWER_TOKENS)
    if match not in LOCAL_MATCHES:
        raise UserError(f"{where}: match={str(match)[:40]!r}; allowed are {', '.join(LOCAL_MATCHES)}")
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise UserError(f"{where}: answer_tokens={str(most)[:40]} must be a whole number of at least 1")
    return Record(entry["context"], entry["question"], tuple(answers), entry.get("task", stem), match, most)


def local_samples(
    records: Sequence[Record], encode: Encode, budget: int, template: Callable[[str], str] | None = None
) -> tuple[list[Sample], int]:
    """Return (samples, how many contexts were cut).

    A context that does not fit loses its middle, as in LongBench (arXiv:2308.14508, section 4.1); here the cut is between characters, and
    the question is always whole.

    Args:
      records: of `load`.
      encode: as in `tasks.generate`.
      budget: tokens of prompt and answer together.
      template: chat format around context and question; the answer prefix comes after it.  Default: none.

    Raises:
      UserError: a question and its answer that do not fit the budget.
    """
    count, samples, cuts = counter(encode), [], 0
    for record in records:
        question, prefix = QUESTION.replace("{question}", record.question).rsplit("\n", 1)

        def prompt(kept: int, record=record, question=question, prefix=prefix) -> str:
            text = record.context
            if kept < len(text):
                text = text[: kept - kept // 2] + CUT + text[len(text) - kept // 2 :]
            body = text + question
            return (body + "\n" if template is None else template(body)) + prefix

        def fits(kept: int, record=record, prompt=prompt) -> bool:
            return count(prompt(kept)) + record.answer_tokens <= budget

        kept = len(record.context)
        if not fits(kept):
            if not fits(1):
                raise UserError(
                    f"task={record.task!r}: a question and its answer take {count(prompt(1)) + record.answer_tokens:,} tokens, "
                    f"budget={budget:,}"
                )
            kept, cuts = largest(fits, min(kept - 1, 4 * budget), 1, kept - 1), cuts + 1
        text = prompt(kept)
        samples.append(
            Sample(
                record.task,
                text,
                record.answers,
                record.answer_tokens,
                record.match,
                budget,
                count(text),
                question_at=text.rindex(question),
            )
        )
    return samples, cuts
