"""Quality figures of a row that --tasks requests, each at the point's length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lcx import tasks, texts
from lcx.errors import UserError
from lcx.measure.task_scores import encoder, long_perplexity, mean_scores, run_samples, sliding_perplexity
from lcx.models.loading import Pretrained
from lcx.sweep.points import Point
from lcx.tasks.sample import SEEN

DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)  # percent, of the needle grid
OF_THE_TEXT = ("ppl", "longppl")  # the others make their own text
PPL_WINDOWS = 4  # half-overlapping windows of the sliding perplexity


def task_scores(model: Pretrained, point: Point, known: dict[str, Any]) -> dict[str, Any]:
    """Return name of the task -> its figures: scores are 0 to 100, perplexities exp(nats).

    A task that cannot be made for the point, such as a prompt that does not fit the length, says why: {"message": ...}.  The point has
    its other figures all the same.

    Args:
      model, point: as in the sweep.
      known: figures of tasks that do not read the point's text, from a point with another text; this point's are added.
    """
    figures: dict[str, Any] = {}
    for name in point.settings.tasks:
        for title, make in _makers(model, point, name):
            try:
                figures[title] = known[title] if title in known else make()
            except UserError as error:
                figures[title] = {"message": str(error)}
            if name not in OF_THE_TEXT:
                known[title] = figures[title]
    return figures


def _makers(model: Pretrained, point: Point, name: str) -> list[tuple[str, Callable[[], Any]]]:
    """Return (title, what makes its figures): one for each way to ask a question, where the task asks one."""
    if name in OF_THE_TEXT:
        return [(name, lambda: {"ppl": _ppl, "longppl": _longppl}[name](model, point))]
    make = {"ruler": _ruler, "needle": _needle, "passkey": _passkey}.get(name) or partial(_local, path=name)
    title = Path(name).stem
    return [
        (title if question == SEEN else f"{title}, question {question}", partial(make, model, point, question))
        for question in point.settings.questions
    ]


def _run(model: Pretrained, point: Point, samples, question: str):
    return run_samples(
        model,
        point.experiment,
        samples,
        batch=point.batch,
        allow_extrapolation=point.settings.allow_extrapolation,
        question=question,
        keep_ratio=point.keep_ratio,
    )


def _local(model: Pretrained, point: Point, question: str, path: str) -> dict[str, Any]:
    """Return the scores of a file's samples, of each task in it, and their mean."""
    samples, cuts = tasks.local_samples(tasks.load(path), encoder(model), point.length)
    results = _run(model, point, samples, question)
    by_task = {task: score for (task, _), score in mean_scores(results).items()}
    mean = float(np.mean([result.score for result in results]))
    return {"samples": len(samples), "cut": cuts, "mean": mean, **(by_task if len(by_task) > 1 else {})}


def _ruler(model: Pretrained, point: Point, question: str) -> dict[str, Any]:
    """Return the scores of RULER's 13 tasks with `samples` prompts each, and their mean."""
    encode, scores = encoder(model), {}
    for name in tasks.RULER:
        samples = tasks.generate(name, encode, point.length, point.settings.samples, seed=42 + point.seed)
        scores |= {task: score for (task, _), score in mean_scores(_run(model, point, samples, question)).items()}
    return {"samples": point.settings.samples, "mean": float(np.mean(list(scores.values()))), **scores}


def _needle(model: Pretrained, point: Point, question: str) -> dict[str, Any]:
    """Return one row of the needle grid: a value in prose at each of DEPTHS, the mean over `samples` needles."""
    cells = []
    for seed in range(point.settings.samples):
        samples = tasks.needle_grid(encoder(model), [point.length], DEPTHS, seed=42 + point.seed + seed)
        cells.append([result.score for result in _run(model, point, samples, question)])
    return {"lengths": [point.length], "depths": list(DEPTHS), "scores": [np.mean(cells, 0).tolist()]}


def _passkey(model: Pretrained, point: Point, question: str) -> float:
    positions = min(5, point.settings.samples)
    keys = -(-point.settings.samples // positions)
    samples = tasks.passkey(encoder(model), point.length, positions=positions, keys=keys, seed=42 + point.seed)
    return float(np.mean([result.score for result in _run(model, point, samples, question)]))


def _ids(model: Pretrained, point: Point, count: int) -> np.ndarray:
    ids = model.tokenizer.text_ids(texts.load(point.settings.text)[0])
    return np.asarray(ids[:count], np.int32)


def _ppl(model: Pretrained, point: Point) -> float:
    """Return the perplexity by sliding windows of the point's length, half of it apart."""
    stride = max(1, point.length // 2)
    ids = _ids(model, point, point.length + (PPL_WINDOWS - 1) * stride)
    return sliding_perplexity(model, point.experiment, ids, point.length, stride).perplexity


def _longppl(model: Pretrained, point: Point) -> float:
    """Return LongPPL of a text of the point's length; the short context is half of it, at most the paper's 4,096 tokens."""
    short = min(4_096, point.length // 2)
    return long_perplexity(model, point.experiment, _ids(model, point, point.length), short=short, step=short // 4)
