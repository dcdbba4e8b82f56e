"""Sizes and runs of scripts/before_after.py: each config on a tiny random model, and its programs at the shapes of Llama-3-8B."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.artefacts.head_split import split_by_score
from lcx.backends.choose import resolve
from lcx.config_files import all_configs, load_config
from lcx.errors import UserError
from lcx.experiment import Experiment

# adapter: every name of lcx that these scripts know, but for `experiments.cli`
from lcx.model_config import ModelConfig, Rope
from lcx.models.decoder import Layers, Model, random_weights
from lcx.plan.programs import CPU_OPTIONS, GPU_OPTIONS, Setting, timeline
from lcx.plan.targets import compile_for, gpu_target
from lcx.schedules.chunked import Chunked, OneShot
from lcx.session import Session


def tiny_layers(config: ModelConfig) -> Layers:
    """Return the random model, taken apart for running."""
    return Layers.of(Model(config, random_weights(config, 1, jnp.float32)))


def recipe_bytes(experiment: Experiment, phase: str, model, prompt: int, new: int, aux, batch: int, dtype) -> int:
    """Return `Recipe.bytes` of one phase."""
    return experiment.recipe.bytes(model, prompt, new, phase=phase, aux=aux, batch=batch, dtype=jnp.dtype(dtype))


def row_logits(session: Session, x) -> np.ndarray:
    """Return the float32 logits [T,B,V] of a step's residual stream [B,T,E]."""
    B, T, E = x.shape
    return np.asarray(session.layers.logits(x.reshape(B * T, E))).reshape(B, T, -1).swapaxes(0, 1)


def layer_programs(experiment: Experiment, model, tokens: int, dtype, device: str, aux) -> Iterator[tuple[str, Any]]:
    """Yield (name, XLA's memory plan) of each program that layers run for a prompt of `tokens` tokens and a decode step after it."""
    target = None if device == "cpu" else gpu_target(device)
    implementation = resolve(None, target.capability if target else None)
    setting = Setting(model, 0, 1, jnp.dtype(dtype), 0, implementation=implementation)
    # buffers are assigned before LLVM runs, and without tuning, which cannot run where there is no GPU
    options = CPU_OPTIONS | (GPU_OPTIONS if target else {})
    for part in timeline(setting, experiment, tokens, aux).parts:
        if part.name != "logits":
            report = compile_for(target, part.program, part.args, part.static, options).memory_analysis()
            yield f"{part.name}, layer {part.layer}", report


# configs and their sizes

ROOT = Path(__file__).resolve().parent.parent
TINY = ModelConfig("tiny", 3, 48, 6, 2, 32, 40, 97, 512)  # head_dim suits groups of 32
TINY_SCORES = [[1, 0], [0, 1], [1, 0]]
# three of the 32 layers: Quest reads the first two densely
LLAMA3_8B = ModelConfig("llama3-8b", 3, 4_096, 32, 8, 128, 14_336, 128_256, 131_072, rope=Rope(5e5), tied=False)
LLAMA_SCORES = [[0, 1] * 4] * 3
SHORT, CHUNK, STEPS, LAST_STEP = 16, 16, 4, 5
LONG, LONG_CHUNK = 131_072, 2_048
DEVICES = {"cpu": (8_192, "float32"), "h200": (LONG, "bfloat16")}
ATOL = 1e-5


@dataclass(frozen=True)
class Small:
    """Sizes at which a config acts on `prompt` tokens.

    Attributes:
      prompt: tokens of the longer text.
      budget: of `Experiment.with_budget`, set after the fields.
      fields: class name -> field -> value, see `with_fields`.
      whole: the prompt of `--temp` is read in one step.
    """

    prompt: int = 37
    budget: int | None = None
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    whole: bool = False


_KIVI = {
    "Remainder": {"page": 8},
    "Recent": {"page": 8, "keep": 8, "group_size": 8},
    "KiviKeys": {"group_size": 8},
    "Kivi": {"group_size": 8},
}
SETTINGS = {
    "dense": Small(),
    "window": Small(budget=9),
    "sink_window": Small(budget=9),
    "streaming_llm": Small(budget=9),
    "h2o": Small(budget=9),
    "tova": Small(budget=9),
    "knorm": Small(budget=9),
    "snapkv": Small(budget=9, fields={"SnapKV": {"window": 3}}),
    "pyramidkv": Small(budget=9, fields={"PyramidKV": {"window": 3}}),
    "keydiff": Small(budget=9),
    "quest": Small(budget=12, fields={"Quest": {"page": 4}}),
    "minference": Small(prompt=200, fields={"MInference": {"vertical": 30, "slash": 50}}, whole=True),
    "xattention": Small(fields={"XAttention": {"tau": 0.5, "stride": 2, "block": 4}}),
    "kvquant": Small(fields={"KVQuant": {"bits": 2}}),
    "int8": Small(),
    "int4": Small(),
    "kivi2": Small(fields=_KIVI),
    "kivi4": Small(fields=_KIVI),
    # pages of 64 tokens
    "int4_pages": Small(prompt=150, fields={"Flush": {"keep": 16}}),
    "duo_int4": Small(fields={"SinkWindow": {"sink": 2, "window": 7}}),
}


def with_fields(value: Any, changes: Mapping[str, Mapping[str, Any]]) -> tuple[Any, set[str]]:
    """Return `value` with fields of nested dataclasses replaced, all of one dataclass at once, and the class names that were met.

    Args:
      value: a frozen dataclass, or a tuple of them.
      changes: class name -> field -> value.
    """
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        parts = [with_fields(part, changes) for part in value]
        return tuple(part for part, _ in parts), set().union(*(met for _, met in parts))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value, set()
    name, met, new = type(value).__name__, set(), {}
    for f in dataclasses.fields(value):
        if f.init:
            old = getattr(value, f.name)
            inner, inner_met = with_fields(old, changes)
            met |= inner_met
            if inner is not old and inner != old:
                new[f.name] = inner
    if name in changes:
        met.add(name)
        new |= changes[name]
    return (dataclasses.replace(value, **new) if new else value), met


