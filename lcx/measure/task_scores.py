"""Tasks and windowed perplexity on a loaded model under a method: greedy answers with their scores, sliding windows, LongPPL."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lcx import checks
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.measure.quality import make_session, score_text, token_nll
from lcx.models.loading import Pretrained
from lcx.ops.attention import EMPTY
from lcx.recipe import Recipe
from lcx.session import Session
from lcx.tasks import Sample, Window, longppl, longppl_keys, longppl_windows, score, sliding_windows
from lcx.tasks.sample import QUESTIONS, SEEN, UNSEEN

STEP = 32  # widths of questions are multiples, so that few programs serve many


@dataclass(frozen=True)
class TaskResult:
    """Output of a sample under a method.

    Attributes:
      sample: the prompt and its references.
      output: text of the generated tokens, at most `sample.answer_tokens`.
      score: 0 to 100.
      ids: the generated tokens, a stop token included.
    """

    sample: Sample
    output: str
    score: float
    ids: tuple[int, ...]


def encoder(model: Pretrained) -> Callable[[str], list[int]]:
    """Return a function from text to the ids that `run_samples` feeds, with bos where the model expects one.  For `tasks.generate`."""
    return model.tokenizer.text_ids


def run_samples(
    model: Pretrained,
    experiment: Experiment,
    samples: Sequence[Sample],
    *,
    batch: int = 1,
    encode: Callable[[str], list[int]] | None = None,
    stop_at_newline: bool = False,
    allow_extrapolation: bool = False,
    question: str = SEEN,
    keep_ratio: float | None = None,
) -> list[TaskResult]:
    """Return the greedy answers of a model under a method, in the order of the samples.

    Samples of one budget share the shape of their session, and so its programs: prompts are padded on the right.  Each gets at most its
    `answer_tokens`.

    Args:
      model: as `lcx.load` gives it.
      experiment: recipe, arrays and schedule.
      samples: of `lcx.tasks`, made with `encoder(model)`.
      batch: prompts side by side; the last batch is filled up with its first prompt.
      encode: text -> ids, where the samples were made with another one, for example one that parses a chat template's special tokens.
      stop_at_newline: end an answer at the first newline after a text, besides at the model's stop tokens.
      allow_extrapolation: let budgets exceed the model's context.
      question: "seen" while the prompt is compressed, as it is part of it; "unseen": the prompt ends where the question begins, and the
        question follows in one step, so that a method cannot choose by it what to keep.
      keep_ratio: sets the method's budget, where it has one, as a fraction of each prompt that is really read; samples then run one by
        one.  None: the experiment's own.

    Raises:
      UserError: a sample with more tokens than its budget, a budget beyond the model's context, or a recipe that does not suit.
    """
    if batch < 1:
        raise UserError(f"batch={batch} must be at least 1")
    checks.one_of("question", question, QUESTIONS)
    encode = encode or encoder(model)
    if question == UNSEEN:
        for sample in samples:
            if sample.question_at is None:
                raise UserError(
                    f"task={sample.task!r}: question='unseen' needs samples that say where their question begins"
                )
    shared = keep_ratio is None or not experiment.recipe.has_budget
    if not shared:
        batch = 1
    groups: dict[int, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        model.check_length(sample.budget, allow_extrapolation)
        groups[sample.budget].append(i)
    results: dict[int, TaskResult] = {}
    for budget, members in groups.items():
        caps = [samples[i].answer_tokens for i in members]
        prompts_of = {i: _ids(encode, samples[i]) for i in members}
        asked = {i: _question(model, samples[i]) if question == UNSEEN else [] for i in members}
        if question == UNSEEN:
            prompts_of = {i: encode(samples[i].prompt[: samples[i].question_at]) for i in members}
        width = -(-max(map(len, asked.values())) // STEP) * STEP
        prompt, new_tokens = budget - min(caps), max(caps) + width
        for start in range(0, len(members), batch):
            rows = members[start : start + batch]
            filled = rows + rows[:1] * (batch - len(rows))
            prompts = [prompts_of[i] for i in filled]
            method = experiment if shared else experiment.with_budget(len(prompts[0]), keep_ratio=keep_ratio)
            answers = [_Answer(model, samples[i].answer_tokens, stop_at_newline) for i in rows]
            session = make_session(model.layers, method, prompt, new_tokens, batch)
            _answer(model, session, prompts, [asked[i] for i in filled], width, answers)
            for i, answer in zip(rows, answers, strict=True):
                text = answer.text()
                results[i] = TaskResult(samples[i], text, score(samples[i], text), tuple(answer.ids))
    return [results[i] for i in range(len(samples))]


def mean_scores(results: Iterable[TaskResult]) -> dict[tuple[str, int], float]:
    """Return (task, budget) -> mean score, 0 to 100."""
    by_task: dict[tuple[str, int], list[float]] = defaultdict(list)
    for result in results:
        by_task[result.sample.task, result.sample.budget].append(result.score)
    return {key: float(np.mean(scores)) for key, scores in by_task.items()}


def _ids(encode: Callable[[str], list[int]], sample: Sample) -> list[int]:
    ids = encode(sample.prompt)
    if len(ids) + sample.answer_tokens > sample.budget:
        raise UserError(
            f"task={sample.task!r}: prompt of {len(ids):,} tokens and {sample.answer_tokens} of the answer exceed "
            f"budget={sample.budget:,}; make samples with encoder(model)"
        )
    return ids


class _Answer:
    """Tokens of one answer, and whether it has ended."""

    def __init__(self, model: Pretrained, cap: int, stop_at_newline: bool):
        self.tokenizer, self.cap, self.stop_at_newline = model.tokenizer, cap, stop_at_newline
        self.ids: list[int] = []
        self.ended = False

    def text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special=True)

    def add(self, token: int) -> None:
        if self.ended:
            return
        self.ids.append(token)
        newline = self.stop_at_newline and "\n" in self.text().lstrip()
        self.ended = newline or token in self.tokenizer.stop_ids or len(self.ids) == self.cap


def _question(model: Pretrained, sample: Sample) -> list[int]:
    """Return the tokens from the question on, answer prefix included."""
    return model.tokenizer.encode(sample.prompt[sample.question_at :])


def _answer(
    model: Pretrained,
    session: Session,
    prompts: list[list[int]],
    questions: list[list[int]],
    width: int,
    answers: list[_Answer],
) -> None:
    """Feed the prompts, then the questions in a step of `width` tokens, and add greedy tokens until every answer has ended.

    Rows past the answers fill the batch.  Questions that are empty, `width` 0, are part of the prompts.
    """
    tokens = np.zeros((session.batch, session.prompt), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    logits = session.prefill(tokens, [len(ids) for ids in prompts])
    if width:
        tokens = np.zeros((session.batch, width), np.int32)
        pos = np.full(tokens.shape, EMPTY, np.int32)
        for row, (ids, place) in enumerate(zip(questions, session.next_pos, strict=True)):
            tokens[row, : len(ids)] = ids
            pos[row, : len(ids)] = place + np.arange(len(ids))
        x = session.feed(tokens, pos)
        ends = np.array([len(ids) - 1 for ids in questions])
        logits = model.layers.logits(x[np.arange(session.batch), ends])
    while True:
        best = model.choose(logits)
        for answer, token in zip(answers, best, strict=False):
            answer.add(int(token))
        if all(answer.ended for answer in answers):
            return
        # rows that have ended go on and are ignored
        logits = session.step(best[:, None])


@dataclass(frozen=True)
class WindowScore:
    """Negative log likelihood by windows.

    Attributes:
      nll: float32 [N] in nats, at the token's own index; nan where the window has no token before it to predict from.
      perplexity: exp of the mean over tokens that have one.
    """

    nll: np.ndarray
    perplexity: float


def window_nll(model: Pretrained, experiment: Experiment, ids, windows: Sequence[Window]) -> np.ndarray:
    """Return -log p of each token that counts, under its own window: float32 [N], nan elsewhere.

    Each window is one prefill under the experiment's schedule: methods that forget do so between chunks, not inside a step.  All windows
    have one shape, the last is padded.  Where the model was trained with a bos token and `ids` starts with it, it takes the place of each
    later window's first token.
    """
    ids = np.asarray(ids, np.int32)
    nll = np.full(len(ids), np.nan, np.float32)
    width = max((window.stop - window.start for window in windows), default=0)
    front = model.tokenizer.front
    bos = ids[0] if [ids[0]] == front else None
    for window in windows:
        first = max(window.first, window.start + 1)  # nothing comes before the first
        if first >= window.stop:
            continue
        tokens = np.zeros((1, width), np.int32)
        length = window.stop - window.start
        tokens[0, :length] = ids[window.start : window.stop]
        if bos is not None:
            tokens[0, 0] = bos
        x = make_session(model.layers, experiment, width).prefill(tokens, [length], rows="all")[0]
        before = x[first - 1 - window.start : length - 1]
        nll[first : window.stop] = token_nll(model.layers, before, ids[first : window.stop])
    return nll


def sliding_perplexity(model: Pretrained, experiment: Experiment, ids, max_len: int, stride: int) -> WindowScore:
    """Return the perplexity of one document by sliding windows, weighted by token.  Fact sheet, section 5.

    Token 0 has no prediction and is left out; so is the first of each window where stride = max_len.

    Args:
      model, experiment: as in `run_samples`.
      ids: int [N], N >= 2, a bos token in front where the model wants one.
      max_len: tokens of a window, >= 2.
      stride: 1 to max_len.

    Raises:
      UserError: a number out of range.
    """
    if len(ids) < 2 or max_len < 2:
        raise UserError(
            f"num_tokens={len(ids)} and max_len={max_len} must be at least 2: a first token is not predicted"
        )
    nll = window_nll(model, experiment, ids, sliding_windows(len(ids), max_len, stride))
    return WindowScore(nll, float(np.exp(np.nanmean(nll, dtype=np.float64))))


def long_nll(model: Pretrained, experiment: Experiment, ids) -> np.ndarray:
    """Return -log p of each token after all before it: float32 [N], nan at token 0."""
    return np.concatenate([np.full(1, np.nan, np.float32), score_text(model.layers, experiment, ids).nll])


def long_keys(
    model: Pretrained, ids, *, short: int = 4_096, step: int = 1_024, alpha: float = 2.0, beta: float = 2.0
) -> np.ndarray:
    """Return LongPPL's key tokens of a text, with this model under dense attention as the evaluator: bool [N].

    Args:
      ids: int [N]; the first `short` tokens are never key.
      short: least tokens of the short context.
      step: tokens scored by one short context.
      alpha, beta: nats, see `tasks.longppl_keys`.
    """
    dense = Experiment(Recipe())
    nll_short = window_nll(model, dense, ids, longppl_windows(len(ids), short, step))
    return longppl_keys(nll_short, long_nll(model, dense, ids), alpha, beta)


def long_perplexity(
    model: Pretrained, experiment: Experiment, ids, keys: np.ndarray | None = None, **settings
) -> float:
    """Return the LongPPL of a method: exp of its mean NLL over key tokens, each predicted from all tokens before it.

    LongPPL, arXiv:2410.23771.  Differs: the evaluator is the same model under dense attention, where the paper takes a stronger model.

    Args:
      model, experiment: as in `run_samples`; the text is read in one pass under the experiment's schedule.
      ids: int [N], N above `short`.
      keys: bool [N], from `long_keys`, to be found once for several methods; None: found here.
      settings: of `long_keys`.

    Raises:
      UserError: a number out of range, or no token is key.
    """
    keys = long_keys(model, ids, **settings) if keys is None else keys
    return longppl(long_nll(model, experiment, ids), keys)
