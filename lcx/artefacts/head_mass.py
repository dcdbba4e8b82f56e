"""Attention mass that every KV head gives to the tokens a streaming head forgets, and the head split that follows from it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lcx import checks, texts
from lcx.artefacts.head_split import sizes_of
from lcx.axes import KeepAll
from lcx.errors import NotFinite, UserError
from lcx.measure.finite import first_not_finite
from lcx.models.decoder import Layers, Model
from lcx.models.loading import Pretrained, tensors_sha256
from lcx.ops.attention import merge
from lcx.ops.masks import Far, both
from lcx.policies.sink_window import SinkWindow
from lcx.recipe import Recipe, Segment
from lcx.schedules.chunked import Chunked
from lcx.session import Session

_SHARE = (
    "share of the attention that falls outside the first `sink` and the last `window` tokens, mean over the query heads of the "
    "GQA group"
)
METHOD = f"{_SHARE} and over the queries from position sink + window on; stands in for trained gates"
REPEATED = f"{_SHARE} and over the queries of the later copies of a repeated passage; stands in for trained gates"


@dataclass(frozen=True)
class FarMass(KeepAll):
    """Policy that keeps every token and notes which share of its attention fell outside sink + window.

    Args:
      sink: first tokens, >= 0.
      window: most recent tokens, the query's own included, >= 1.
    """

    sink: int
    window: int

    needs = frozenset({"all attention"})
    state = {"far": jnp.float32}

    def edit(self, ctx, held, new):
        slots, edit, handed = super().edit(ctx, held, new)
        far = both(Far(self.window, self.sink), ctx.mask)
        parts = [ctx.attend(source, far) for source in (held.source, ctx.own)]
        # a sum of exponentials over another is a share; padding saw nothing, and -inf minus -inf is nan
        share = jnp.exp(merge(parts).lse - jnp.where(jnp.isneginf(ctx.lse), 0.0, ctx.lse))
        return slots, replace(edit, tokens=replace(new, state={"far": share.mean(2)})), handed


def far_mass(
    model: Model | Layers, tokens, sink: int, window: int, chunk: int = 512, first: int | None = None
) -> np.ndarray:
    """Share of the attention that falls outside sink + window, for every KV head.

    Mean over the query heads of the group and over the queries from position `first` on.

    Args:
      model: attends densely.
      tokens: int [T], T above sink + window.
      sink, window: as in `SinkWindow`.
      chunk: tokens a step; memory, not the result, depends on it.
      first: position of the first query that counts; None: sink + window, as those before have nothing outside.

    Returns:
      float32 [L,K], 0 to 1.

    Raises:
      UserError: a size out of range, or a text that is too short; NotFinite: logits that are not finite, with layer and step.
    """
    near = SinkWindow(sink, window).budget
    first = near if first is None else first
    if len(tokens) <= near:
        raise UserError(f"tokens={len(tokens)} must be above sink + window = {near}: nothing lies outside")
    if not near <= first < len(tokens):
        raise UserError(f"first={first} must be from sink + window = {near} to {len(tokens) - 1}, the last token")
    recipe = Recipe((Segment(policy=FarMass(sink, window)),))
    session = Session(model, recipe, len(tokens), schedule=Chunked(min(chunk, len(tokens))), check_finite=False)
    if not np.isfinite(np.asarray(session.prefill(tokens))).all():
        raise NotFinite(
            f"attention of {len(tokens)} tokens: {first_not_finite(session, lambda: session.prefill(tokens))}"
        )
    shares = []
    for layer in session.cache:
        assert layer is not None  # noqa: S101, prefill fills every layer
        late = np.asarray(layer["all"].pos)[0, 0] >= first
        shares.append(np.asarray(layer["all"].state["far"])[0][:, late].mean(-1))
    return np.stack(shares)


def calibrate(
    model: Pretrained, text: str, tokens: int, sink: int, window: int, start: int = 0, copies: int = 2
) -> dict[str, Any]:
    """Return the scores of a model's KV heads on a shipped text with their origin: the record that `HeadSplit` reads.

    A passage is read `copies` times in a row, and the queries of the later copies count: a retrieval head looks back at the copy before.
    On plain text, copies=1, most far attention does not retrieve, and the heads with much of it copy no better than random ones.

    Args:
      model: attends densely.
      text: a name of `lcx.texts`.
      tokens: tokens of the passage, bos in front included where the model has it.
      sink, window: as in `SinkWindow`.
      start: token of the text at which the passage begins.
      copies: times that the passage is read, >= 1.

    Raises:
      UserError: no such text, a number out of range, or fewer tokens in the text or in the model's context.
    """
    config, front = model.config, model.tokenizer.front
    start, copies = checks.whole("start", start, 0), checks.whole("copies", copies, 1)
    ids = model.tokenizer.encode(texts.read(text))[start:]
    most = min(len(ids), (config.context - len(front)) // copies) + len(front)
    if checks.whole("tokens", tokens, 1) > most:
        raise UserError(
            f"tokens={tokens}, start={start}, copies={copies}; text {text!r} and the context of {model.name} allow tokens from 1 to {most}"
        )
    if tokens <= (near := SinkWindow(sink, window).budget):
        raise UserError(f"tokens={tokens} must be above sink + window = {near}: nothing lies outside")
    passage = ids[: tokens - len(front)]
    scores = far_mass(model.layers, [*front, *passage * copies], sink, window, first=tokens if copies > 1 else None)
    flags = {"model": model.name, "text": text, "tokens": tokens, "start": start, "copies": copies}
    flags |= {"sink": sink, "window": window}
    return {
        "model": model.name,
        "config_name": config.name,
        "sizes": sizes_of(config),
        "model_sha256": model.sha256,
        "tensors_sha256": {dtype: tensors_sha256(model.layers, dtype) for dtype in ("float32", "bfloat16")},
        "method": METHOD if copies == 1 else REPEATED,
        "paper": "https://arxiv.org/abs/2410.10819",
        "text": text,
        "text_sha256": texts.TEXTS[text].sha256,
        "tokens": tokens,
        "start": start,
        "copies": copies,
        "sink": sink,
        "window": window,
        "command": " ".join(["python -m experiments.calibrate", *(f"--{n}={v}" for n, v in flags.items())]),
        "scores": [[round(float(x), 6) for x in row] for row in scores],
    }


def write(record: dict[str, Any], path: str | Path) -> None:
    """Write the record as JSON, one layer of scores a line.

    Raises:
      UserError: the file cannot be written.
    """
    rows = ",\n".join(f"    {json.dumps(row)}" for row in record["scores"])
    lines = [f"  {json.dumps(n)}: {json.dumps(v)}" for n, v in record.items() if n != "scores"]
    lines.append(f'  "scores": [\n{rows}\n  ]')
    try:
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"out={str(path)!r} cannot be written: {error.strerror}") from None
