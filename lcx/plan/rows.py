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
class PlanRow:
    """What one method needs at one context length; bytes are of one device.

    Attributes:
      model, num_layers, method, device, num_devices, dtype, weight_bits, batch: what was asked for.
      implementation: of attention, as resolved for the device.
      chunk_size: tokens of a prefill step; None: one shot.
      length: tokens of the prompt.
      new_tokens: tokens that there is room for after it.
      weight_bytes: as they are counted; `weights` by kind.
      cache_bytes: the decode cache, as `Recipe.bytes`.
      peak_cache_bytes: the largest sum of caches that are alive together.
      temp_bytes: scratch of the program that needs the most memory.
      peak_bytes: the most memory.
      program: what needs it.
      peaks: program -> the most memory while it runs.
      memory_bytes, reserve_bytes: of the device, and what of it is left alone.
      fits: whether the peak is within the memory less the reserve.
      source: "compiled" where `program` was compiled for this length, else "interpolated".
      limit_tokens: the longest prompt that fits, rounded down to a multiple of 1,024; None: memory does not grow, or not searched.
      limit_program, limit_bytes: what needs the most memory there, and how much.
      checks: lengths that were interpolated first and compiled then.
      times: the roofline, predicted; None on a CPU, which has no vendor's figures.
      paper: the paper's figures, from the config.
      notes: what a reader must know.
    """

    model: str
    num_layers: int
    method: str
    device: str
    num_devices: int
    dtype: str
    weight_bits: int | None
    batch: int
    implementation: str
    chunk_size: int | None
    length: int
    new_tokens: int
    weight_bytes: int
    weights: dict[str, int]
    cache_bytes: int
    peak_cache_bytes: int
    temp_bytes: int
    peak_bytes: int
    program: str
    peaks: dict[str, int]
    memory_bytes: int
    reserve_bytes: int
    fits: bool
    source: str
    limit_tokens: int | None
    limit_program: str | None
    limit_bytes: int | None
    checks: tuple[Check, ...]
    times: Roofline | None
    paper: dict[str, float]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Job:
    """One method on one device; a `keep_ratio` is of the prompt, and of `shortest` tokens at least."""

    model: ModelConfig
    method: str
    experiment: Experiment
    device: Device
    setting: Setting
    aux: Aux | None
    weight_bits: int | None
    reserve_mib: int
    notes: tuple[str, ...]
    budget: int | None
    keep_ratio: float | None
    shortest: int

    def experiment_at(self, length: int) -> Experiment:
        """With the budget that was asked for; what keeps all tokens has none."""
        if not self.experiment.recipe.has_budget:
            return self.experiment
        # the search for a limit looks at prompts that are shorter than sinks and observation windows
        return self.experiment.with_budget(max(length, self.shortest), self.budget, self.keep_ratio)

    def timeline(self, length: int) -> Timeline:
        return timeline(self.setting, self.experiment_at(length), length, self.aux)

    def row(
        self, curve: Curve, length: int, limit: int | None, checks: Sequence[Check], extra: Sequence[str]
    ) -> PlanRow:
        found, peak = curve.timeline(length), curve.peak(length)
        experiment = self.experiment_at(length)
        times = None
        if self.device.target is not None:
            times = roofline(self.setting, experiment, length, self.aux, self.weight_bits, self.device.target)
        at_limit = curve.peak(limit) if limit else None
        return PlanRow(
            model=self.model.name,
            num_layers=self.model.num_layers,
            method=self.method,
            device=self.device.name,
            num_devices=self.device.count,
            dtype=jnp.dtype(self.setting.dtype).name,
            weight_bits=self.weight_bits,
            batch=self.setting.batch,
            implementation=self.setting.implementation,
            chunk_size=experiment.schedule.chunk_size(),
            length=length,
            new_tokens=self.setting.new_tokens,
            weight_bytes=self.setting.weight_bytes,
            weights=weight_table(self.setting.config, self.setting.dtype, self.weight_bits),
            cache_bytes=found.cache_bytes,
            peak_cache_bytes=found.peak_cache_bytes,
            temp_bytes=peak.temp_bytes,
            peak_bytes=peak.bytes,
            program=peak.part.name,
            peaks=peak.by_program,
            memory_bytes=self.device.memory_bytes,
            reserve_bytes=self.reserve_mib * MIB,
            fits=peak.bytes <= budget_bytes(self.device, self.reserve_mib),
            source="compiled" if peak.compiled else "interpolated",
            limit_tokens=limit,
            limit_program=at_limit.part.name if at_limit else None,
            limit_bytes=at_limit.bytes if at_limit else None,
            checks=tuple(checks),
            times=times,
            paper=dict(experiment.paper),
            notes=(*self.notes, *extra),
        )