def small_experiment(name: str) -> Experiment:
    """Return the config with the sizes of SETTINGS.

    Raises:
      UserError: a class that SETTINGS names is not part of the config.
    """
    small = SETTINGS[name]
    experiment, met = with_fields(config_of(name), small.fields)
    missing = sorted(set(small.fields) - met)
    if missing:
        raise UserError(f"SETTINGS[{name!r}]: {missing} is not part of the config; name the class as it is called now")
    return experiment if small.budget is None else experiment.with_budget(small.prompt, budget=small.budget)


def config_of(name: str) -> Any:
    """Return the config of a method, an Experiment."""
    return load_config(ROOT / "configs" / f"{name}.py")


def method_names() -> list[str]:
    """Return the configs of one method that have a line in SETTINGS; one that is new has no before, and needs none."""
    names = [path.stem for path in all_configs() if isinstance(load_config(path), Experiment)]
    return [name for name in names if name in SETTINGS]


def aux_of(experiment: Experiment, model: ModelConfig, scores: list[list[int]]) -> Any:
    """Return the arrays of a config's method: heads of both kinds by `scores`, and random numbers for what its parts declare."""
    recipe = experiment.recipe
    declared = {n: a for n, a in recipe.arrays(model).items() if not a.optional}
    split = any(links[0].heads != "all" for links in recipe.chains)
    layers: list[dict[str, Any]] = [*split_by_score(scores, 0.5)] if split else [{} for _ in scores]
    rng = np.random.default_rng(3)
    for layer in layers:
        if declared:
            layer["arrays"] = {n: rng.standard_normal(a.full(model)).astype(a.dtype) for n, a in declared.items()}
    return layers if any(layers) else None


# the tiny model


class Compilations:
    """Counter of the programs that XLA compiles in this process."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"


def play(session: Session, tokens: np.ndarray, prompt: int) -> tuple[np.ndarray, int]:
    """Return logits [1 + STEPS + LAST_STEP,B,V] and the bytes of the cache after the prompt."""
    logits = [np.asarray(session.prefill(tokens[:, :prompt], [prompt, SHORT]))[None]]
    held = session.cache_bytes
    for i in range(prompt, prompt + STEPS):
        logits.append(np.asarray(session.step(tokens[:, i : i + 1]))[None])
    last = session.step(tokens[:, prompt + STEPS :], rows="all")
    return np.concatenate([*logits, row_logits(session, last)]).astype(np.float32), held


def record_tiny(name: str, layers: Layers, compilations: Compilations) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the quantities of a config on the tiny model, and logits by mode."""
    experiment, prompt, new = small_experiment(name), SETTINGS[name].prompt, STEPS + LAST_STEP
    aux = aux_of(experiment, TINY, TINY_SCORES)
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, prompt + new))
    quantities: dict[str, Any] = {}
    logits = {}
    for phase in ("prefill", "decode"):
        size = recipe_bytes(experiment, phase, TINY, prompt, new, aux, 2, "float32")
        quantities[f"recipe_bytes, {phase}"] = size
        long = aux_of(experiment, LLAMA3_8B, LLAMA_SCORES)
        size = recipe_bytes(config_of(name), phase, LLAMA3_8B, LONG, 0, long, 1, "bfloat16")
        quantities[f"recipe_bytes, {phase}, {LONG:,} tokens"] = size
    for mode, schedule in (("one shot", OneShot()), (f"chunks of {CHUNK}", Chunked(CHUNK))):
        try:
            session = Session(layers, experiment.recipe, prompt, new, aux=aux, batch=2, schedule=schedule)
        # a method may need the whole prompt at once: the refusal itself is recorded
        except UserError:
            quantities[f"{mode}, refused"] = True
            continue
        compiled = session.compile(prefill=prompt, steps=(1,))
        logits[mode], after_prompt = play(session, tokens, prompt)
        if not np.isfinite(logits[mode]).all():
            raise UserError(
                f"config={name!r}, {mode}: logits are not finite; mend the method before figures are recorded"
            )
        measured = {
            "refused": False,
            "num_programs": compiled.num_programs,
            "cache_bytes, prompt": after_prompt,
            "cache_bytes, end": session.cache_bytes,
            "peak_cache_bytes": session.peak_cache_bytes,
            "peak_cache_bytes, predicted": session.predicted_peak_cache_bytes(),
        }
        session.reset()
        before = compilations.count
        play(session, (tokens + 1) % TINY.vocab_size, prompt)
        measured["recompilations"] = compilations.count - before
        quantities |= {f"{mode}, {quantity}": value for quantity, value in measured.items()}
    return quantities, logits


# scratch memory


def record_temp(name: str) -> dict[str, Any]:
    """Return the quantities of a config's compiled programs, at its own sizes."""
    experiment = config_of(name)
    aux = aux_of(experiment, LLAMA3_8B, LLAMA_SCORES)
    experiment = dataclasses.replace(experiment, schedule=OneShot() if SETTINGS[name].whole else Chunked(LONG_CHUNK))
    quantities = {}
    for device, (tokens, dtype) in DEVICES.items():
        count = 0
        for program, report in layer_programs(experiment, LLAMA3_8B, tokens, dtype, device, aux):
            quantities[f"{device}, {program}, temp"] = report.temp_size_in_bytes
            quantities[f"{device}, {program}, alias"] = report.alias_size_in_bytes
            count += 1
        quantities[f"{device}, num_programs"] = count
    return quantities
