"""Measure one point: memory, latency and quality from the same session."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx import texts
from lcx.cache import device_bytes, shape_bytes
from lcx.errors import NotFinite, UserError
from lcx.measure import memory
from lcx.measure.finite import first_not_finite
from lcx.measure.latency import device_name, summary, timed
from lcx.measure.quality import divergence, make_session, token_nll
from lcx.model_config import weight_bytes
from lcx.models.loading import Pretrained
from lcx.session import Session
from lcx.session_programs import Compiled
from lcx.sweep.points import Point
from lcx.sweep.schema import Row

# words of jaxlib's errors when memory is short
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "bad_alloc", "Unable to allocate")


class Bench:
    """Runner of points on one loaded model; keeps what the points share.

    Args:
      model: loaded in the points' type.
      streams: folder for the references' residual streams; None: they stay in memory.
    """

    def __init__(self, model: Pretrained, streams: Path | None = None):
        self.model, self.streams = model, streams
        self._kept: dict[str, np.ndarray] = {}
        self._ids: dict[str, np.ndarray] = {}

    def row(self, point: Point, reference: Point | None = None) -> Row:
        """Return the row of a point, whatever happens to it: status ok, oom_predicted, oom, nonfinite or error.

        Args:
          point: method and length to run.
          reference: the dense point that it is compared with, or None where it is that itself.
        """
        try:
            return self.measure(point, reference)
        except NotFinite as error:
            return {"status": "nonfinite", "message": str(error)}
        except UserError as error:
            return {"status": "error", "message": str(error)}
        except MemoryError as error:
            return {"status": "oom", "message": str(error) or "MemoryError"}
        except Exception as error:  # noqa: BLE001, the sweep goes on and the row says what it was
            text = f"{type(error).__name__}: {error}"
            short = " ".join(text.split())[:500]
            return {"status": "oom" if any(word in text for word in OUT_OF_MEMORY) else "error", "message": short}

    def passages(self, point: Point) -> np.ndarray:
        """Return int32 [B, text_tokens]: passages of the text, one a batch row, bos in front of each where the tokenizer puts it there.

        Seed 0 begins with the text's start.
        """
        name = point.settings.text
        if name not in self._ids:
            self._ids[name] = np.asarray(self.model.tokenizer.encode(texts.read(name)), np.int32)
        front = self.model.tokenizer.front
        ids, length = self._ids[name], point.text_tokens - len(front)
        room = len(ids) - length
        if room < 0:
            raise UserError(f"lengths: text {name!r} has {len(ids)} tokens, {length} are needed; shorten the lengths")
        if point.seed == 0:
            starts = np.linspace(0, room, point.batch).astype(int)
        else:
            starts = np.random.default_rng(point.seed).integers(0, room + 1, point.batch)
        return np.stack([np.concatenate([np.asarray(front, np.int32), ids[s : s + length]]) for s in starts])

    def measure(self, point: Point, reference: Point | None = None) -> Row:
        """Measure a point as `row` does, but raise what goes wrong."""
        layers, settings = self.model.layers, point.settings
        point.experiment.check_weights(self.model.config, self.model.sha256, lambda: self.model.tensors_sha256)
        ids = self.passages(point)
        prompt, end = point.prompt, point.length
        reset = memory.reset_peak_rss()
        session = make_session(
            layers, point.experiment, prompt, point.new_tokens, batch=point.batch, check_finite=False
        )
        with _count_cache_hits() as hits:
            compiled = session.compile(prompt, [settings.continuation, 1])
        row = self._static(point, session, compiled)
        limit = memory_limit() if settings.memory_limit is None else settings.memory_limit
        if limit is not None and row["peak_bytes"] > limit:
            row |= {
                "status": "oom_predicted",
                "message": f"predicted peak {row['peak_bytes']:,} bytes, limit {limit:,}",
            }
            return row | {"compile_s": compiled.seconds, "compile_cache_hits": hits[0]}

        ttft = []
        for i in range(settings.warmups + settings.repeats):
            session.reset()
            _, seconds = timed(lambda: session.prefill(ids[:, :prompt]))
            if i >= settings.warmups:
                ttft.append(seconds)
        cache = {"cache_bytes": session.cache_bytes, "peak_cache_bytes": session.peak_cache_bytes}
        segments = _segment_bytes(session.cache)
        x, continuation_s = timed(lambda: session.step(ids[:, prompt:end], rows="all"))
        x = x.reshape(-1, x.shape[-1])
        nll = token_nll(layers, x, ids[:, prompt + 1 : end + 1].reshape(-1))
        steps = [timed(lambda t=t: session.step(ids[:, t : t + 1]))[1] for t in range(end, point.text_tokens - 1)]
        if not np.isfinite(nll).all():

            def again():
                session.prefill(ids[:, :prompt])
                session.step(ids[:, prompt:end], rows="all")

            raise NotFinite(first_not_finite(session, again))
        kl, top1 = self._divergence(point, reference, x)
        ttft_s, decode = summary(ttft), summary(steps[len(steps) - settings.decode_steps :])
        device_peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        predicted = row.pop("segment_bytes")
        row |= cache
        row |= {
            "status": "ok",
            "ttft_s": ttft_s["median"],
            "ttft_p10_s": ttft_s["p10"],
            "ttft_p90_s": ttft_s["p90"],
            "ttft_n": ttft_s["n"],
            "warmups": settings.warmups,
            "prefill_tokens_per_s": point.batch * prompt / ttft_s["median"],
            "continuation_s": continuation_s,
            "decode_s": decode["median"],
            "decode_p10_s": decode["p10"],
            "decode_p90_s": decode["p90"],
            "decode_n": decode["n"],
            "compile_s": compiled.seconds,
            "compile_cache_hits": hits[0],
            "segment_bytes": {name: [segments.get(name, 0), n] for name, n in predicted.items()},
            "device_peak_bytes": device_peak,
            "overflow": session.overflow,
            "peak_rss_bytes": memory.peak_rss_bytes(),
            "peak_rss_of": "point" if reset else "process",
            "nll": float(nll.mean(dtype=np.float64)),
            "kl": kl,
            "top1_agreement": top1,
            "device": device_name(),
        }
        if settings.tasks:
            from lcx.sweep.task_rows import task_scores

            row["tasks"] = task_scores(self.model, point)
        bad = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            raise NotFinite(f"{', '.join(bad)} of the row")
        return row

    def _static(self, point: Point, session: Session, compiled: Compiled) -> Row:
        """Return the columns that compiling gives."""
        experiment, config = point.experiment, self.model.config
        aux, dtype = experiment.load_aux(config), jnp.dtype(self.model.layers.dtype)
        sizes = (config, point.prompt, point.new_tokens)
        weights = weight_bytes(config, dtype)
        peak_cache = session.predicted_peak_cache_bytes()
        row: Row = {
            "programs": compiled.num_programs,
            "implementation": session.implementation,
            "recipe_bytes": experiment.recipe.bytes(*sizes, aux=aux, batch=point.batch, dtype=dtype),
            "bits_per_value": memory.bits_per_value(experiment.recipe, *sizes, aux=aux, dtype=dtype),
            "peak_cache_bytes": peak_cache,
            "weight_bytes": weights,
            "temp_bytes": compiled.temp_bytes,
            "peak_bytes": weights + peak_cache + compiled.extra_bytes,
        }
        empty = jax.eval_shape(lambda: experiment.recipe.init(*sizes, aux=aux, batch=point.batch, dtype=dtype))
        row["segment_bytes"] = _segment_bytes(empty, shapes=True)
        for phase, plan in compiled.plans.items():
            row |= {f"{phase}_{kind}_bytes": value for kind, value in plan.items()}
        return row

    def _divergence(self, point: Point, reference: Point | None, x) -> tuple[float | None, float | None]:
        if reference is None:
            self._keep(point, np.asarray(x, np.float32))
            return 0.0, 1.0
        dense = self._stream(reference)
        return (None, None) if dense is None else divergence(self.model.layers, jnp.asarray(dense, x.dtype), x)

    def _keep(self, point: Point, x: np.ndarray) -> None:
        if self.streams is None:
            self._kept[point.key] = x
            return
        self.streams.mkdir(parents=True, exist_ok=True)
        path = self.streams / f"{point.key}.npy"
        # written aside and renamed: a killed sweep leaves a whole file or none
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, x)
        part.replace(path)

    def _stream(self, reference: Point) -> np.ndarray | None:
        """Return the reference's residual stream of the continuation [B*M,E]; None where the reference failed."""
        if self.streams is None:
            return self._kept.get(reference.key)
        path = self.streams / f"{reference.key}.npy"
        return np.load(path, allow_pickle=False) if path.exists() else None


def memory_limit() -> int | None:
    """Return the bytes that a point may take: the device's limit, or the machine's memory for a CPU; None where neither is known."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return memory.machine_bytes()


def _segment_bytes(cache: list[Any], shapes: bool = False) -> dict[str, int]:
    """Return the bytes by segment over all layers; "(probe)" is the prompt's last queries."""
    count: Callable = shape_bytes if shapes else device_bytes
    total: dict[str, int] = {}
    for layer in cache:
        for name, slots in ({} if layer is None else layer.parts()).items():
            total[name] = total.get(name, 0) + count(slots)
    return total


@contextlib.contextmanager
def _count_cache_hits():
    """Count the programs that come from the persistent compile cache; yield a list with the count."""
    hits = [0]

    def listen(event: str, **_) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits[0] += 1

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)