def make_job(
    model: ModelConfig,
    method: str,
    experiment: Experiment,
    where: Device,
    *,
    new_tokens: int = NEW_TOKENS,
    batch: int = 1,
    dtype: Any = "bfloat16",
    steps: Sequence[int] = (1,),
    weight_bits: int | None = None,
    reserve_mib: int = RESERVE_MIB,
    budget: int | None = None,
    keep_ratio: float | None = None,
    shortest: int = 1,
    implementation: str | None = None,
) -> Job:
    """Check all that can be checked before anything is compiled.

    Raises:
      UserError: a recipe that does not suit the model, devices that do not divide it, or a compiler that is missing.
    """
    if weight_bits not in (None, 8):
        raise UserError(f"weight_bits={weight_bits}: allowed is 8")
    if batch < 1 or new_tokens < 0:
        raise UserError(f"batch={batch} must be at least 1 and new_tokens={new_tokens} at least 0")
    if budget_bytes(where, reserve_mib) <= 0:
        raise UserError(f"reserve_mib={reserve_mib}: {where.name} has {where.memory_bytes // MIB:,} MiB")
    part, kind = shard(model, where.count), jnp.dtype(dtype)
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
        new_tokens,
        batch,
        kind,
        weight_bytes(part, kind, weight_bits),
        tuple(steps),
        part.d_model * kind.itemsize if where.count > 1 else 0,
        resolve(implementation, None if where.target is None else where.target.capability),
    )
    return Job(
        model,
        method,
        experiment,
        where,
        setting,
        aux,
        weight_bits,
        reserve_mib,
        tuple(notes),
        budget,
        keep_ratio,
        shortest,
    )


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
      limits: whether to search for the longest context that fits.
      on_rows: called with the rows of a method on a device as they are done.
      settings: keyword arguments of `make_job`: new_tokens, batch, dtype, weight_bits, reserve_mib, budget, keep_ratio, implementation.

    Returns:
      Rows in the order of devices, methods and lengths.

    Raises:
      UserError: wrong input; nothing has been compiled then.
    """
    check_lengths(lengths)
    places = [t if isinstance(t, Device) else device(t) for t in targets]
    jobs = []
    for where in places:
        for method, experiment in experiments.items():
            chunked = experiment if experiment.recipe.one_shot else experiment.with_chunks(chunk_size)
            job = make_job(model, method, chunked, where, shortest=min(lengths), **settings)
            for length in lengths:
                job.experiment_at(length)
            jobs.append(job)
    compiler = Compiler()
    try:
        # two at a time: while one waits for XLA the other traces
        with ThreadPoolExecutor(max_workers=2) as pool:
            found = []
            for rows in pool.map(lambda job: _rows(job, compiler, lengths, limits), jobs):
                found += rows
                if on_rows is not None:
                    on_rows(rows)
            return found
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
        limit, certain = curve.limit(budget_bytes(job.device, job.reserve_mib))
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
    """One length, compiled; the prompt is read by the experiment's own schedule.

    Args:
      config: the model's shape.
      experiment: the method, its budget set.
      length: tokens of the prompt.
      new_tokens: tokens that there is room for after it.
      dtype: of weights, activations and exact caches.
      target: a device or its name; None: this machine's own.
      batch: texts side by side.
      method: what the row calls it; None: its pattern's name.
      compiler: shared by several estimates, so that what they have in common is compiled once.
      settings: further keyword arguments of `make_job`, such as steps=(1, 256).
    """
    check_lengths([length])
    if isinstance(target, GpuTarget):
        target = target.name
    where = target if isinstance(target, Device) else device(target or "cpu")
    method = method or type(experiment.recipe.pattern).__name__
    job = make_job(config, method, experiment, where, new_tokens=new_tokens, batch=batch, dtype=dtype, **settings)
    with nullcontext(compiler) if compiler else closing(Compiler()) as shared:
        curve = Curve(shared, where.target, job.timeline)
        curve.compile_ends(length)
        return job.row(curve, length, None, (), ())
