"""Programs of one session at one length: the memory alive while each runs (exact), and XLA's additions (compiled)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from lcx.axes import Aux
from lcx.cache import shape_bytes
from lcx.experiment import Experiment
from lcx.model_config import ModelConfig
from lcx.models.decoder import logits_program
from lcx.plan.models import abstract_layers
from lcx.plan.targets import GpuTarget, compile_for
from lcx.session_programs import DECODE, PREFILL, SessionPrograms

ONE_SHOT = "prefill"  # name of a step that reads the whole prompt


@dataclass(frozen=True)
class Part:
    """One program of a session, not compiled yet.

    Attributes:
      name: "prefill chunk", "prefill" (one shot), "decode", "repack" or "logits".
      layer: the first layer that runs it; layers that share a program are one part.
      live_bytes: arrays of the session that are alive while it runs, its own arguments among them: weights, caches, residual stream.
      program, args, static: the jitted function and its arguments.
    """

    name: str
    layer: int
    live_bytes: int
    program: Any
    args: tuple[Any, ...]
    static: dict[str, Any]

    @property
    def label(self) -> tuple[str, int]:
        """Name of the same program at every length."""
        return self.name, self.layer

    @cached_property
    def key(self):
        """Key that is equal for programs that compile to the same."""
        leaves, tree = jax.tree.flatten(self.args)
        shapes = tuple((x.shape, jnp.result_type(x)) for x in leaves)
        return self.program, tuple(sorted(self.static.items(), key=lambda item: item[0])), tree, shapes


@dataclass(frozen=True)
class Report:
    """Additions of XLA's buffer assignment to a program's arguments, in bytes.

    Attributes:
      temp_bytes: scratch.
      result_bytes: results that no argument was donated for: of a block, the residual stream that it returns.
    """

    temp_bytes: float
    result_bytes: float

    @property
    def extra_bytes(self) -> float:
        return self.temp_bytes + self.result_bytes


@dataclass(frozen=True)
class Setting:
    """Settings of a planned session, without its length.

    Attributes:
      config: the model, or its part on one of several devices.
      new_tokens: tokens that there is room for after the prompt.
      batch: texts side by side.
      dtype: of weights, activations and exact caches.
      weight_bytes: of all weights as they are counted.
      steps: tokens of the steps after the prompt.
      collective_bytes: for each token of a step, what joining the devices' partial sums takes.
      implementation: of attention, as `lcx.backends.choose.resolve` returned it.
    """

    config: ModelConfig
    new_tokens: int
    batch: int
    dtype: Any
    weight_bytes: int
    steps: tuple[int, ...] = (1,)
    collective_bytes: int = 0
    implementation: str = "xla"


@dataclass(frozen=True)
class Timeline:
    """Programs and caches of a session at one length.

    Attributes:
      parts: its programs.
      cache_bytes: the decode cache, as `Recipe.bytes`.
      peak_cache_bytes: the largest sum of caches that are alive together, as `Session.peak_cache_bytes`.
    """

    parts: list[Part]
    cache_bytes: int
    peak_cache_bytes: int


def timeline(setting: Setting, experiment: Experiment, length: int, aux: Aux | None) -> Timeline:
    """Return the programs that a prompt of `length` tokens and the steps after it run, as `Session` runs them."""
    config = setting.config
    session = SessionPrograms(
        abstract_layers(config, setting.dtype),
        experiment.recipe,
        length,
        setting.new_tokens,
        aux,
        setting.batch,
        experiment.schedule,
        setting.implementation,
    )
    fixed = setting.weight_bytes + shape_bytes(session.aux)
    moments = session.moments()
    held = moments[-1].cache_bytes
    alive: dict[tuple[str, int], int] = {}
    for phase, layer, size in moments:
        # layers of one kind share a program; it is planned at the layer with the most memory alive
        alive[phase, _kind(session, phase, layer)] = max(size, alive.get((phase, _kind(session, phase, layer)), 0))
    parts = []
    width = experiment.schedule.width(length)
    stream = shape_bytes(session.step_shape(width)) + setting.collective_bytes * setting.batch * width
    for call in session.calls(length, setting.steps):
        live = fixed + alive[call.name, _kind(session, call.name, call.layer)]
        name = call.name
        if name == PREFILL:
            name = "prefill chunk" if width < length else ONE_SHOT
        if name != DECODE:
            live += stream
        else:
            name = DECODE if call.tokens == 1 else f"step of {call.tokens:,} tokens"
            live += shape_bytes(session.step_shape(call.tokens))
            live += setting.collective_bytes * setting.batch * call.tokens
        parts.append(Part(name, call.layer, live, call.program, call.args, call.static))
    last = jax.ShapeDtypeStruct((setting.batch, config.d_model), setting.dtype)
    head = (last, session.layers.norm, session.layers.head)
    static = {"eps": config.norm_eps, "tied": config.tied}
    parts.append(Part("logits", 0, fixed + held + stream + shape_bytes(last), logits_program, head, static))
    return Timeline(parts, held, max(moment.cache_bytes for moment in moments))


def _kind(session: SessionPrograms, name: str, layer: int) -> Any:
    """Return the key that a layer's program shares with those of other layers."""
    if name == "repack":
        return session.repack_key(layer)
    return session.kinds[name][layer]


class Compiler:
    """Compiler of programs for targets, each once, two at a time: XLA works outside the interpreter's lock, mostly on one core."""

    def __init__(self, workers: int = 2):
        self._pool = ThreadPoolExecutor(max_workers=workers)
        self._reports: dict[Any, Future[Report]] = {}
        self._lock = threading.Lock()

    def submit(self, target: GpuTarget | None, parts: Sequence[Part]) -> list[Future[Report]]:
        """Start the compilation of parts that are not compiled yet."""
        result = []
        for part in parts:
            key = (target, part.key)
            with self._lock:
                if key not in self._reports:
                    self._reports[key] = self._pool.submit(_compile, target, part)
                result.append(self._reports[key])
        return result

    def known(self, target: GpuTarget | None, part: Part) -> Report | None:
        """Return the report of a compiled program, perhaps of another length: programs of a cache that does not grow are equal."""
        report = self._reports.get((target, part.key))
        return report.result() if report is not None else None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


# left out of a compilation because buffers are assigned without it: tuning, which chooses nothing where no GPU can be timed, and most of
# LLVM's optimisations.  They save two fifths and one third of the time and change no temp (tests/test_plan.py).
GPU_OPTIONS = {"xla_gpu_autotune_level": 0}
CPU_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compile_options(target: GpuTarget | None) -> dict[str, int] | None:
    """Return the options of a compilation; None for a local GPU, which is compiled with the options of a real run."""
    if target is not None:
        return GPU_OPTIONS
    return CPU_OPTIONS if jax.default_backend() == "cpu" else None


def _compile(target: GpuTarget | None, part: Part) -> Report:
    plan = compile_for(target, part.program, part.args, part.static, compile_options(target)).memory_analysis()
    return Report(plan.temp_size_in_bytes, plan.output_size_in_bytes - plan.alias_size_in_bytes)
