"""Plans: one row for each method, device and context length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from lcx.axes import Aux
from lcx.backends.choose import resolve
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.model_config import ModelConfig, weight_bytes, weight_table
from lcx.ops.attention import FAR
from lcx.plan.devices import Device, budget_bytes, check_compiler, device
from lcx.plan.models import planned_aux, shard
from lcx.plan.need import Limit, Need
from lcx.plan.programs import Compiler, Setting, Timeline, timeline
from lcx.plan.roofline import Roofline, roofline
from lcx.plan.search import STEP, TOLERANCE, Check, Curve
from lcx.plan.targets import MIB, GpuTarget

NEW_TOKENS = 128
CHUNK_SIZE = 2_048
# for the CUDA context with its loaded kernels, cuBLAS's work space and what the allocator cannot use; not measured here
RESERVE_MIB = 1_024
FAR_BEYOND = 4  # times the longest context that fits; programs of terabytes take half a minute to compile


@dataclass(frozen=True)
class Asked:
    """Request for a plan, beside the model, the method, the device and the length.

    Attributes:
      new_tokens: tokens that there is room for after the prompt.
      batch: texts side by side.
      dtype: of weights, activations and exact caches.
      steps: tokens of the steps after the prompt.
      weight_bits: 8 counts the layers' matrices in 8 bits; None: in `dtype`.
      reserve_mib: MiB of the device that stay unused.
      budget, keep_ratio: of methods that have a budget; a `keep_ratio` is of the prompt, and of `shortest` tokens at least.
      implementation: of attention, as in `lcx.backends.choose.resolve`.

    Raises:
      UserError: a value that is not allowed.
    """

    new_tokens: int = NEW_TOKENS
    batch: int = 1
    dtype: Any = "bfloat16"
    steps: tuple[int, ...] = (1,)
    weight_bits: int | None = None
    reserve_mib: int = RESERVE_MIB
    budget: int | None = None
    keep_ratio: float | None = None
    shortest: int = 1
    implementation: str | None = None

    def __post_init__(self):
        if self.weight_bits not in (None, 8):
            raise UserError(f"weight_bits={self.weight_bits}: allowed is 8")
        if self.batch < 1 or self.new_tokens < 0:
            raise UserError(f"batch={self.batch} must be at least 1 and new_tokens={self.new_tokens} at least 0")


@dataclass(frozen=True)
class Job:
    """One method on one device.

    Attributes:
      model: the whole model.
      method: name.
      experiment: the method.
      device: where it is planned for.
      asked: the rest of the request.
      setting: settings of the planned session, of one device.
      aux: the method's arrays, or None.
      notes: remarks for the reader.
    """

    model: ModelConfig
    method: str
    experiment: Experiment
    device: Device
    asked: Asked
    setting: Setting
    aux: Aux | None
    notes: tuple[str, ...]

    @property
    def dtype(self) -> str:
        return jnp.dtype(self.setting.dtype).name

    @property
    def weights(self) -> dict[str, int]:
        """Return the bytes of one device's weights by kind, as they are counted."""
        return weight_table(self.setting.config, self.setting.dtype, self.asked.weight_bits)

    @property
    def reserve_bytes(self) -> int:
        return self.asked.reserve_mib * MIB

    def experiment_at(self, length: int) -> Experiment:
        """Return the experiment with the requested budget; methods that keep every token are returned unchanged."""
        if not self.experiment.recipe.has_budget:
            return self.experiment
        # the search for a limit looks at prompts that are shorter than sinks and observation windows
        return self.experiment.with_budget(max(length, self.asked.shortest), self.asked.budget, self.asked.keep_ratio)

    def timeline(self, length: int) -> Timeline:
        return timeline(self.setting, self.experiment_at(length), length, self.aux)

    def row(
        self, curve: Curve, length: int, limit: int | None, checks: Sequence[Check], extra: Sequence[str]
    ) -> PlanRow:
        return PlanRow(
            job=self,
            at=Need.of(curve, length),
            limit=None if limit is None else Limit(limit, Need.of(curve, limit) if limit else None),
            times=self.times(length),
            checks=tuple(checks),
            notes=(*self.notes, *extra),
        )

    def times(self, length: int) -> Roofline | None:
        """Return the predicted roofline; None on a CPU, which has no vendor's figures."""
        target = self.device.target
        if target is None:
            return None
        return roofline(self.setting, self.experiment_at(length), length, self.aux, self.asked.weight_bits, target)


