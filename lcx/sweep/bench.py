"""Measure one point: memory, latency and quality from the same session."""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx import texts
from lcx.cache import device_bytes, shape_bytes
from lcx.errors import NotFinite, UserError
from lcx.measure import memory, protocols
from lcx.measure.latency import device_name
from lcx.measure.quality import make_session
from lcx.model_config import weight_bytes
from lcx.models.loading import Pretrained
from lcx.session import Session
from lcx.session_programs import Compiled
from lcx.sweep import quality
from lcx.sweep.points import Point
from lcx.sweep.quality import References, Scored
from lcx.sweep.schema import Row
from lcx.sweep.turns import Times, measure
from lcx.tracebacks import place

# words of jaxlib's errors when memory is short
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "bad_alloc", "Unable to allocate")


@dataclass
class Ready:
    """A session whose programs are compiled, and the times that were measured with it.

    Attributes:
      asked: all that session and times depend on.
      session: of the point.
      compiled: its programs.
      cache_hits: programs that the persistent compile cache had already.
      times: None until they are measured; they do not depend on the text.
      tasks: figures of tasks that do not read the text.
    """

    asked: tuple
    session: Session
    compiled: Compiled
    cache_hits: int
    times: Times | None = None
    tasks: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Runner of points on one loaded model; keeps what the points share.

    Args:
      model: loaded in the points' type.
      streams: folder for what dense points leave to compare with; None: it stays in memory.
    """

    def __init__(self, model: Pretrained, streams: Path | None = None):
        self.model, self.references = model, References(streams)
        self._ids: dict[str, np.ndarray] = {}
        self._last: Ready | None = None

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
            # a worker's stderr is its log; the row has one line, which ends with the place in the user's own files
            traceback.print_exception(error)
            text = f"{type(error).__name__}: {error}"
            at = place(error)
            short = " ".join(text.split())[:500] + (f" ({at})" if at else "")
            return {"status": "oom" if any(word in text for word in OUT_OF_MEMORY) else "error", "message": short}

    def passages(self, point: Point) -> np.ndarray:
        """Return int32 [S,B,text_tokens]: S sets of a batch of passages, bos in front of each where the tokenizer puts it there.

        Seed 0 spreads them evenly from the text's start; other seeds draw their starts.
        """
        name, (sets, batch) = point.settings.text, (point.settings.passages, point.batch)
        if name not in self._ids:
            self._ids[name] = np.asarray(self.model.tokenizer.encode(texts.load(name)[0]), np.int32)
        front = self.model.tokenizer.front
        ids, length = self._ids[name], point.text_tokens - len(front)
        room = len(ids) - length
        if room < 0:
            raise UserError(f"lengths: text {name!r} has {len(ids)} tokens, {length} are needed; shorten the lengths")
        if point.seed == 0:
            starts = np.linspace(0, room, sets * batch).astype(int)
        else:
            starts = np.random.default_rng(point.seed).integers(0, room + 1, sets * batch)
        rows = [np.concatenate([np.asarray(front, np.int32), ids[s : s + length]]) for s in starts]
        return np.stack(rows).reshape(sets, batch, -1)

    def measure(self, point: Point, reference: Point | None = None) -> Row:
        """Measure a point as `row` does, but raise what goes wrong."""
        layers, settings = self.model.layers, point.settings
        point.experiment.check_weights(self.model.config, self.model.sha256, lambda: self.model.tensors_sha256)
        ids = self.passages(point)
        reset = memory.reset_peak_rss()
        ready = self._ready(point)
        session, compiled = ready.session, ready.compiled
        row = self._static(point, session, compiled)
        notes = list(point.remarks)
        limit = memory_limit() if settings.memory_limit is None else settings.memory_limit
        if limit is not None and row["peak_bytes"] > limit:
            row |= {
                "status": "oom_predicted",
                "message": f"predicted peak {row['peak_bytes']:,} bytes, limit {limit:,}",
            }
            return row | {"compile_s": compiled.seconds, "compile_cache_hits": ready.cache_hits, "notes": notes}

        session.reset()
        predicted, segments = row.pop("segment_bytes"), {}

        def on_prompt() -> None:
            row.update(cache_bytes=session.cache_bytes, peak_cache_bytes=session.peak_cache_bytes)
            segments.update(_segment_bytes(session.cache))

        sizes = (point.prompt, settings.continuation)
        scored = quality.score(session, layers, ids, *sizes, settings.protocols, on_prompt)
        dense = self._dense(point, reference, ids, scored)
        row |= quality.columns(layers, point, scored, dense, protocols.decides(session) or _codecs(session))
        row |= {
            "segment_tokens": quality.held_tokens(session),
            "segment_bytes": {name: [segments.get(name, 0), n] for name, n in predicted.items()},
            "overflow": session.overflow,
            "peak_rss_bytes": memory.peak_rss_bytes(),
            "peak_rss_of": "point" if reset else "process",
            "device_peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        }
        notes += [text for text in (quality.idle(scored, dense),) if text and reference is not None]
        notes += [f"segment {name!r} held no token" for name, n in row["segment_tokens"].items() if n == 0]
        session.reset()
        if ready.times is None:
            ready.times = self._times(point, reference, session, ids[0], limit, row["peak_bytes"])
        row |= ready.times.columns(point)
        row |= {
            "status": "ok",
            "compile_s": compiled.seconds,
            "compile_cache_hits": ready.cache_hits,
            "device": device_name(),
            "notes": notes + ready.times.notes(),
        }
        if settings.tasks:
            from lcx.sweep.task_rows import task_scores

            row["tasks"] = task_scores(self.model, point, ready.tasks)
        bad = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            raise NotFinite(f"{', '.join(bad)} of the row")
        return row

    def _ready(self, point: Point) -> Ready:
        """Return the point's session, compiled; that of the point before where only the text or the seed differs."""
        settings, experiment = point.settings, point.experiment
        asked = (
            experiment.recipe,
            experiment.schedule,
            experiment.implementation,
            point.aux_sha256,
            point.length,
            point.batch,
        )
        asked = (*asked, replace(settings, text=""))
        if self._last is not None and self._last.asked == asked:
            return self._last
        # the programs and caches of the point before go first
        self._last = None
        session = make_session(
            self.model.layers, experiment, point.prompt, point.new_tokens, batch=point.batch, check_finite=False
        )
        widths = {settings.continuation, 1}
        as_stored = _peek_as_stored(session, settings.protocols)
        peek = 0 if as_stored is None else settings.continuation
        with _count_cache_hits() as hits:
            compiled = session.compile(point.prompt, sorted(widths), peek, as_stored=bool(as_stored))
        self._last = Ready(asked, session, compiled, hits[0])
        return self._last

    def _dense(self, point: Point, reference: Point | None, ids, scored: dict[str, Scored]) -> Scored | None:
        """Return what the point is compared with: itself, where it is the reference, with its far tokens."""
        if reference is not None:
            return self.references.get(reference.key)
        mine = scored[point.settings.protocols[0]]
        far = quality.far_tokens(self.model.layers, ids, point.prompt, point.settings.near, mine.nll)
        mine = replace(mine, far=far)
        for name in scored:
            scored[name] = mine
        self.references.keep(point.key, mine)
        return mine

    def _times(self, point: Point, reference: Point | None, session: Session, ids, limit, peak: int) -> Times:
        """Time a point in turns with dense attention; alone where both would not fit, or where it is dense attention."""
        sessions = {"method": session}
        alone = None
        if reference is not None:
            dense = make_session(
                self.model.layers,
                reference.experiment,
                point.prompt,
                point.new_tokens,
                batch=point.batch,
                check_finite=False,
            )
            both = peak + dense.predicted_peak_cache_bytes()
            if limit is not None and both > limit:
                alone = f"timed alone: with dense attention's cache beside it {both:,} bytes are needed, the limit is {limit:,}"
            else:
                dense.compile(point.prompt, (1, point.settings.continuation))
                sessions["dense"] = dense
        return measure(sessions, ids, point, alone)

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


def _codecs(session: Session) -> str | None:
    """Return why one step and many differ for codecs of single tokens: a step's own tokens are exact in the one."""
    return "codes are read as they are stored" if protocols.differ(session) else None


def _peek_as_stored(session: Session, names: Sequence[str]) -> bool | None:
    """Return how the continuation is peeked, see `protocols.continuation`; None: it is not."""
    if session.order != "attend" or not protocols.differ(session):
        return None
    if protocols.decides(session) is None:
        return True if "decode" in names else None
    return False if len(names) > 1 else None


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
