"""Runs the points of a sweep in this process: memory, latency and quality of each from one prefill."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx import texts
from lcx.errors import UserError
from lcx.loading import Pretrained
from lcx.measure import memory
from lcx.measure.latency import device_name, summary, timed
from lcx.measure.quality import continue_session, divergence, make_session, token_nll
from lcx.sweep.points import Point
from lcx.sweep.store import Store

WARM_STEPS = 2  # decode steps before the timed ones

Row = dict[str, Any]


def measure(model: Pretrained, point: Point, ids: np.ndarray, dense_x: jax.Array | None) -> tuple[Row, jax.Array]:
    """One row, and the residual stream [M,E] of its continuation.

    Args:
      model: loaded in the point's type.
      point: what to run.
      ids: int32, at least length + 1 + decode_steps tokens of the text.
      dense_x: the continuation's residual stream under the reference, or None where this is the reference.
    """
    layers, experiment = model.layers, point.experiment
    reset = memory.reset_peak_rss()
    session = make_session(layers, experiment, point.prompt, point.new_tokens + WARM_STEPS)
    compiled = session.compile(point.prompt, [point.continuation, 1])
    _, ttft = timed(lambda: session.prefill(ids[: point.prompt]))
    cache_bytes = session.cache_bytes
    x, continuation_s = timed(lambda: continue_session(session, ids[: point.length + 1], point.prompt))
    nll = token_nll(layers, x, ids[point.prompt + 1 : point.length + 1])
    steps = [timed(lambda t=t: session.step([[t]]))[1] for t in ids[point.length :][: point.decode_steps + WARM_STEPS]]
    decode = summary(steps[WARM_STEPS:])
    kl, top1 = (0.0, 1.0) if dense_x is None else divergence(layers, dense_x, x)
    aux = experiment.load_aux(model.config)
    dtype = jnp.dtype(layers.dtype)
    bits = memory.bits_per_value(
        experiment.recipe, model.config, point.prompt, point.new_tokens + WARM_STEPS, aux=aux, dtype=dtype
    )
    weights = memory.weight_bytes(model.config, dtype)
    row = {
        "method": point.method,
        "length": point.length,
        "prompt": point.prompt,
        "status": "ok",
        "ttft_s": ttft,
        "prefill_tokens_per_s": point.prompt / ttft,
        "continuation_s": continuation_s,
        "decode_s": decode["median"],
        "decode_p90_s": decode["p90"],
        "decode_n": decode["n"],
        "compile_s": compiled.seconds,
        "programs": compiled.num_programs,
        "cache_bytes": cache_bytes,
        "recipe_bytes": experiment.recipe.bytes(
            model.config, point.prompt, point.new_tokens + WARM_STEPS, aux=aux, dtype=dtype
        ),
        "peak_cache_bytes": session.peak_cache_bytes,
        "bits_per_value": bits,
        "temp_bytes": compiled.temp_bytes,
        "peak_bytes": weights + session.peak_cache_bytes + compiled.extra_bytes,
        "peak_rss_bytes": memory.peak_rss_bytes(),
        "peak_rss_of": "point" if reset else "process",
        "nll": float(nll.mean(dtype=np.float64)),
        "kl": kl,
        "top1_agreement": top1,
        "device": device_name(),
    }
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            # JSON has no nan: null, and the status says so
            row[name], row["status"] = None, "nonfinite"
    return row, x


def run(
    model: Pretrained, points: list[Point], workdir: Path, on_row: Callable[[Point, Row, bool], None]
) -> list[tuple[Point, Row]]:
    """Measure every point that the workdir does not hold yet.

    The first method of each length is the reference of the others.

    Args:
      model: loaded.
      points: as `points.points` orders them.
      workdir: where rows go; the same one again continues.
      on_row: called with (point, row, whether it was on disk already) as each is there.

    Raises:
      UserError: a point that cannot run; nothing has been compiled then.
    """
    for point in points:
        point.check(model.config)
    ids = np.asarray(model.tokenizer.encode(texts.read(points[0].text)), np.int32)
    most = max(p.length + p.decode_steps + WARM_STEPS + 1 for p in points)
    if len(ids) < most:
        raise UserError(f"lengths: text {points[0].text!r} has {len(ids)} tokens, {most} are needed")
    store = Store(workdir)
    write_run(workdir, model, points)
    done = store.rows()
    reference = points[0].method
    result, dense = [], {}
    for point in points:
        row = done.get(point.key)
        if row is None:
            if point.method != reference and point.length not in dense:
                dense[point.length] = _reference(model, points, point.length, ids, workdir)
            row, x = measure(model, point, ids, dense.get(point.length))
            if point.method == reference:
                dense[point.length] = x
                _save_stream(_stream_path(workdir, point), x)
            base = row if point.method == reference else _row_of(result, reference, point.length)
            row |= compare(row, base)
            store.put(point.key, row)
            jax.clear_caches()
            on_row(point, row, False)
        else:
            on_row(point, row, True)
        result.append((point, row))
    return result


def compare(row: Row, dense: Row) -> Row:
    """Columns that set a row beside the reference of its length."""
    over = lambda name: None if not row[name] or not dense[name] else row[name] / dense[name]  # noqa: E731
    difference = None if row["nll"] is None or dense["nll"] is None else row["nll"] - dense["nll"]
    return {
        "cache_over_dense": over("cache_bytes"),
        "ttft_over_dense": over("ttft_s"),
        "decode_over_dense": over("decode_s"),
        "nll_minus_dense": difference,
    }


def _row_of(result, method: str, length: int) -> Row:
    return next(row for point, row in result if (point.method, point.length) == (method, length))


def _stream_path(workdir: Path, point: Point) -> Path:
    return workdir / f"reference-{point.key}.npy"


def _save_stream(path: Path, x: jax.Array) -> None:
    # written aside and renamed: a killed sweep leaves a whole file or none
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, np.asarray(x, np.float32))
    part.replace(path)


def _reference(model: Pretrained, points: list[Point], length: int, ids, workdir: Path) -> jax.Array:
    """The reference's continuation [M,E] of a length whose row is on disk already; computed again where its file is gone."""
    point = next(p for p in points if p.length == length)
    path = _stream_path(workdir, point)
    if path.exists():
        return jnp.asarray(np.load(path, allow_pickle=False), model.layers.dtype)
    session = make_session(model.layers, point.experiment, point.prompt, point.continuation)
    session.prefill(ids[: point.prompt])
    x = continue_session(session, ids[: length + 1], point.prompt)
    _save_stream(path, x)
    return x


def write_run(workdir: Path, model: Pretrained, points: list[Point]) -> None:
    """`run.json`: what was run on what."""
    git = subprocess.run(  # noqa: S603, fixed words
        ["git", "describe", "--always", "--dirty"],  # noqa: S607
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    packages = ("jax", "jaxlib", "flax", "numpy")
    record = {
        "argv": sys.argv,
        "git": git.stdout.strip() or None,
        "versions": {p: importlib.metadata.version(p) for p in packages} | {"python": platform.python_version()},
        "device": device_name(),
        "model": {"name": model.name, "sha256": model.sha256, "config": dataclasses.asdict(model.config)},
        "text": {"name": points[0].text, "sha256": texts.TEXTS[points[0].text].sha256},
        "points": {p.key: repr(p) for p in points},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    (workdir / "run.json").write_text(json.dumps(record, indent=1) + "\n")