@dataclass(frozen=True)
class PlanRow:
    """Needs of one method at one context length; bytes are of one device.

    Attributes:
      job: the request.
      at: the memory that it needs.
      limit: the longest prompt that fits; None: memory does not grow, or not searched.
      times: the roofline, predicted; None on a CPU.
      checks: lengths that were interpolated first and compiled then.
      notes: remarks for the reader.
    """

    job: Job
    at: Need
    limit: Limit | None
    times: Roofline | None
    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Return True where the peak is within the memory less the reserve."""
        return self.at.peak_bytes <= budget_bytes(self.job.device, self.job.asked.reserve_mib)

    @property
    def limit_tokens(self) -> int | None:
        return None if self.limit is None else self.limit.tokens

    @property
    def need_at_limit(self) -> Need | None:
        return None if self.limit is None else self.limit.need

    def to_json(self) -> dict[str, Any]:
        """Return the columns of a stored row."""
        job, setting, at, most = self.job, self.job.setting, self.at, self.need_at_limit
        return {
            "model": job.model.name,
            "num_layers": job.model.num_layers,
            "method": job.method,
            "device": job.device.name,
            "num_devices": job.device.count,
            "dtype": job.dtype,
            "weight_bits": job.asked.weight_bits,
            "batch": setting.batch,
            "implementation": setting.implementation,
            "chunk_size": job.experiment.schedule.chunk_size(),
            "length": at.length,
            "new_tokens": setting.new_tokens,
            "weight_bytes": setting.weight_bytes,
            "weights": job.weights,
            "cache_bytes": at.cache_bytes,
            "peak_cache_bytes": at.peak_cache_bytes,
            "temp_bytes": at.temp_bytes,
            "peak_bytes": at.peak_bytes,
            "program": at.program,
            "peaks": at.peaks,
            "memory_bytes": job.device.memory_bytes,
            "reserve_bytes": job.reserve_bytes,
            "fits": self.fits,
            "source": at.source,
            "limit_tokens": self.limit_tokens,
            "limit_program": None if most is None else most.program,
            "limit_bytes": None if most is None else most.peak_bytes,
            "checks": tuple(dataclasses.asdict(check) for check in self.checks),
            "times": None if self.times is None else dataclasses.asdict(self.times),
            "paper": dict(job.experiment.paper),
            "notes": self.notes,
        }


def make_job(model: ModelConfig, method: str, experiment: Experiment, where: Device, asked: Asked | None = None) -> Job:
    """Check the method, model and device before anything is compiled, and return the job.

    Raises:
      UserError: a recipe that does not suit the model, devices that do not divide it, or a compiler that is missing.
    """
    asked = asked or Asked()
    if budget_bytes(where, asked.reserve_mib) <= 0:
        raise UserError(f"reserve_mib={asked.reserve_mib}: {where.name} has {where.memory_bytes // MIB:,} MiB")
    part, kind = shard(model, where.count), jnp.dtype(asked.dtype)
    aux, note = planned_aux(experiment, model, where.count)
    try:
        experiment.recipe.check(part, aux)
    except UserError as error:
        raise UserError(f"{method}: {error}") from None
    check_compiler(where)
    notes = [note] if note else []
    if "own" in experiment.recipe.pattern.visits and where.target is not None:
        notes.append("the prefill time counts every pair of query and key; which ones are read depends on the text")
    if where.count > 1:
        notes.append(
            f"tensor parallel over KV heads: one device's part of {where.count} is compiled, links are not timed"
        )
    setting = Setting(
        part,
        asked.new_tokens,
        asked.batch,
        kind,
        weight_bytes(part, kind, asked.weight_bits),
        tuple(asked.steps),
        part.d_model * kind.itemsize if where.count > 1 else 0,
        resolve(asked.implementation, None if where.target is None else where.target.capability),
    )
    return Job(model, method, experiment, where, asked, setting, aux, tuple(notes))


def plan(
    model: ModelConfig,
    experiments: Mapping[str, Experiment],
    targets: Sequence[str | Device],
    lengths: Sequence[int],
    *,
    chunk_size: int = CHUNK_SIZE,
    limits: bool = True,
    on_rows: Callable[[list[PlanRow]], None] | None = None,
    **settings,
) -> list[PlanRow]:
    """Predict memory for every method, device and length; nothing runs and no array is made.

    Every program is compiled at the shortest and the longest length; those that can be the largest at the longest length that fits and
    at one random length between, whose interpolation is checked first, and where the check misses 3 %, at up to four more.  Methods that
    read the prompt in one step are compiled at every length up to 4 times the longest that fits.

    Args:
      model: its shape, such as `models.shape("llama3-8b")`.
      experiments: name -> method.
      targets: devices or their names, such as "h200", "2xa100-80gb", "cpu".
      lengths: prompts in tokens, each once.
      chunk_size: tokens of a prefill step, but for methods that need the whole prompt at once.
      limits: True to search for the longest context that fits.
      on_rows: called with the rows of a method on a device as they are done.
      settings: fields of `Asked`: new_tokens, batch, dtype, weight_bits, reserve_mib, budget, keep_ratio, implementation.

    Returns:
      Rows in the order of devices, methods and lengths.

    Raises:
      UserError: wrong input; nothing has been compiled then.
    """
    check_lengths(lengths)
    asked = Asked(shortest=min(lengths), **settings)
    places = [t if isinstance(t, Device) else device(t) for t in targets]
    jobs = []
    for where in places:
        for method, experiment in experiments.items():
            chunked = experiment if experiment.recipe.one_shot else experiment.with_chunks(chunk_size)
            job = make_job(model, method, chunked, where, asked)
            for length in lengths:
                job.experiment_at(length)
            jobs.append(job)
    compiler = Compiler()
    try:
        # two threads: while one waits for XLA the other traces
        with ThreadPoolExecutor(max_workers=2) as pool:
            all_rows = []
            for rows in pool.map(lambda job: _rows(job, compiler, lengths, limits), jobs):
                all_rows += rows
                if on_rows is not None:
                    on_rows(rows)
            return all_rows
    finally:
        compiler.close()


def check_lengths(lengths: Sequence[int]) -> None:
    if not lengths or len(set(lengths)) < len(lengths):
        raise UserError(f"lengths={','.join(map(str, lengths))}: give at least one, each once")
    for length in lengths:
        if not 1 <= length <= FAR - STEP:
            raise UserError(f"lengths: {length} must be from 1 to {FAR - STEP} tokens")


def _rows(job: Job, compiler: Compiler, lengths: Sequence[int], limits: bool) -> list[PlanRow]:
    curve = Curve(compiler, job.device.target, job.timeline)
    low, high = min(lengths), max(lengths)
    curve.compile_ends(low, high)
    limit, notes = None, []
    if limits:
        limit, certain = curve.limit(budget_bytes(job.device, job.asked.reserve_mib))
        if limit is None:
            notes.append("memory does not grow with the context")
        if not certain:
            notes.append("the longest context is one that fits; the search did not settle")
    if job.experiment.recipe.one_shot:
        # scratch of a step that reads the whole prompt is neither a line nor a power: its lists of pages grow until they are full
        curve.compile(*(n for n in lengths if limit is None or n <= FAR_BEYOND * max(limit, low)))
    checks = curve.check_middle(low, high, f"{job.model.name} {job.method} {job.device.name}") if low < high else []
    if checks and not checks[-1].holds:
        last = checks[-1]
        notes.append(
            f"interpolation missed {TOLERANCE:.0%} at {last.tokens:,} tokens: temp {last.temp_error:.1%}, peak {last.peak_error:.2%}"
        )
    return [job.row(curve, length, limit, checks, notes) for length in lengths]


def estimate(
    config: ModelConfig,
    experiment: Experiment,
    length: int,
    new_tokens: int,
    dtype: Any,
    target: str | Device | GpuTarget | None,
    batch: int = 1,
    method: str | None = None,
    compiler: Compiler | None = None,
    **settings,
) -> PlanRow:
    """Return the plan at one length, compiled; the prompt is read by the experiment's own schedule.

    Args:
      config: the model's shape.
      experiment: the method, its budget set.
      length: tokens of the prompt.
      new_tokens: tokens that there is room for after it.
      dtype: of weights, activations and exact caches.
      target: a device or its name; None: this machine's own.
      batch: texts side by side.
      method: name in the row; None: the pattern's name.
      compiler: shared by several estimates, so that what they have in common is compiled once.
      settings: further fields of `Asked`, such as steps=(1, 256).
    """
    check_lengths([length])
    if isinstance(target, GpuTarget):
        target = target.name
    where = target if isinstance(target, Device) else device(target or "cpu")
    method = method or type(experiment.recipe.pattern).__name__
    asked = Asked(new_tokens=new_tokens, batch=batch, dtype=dtype, **settings)
    job = make_job(config, method, experiment, where, asked)
    with nullcontext(compiler) if compiler else closing(Compiler()) as shared:
        curve = Curve(shared, where.target, job.timeline)
        curve.compile_ends(length)
        return job.row(curve, length, None, (), ())
