"""The programs of a session: which ones run, what they are compiled from, and what is alive while they do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcx import checks
from lcx.axes import Aux
from lcx.backends.choose import resolve
from lcx.cache import LayerCache, shape_bytes
from lcx.ctx import Step
from lcx.models.decoder import Layers, Model
from lcx.programs import block_program, commit_program, peek_program, repack_program
from lcx.recipe import Recipe
from lcx.schedules.chunked import OneShot
from lcx.storage import Shape

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Compiled:
    """Cost and findings of compiling ahead.

    Attributes:
      seconds: time spent.
      num_programs: distinct programs of layers.
      temp_bytes: XLA's scratch memory of the largest program, beside its arguments and results.
      extra_bytes: most that a program holds beside weights and caches: scratch, residual stream and logits.
      plans: phase -> XLA's argument, output, alias, temp and peak bytes of the phase's largest program of a layer.
    """

    seconds: float
    num_programs: int
    temp_bytes: int
    extra_bytes: int
    plans: dict[str, dict[str, int]]


class Moment(NamedTuple):
    """A program's turn: what all caches that are alive then take.

    Attributes:
      phase: "prefill", "repack" or "decode".
      layer: whose program it is.
      cache_bytes: of all layers' caches, the ones that it makes among them.
    """

    phase: str
    layer: int
    cache_bytes: int


@dataclass(frozen=True)
class Call:
    """One program of a session with its arguments, arrays or shapes: to be run, compiled ahead or planned.

    Attributes:
      name: "prefill", "repack", "decode", "peek" or "commit".
      layer: the first layer that runs it; layers of one kind share it.
      tokens: of the step; 0 for the end of the prompt.
      key: equal for calls that share a program within a session.
      program, args, static: what is compiled.
    """

    name: str
    layer: int
    tokens: int
    key: Any
    program: Any
    args: tuple[Any, ...]
    static: dict[str, Any]


class SessionPrograms:
    """A recipe on a model at one size: its programs by phase and layer, and the memory that they take.  Holds no cache.

    The arguments are those of `Session`, in order.
    """

    def __init__(
        self,
        model: Model | Layers,
        recipe: Recipe,
        prompt: int,
        new_tokens: int,
        aux: Aux | None,
        batch: int,
        schedule,
        implementation: str | None = None,
        order: str = "attend",
    ):
        checks.kind("model", model, Model, Layers)
        checks.kind("recipe", recipe, Recipe)
        checks.whole("prompt", prompt, 1)
        checks.whole("new_tokens", new_tokens, 0)
        checks.whole("batch", batch, 1)
        checks.order(recipe, order)
        self.implementation, self.order = resolve(implementation), order
        self.layers = model if isinstance(model, Layers) else Layers.of(model)
        # RoPE may depend on the length of the text
        self.config = self.layers.config.at_length(prompt + new_tokens)
        self.recipe, self.prompt, self.new_tokens, self.batch = recipe, prompt, new_tokens, batch
        self.schedule = OneShot() if schedule is None else schedule
        checks.aux_of(aux, self.config.num_layers)
        recipe.check(self.config, aux)
        checks.schedule(recipe, self.schedule, prompt)
        self.shape = Shape(self.config, prompt, new_tokens, batch, self.layers.dtype)
        self._raw_aux = aux
        self._last = recipe.phases[-1]
        layers = range(self.config.num_layers)
        whole = {phase: [recipe.at(phase, i, self.config) for i in layers] for phase in recipe.phases}
        # segments as chains in every phase: recipes that do the same are equal, and a step of one phase may mix with the other's
        self.recipes = {
            phase: [replace(r.program(), segments=r.program().chains) for r in rs] for phase, rs in whole.items()
        }
        self.aux = [jax.tree.map(jnp.asarray, dict(aux[i]) if aux else {}) for i in layers]
        # settings as numbers, by phase and layer
        self.data = {phase: [jax.tree.map(jnp.asarray, r.data()) for r in rs] for phase, rs in whole.items()}
        self._programs: dict[Any, Any] = {}
        self._numbers: dict[Any, int] = {}
        # phase -> a number for each layer; layers that differ neither in recipe nor in shapes share it, and a program
        self.kinds = {phase: [self._kind(phase, i) for i in layers] for phase in self.recipes}

    def arrays(self, phase: str, layer: int) -> dict[str, Any]:
        """Arguments of a layer's programs beside the cache: heads, the method's arrays, and settings as numbers."""
        data = self.data[phase][layer]
        return self.aux[layer] | ({"data": data} if data else {})

    def _kind(self, phase: str, layer: int) -> int:
        cache = jax.eval_shape(lambda: self.empty(phase, layer))
        leaves, tree = jax.tree.flatten((cache, self.arrays(phase, layer)))
        shapes = tuple((x.shape, jnp.dtype(x.dtype)) for x in leaves)
        key = (phase, self.recipes[phase][layer], self.config.is_local(layer), tree, shapes)
        return self._numbers.setdefault(key, len(self._numbers))

    def empty(self, phase: str, layer: int) -> LayerCache:
        """The cache of a layer before its first token."""
        return self.recipe.init_layer(phase, layer, self.shape, self._raw_aux)

    def _static(self, phase: str, layer: int) -> dict[str, Any]:
        return {
            "config": self.config,
            "recipe": self.recipes[phase][layer],
            "local": self.config.is_local(layer),
            "implementation": self.implementation,
        }

    def block_call(self, phase: str, layer: int, x, step: Step, cache) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of `block_program` for one layer, so that it can be run or compiled ahead."""
        graph, state = self.layers.layers[layer]
        static = self._static(phase, layer) | {"graph": graph, "order": self.order}
        return (state, x, step, cache, self.arrays(phase, layer)), static

    def peek_call(self, layer: int, x, step: Step, cache, as_stored: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of `peek_program` for one layer."""
        graph, state = self.layers.layers[layer]
        return (state, x, step, cache, self.arrays(DECODE, layer)), self._static(DECODE, layer) | {
            "graph": graph,
            "as_stored": as_stored,
        }

    def peek_key(self, layer: int, tokens: int, as_stored: bool) -> Any:
        """Equal for layers that share the program of a peeked step."""
        return "peek", self.kinds[DECODE][layer], tokens, as_stored

    def commit_call(self, layer: int, pending, step: Step, cache) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of `commit_program` for one layer."""
        return (pending, step, cache, self.arrays(DECODE, layer)), self._static(DECODE, layer)

    def commit_key(self, layer: int, tokens: int) -> Any:
        """Equal for layers that share the program that writes a peeked step."""
        return "commit", self.kinds[DECODE][layer], tokens

    def repack_call(self, layer: int, cache, empty) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of `repack_program` for one layer; `empty` is a `LayerCache` of decode."""
        kept = {c[0].name: c for c in self.recipes[self._last][layer].chains if c[0].compress is not None}
        fresh = {s.name: empty[s.name] for chain in kept.values() for s in chain}
        static = {
            "config": self.config,
            "recipe": self.recipes[self._last][layer],
            "old_recipe": self.recipes[PREFILL][layer],
            "local": self.config.is_local(layer),
            "widths": self.recipe.kept(layer, self.shape),
        }
        return (cache, fresh, self.arrays(self._last, layer)), static

    def repack_key(self, layer: int) -> Any:
        """Equal for layers that share the program of the end of the prompt."""
        return self.kinds[PREFILL][layer], self.kinds[self._last][layer], self.recipe.kept(layer, self.shape)

    def step_shape(self, tokens: int) -> tuple[Any, Step]:
        """Shapes of the residual stream and of the places of a step of `tokens` tokens."""
        x = jax.ShapeDtypeStruct((self.batch, tokens, self.config.d_model), self.layers.dtype)
        place: Any = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
        return x, Step(place(self.batch, tokens), place(self.batch))

    def calls(
        self, prefill: int | None = None, steps: Sequence[int] = (), peek: int = 0, as_stored: bool = False
    ) -> list[Call]:
        """Every distinct program that `prefill` of this many tokens and steps of these many tokens run, with shapes for arguments.

        `peek`: tokens of a peeked step, with its commit; 0: none is peeked.
        """
        checks.whole("peek", peek, 0)
        wanted = []
        if prefill is not None:
            wanted.append((PREFILL, self.schedule.width(checks.whole("prefill", prefill, 1))))
        wanted += [(DECODE, checks.whole("steps", n, 1)) for n in checks.listed("steps", steps)]
        calls: dict[Any, Call] = {}
        shapes: dict[tuple[str, int], LayerCache] = {}

        def cache_of(phase: str, layer: int) -> LayerCache:
            kind = (phase, self.kinds[phase][layer])
            if kind not in shapes:
                shapes[kind] = jax.eval_shape(lambda: self.empty(phase, layer))
            return shapes[kind]

        for phase, tokens in wanted:
            x, step = self.step_shape(tokens)
            for i, kind in enumerate(self.kinds[phase]):
                cache = cache_of(phase, i)
                key = (kind, tokens)
                if key not in calls:
                    calls[key] = Call(phase, i, tokens, key, block_program, *self.block_call(phase, i, x, step, cache))
                if phase == PREFILL and self.recipe.compresses:
                    key = self.repack_key(i)
                    if key not in calls:
                        call = self.repack_call(i, cache, cache_of(self._last, i))
                        calls[key] = Call("repack", i, 0, key, repack_program, *call)
        for i in range(self.config.num_layers if peek else 0):
            (x, step), cache, key = self.step_shape(peek), cache_of(DECODE, i), self.peek_key(i, peek, as_stored)
            if key not in calls:
                args, static = self.peek_call(i, x, step, cache, as_stored)
                calls[key] = Call("peek", i, peek, key, peek_program, args, static)
                _, pending, _ = jax.eval_shape(partial(peek_program, **static), *args)
                key = self.commit_key(i, peek)
                calls[key] = Call("commit", i, peek, key, commit_program, *self.commit_call(i, pending, step, cache))
        return list(calls.values())

    def compile(
        self, prefill: int | None = None, steps: Sequence[int] = (), peek: int = 0, as_stored: bool = False
    ) -> Compiled:
        """Compile ahead what `prefill` of this many tokens and steps of these many tokens will run; arguments as in `calls`.

        Without it each program is compiled when it is first needed.
        """
        start = time.perf_counter()
        calls = self.calls(prefill, steps, peek, as_stored)
        fresh = [call for call in calls if call.key not in self._programs]
        lowered = [call.program.lower(*call.args, **call.static) for call in fresh]
        # XLA compiles outside the interpreter's lock, most of the time on one core
        with ThreadPoolExecutor(max_workers=2) as pool:
            compiled = pool.map(lambda program: program.compile(), lowered)
            self._programs |= zip((call.key for call in fresh), compiled, strict=True)
        reports = {call.key: self._programs[call.key].memory_analysis() for call in calls}
        plans: dict[str, dict[str, int]] = {}
        for call in calls:
            # a phase's steps of one token are decode; the longer ones of it read a continuation
            if call.name == PREFILL or (call.name == DECODE and call.tokens == 1):
                plan = _plan(reports[call.key])
                if call.name not in plans or plans[call.name]["peak"] < plan["peak"]:
                    plans[call.name] = plan
        self.layers.logits(jnp.zeros((self.batch, self.config.d_model), self.layers.dtype)).block_until_ready()
        temp = max((r.temp_size_in_bytes for r in reports.values()), default=0)
        widest = max((call.tokens for call in calls), default=1)
        stream = 2 * self.batch * max(widest, 1) * self.config.d_model * jnp.dtype(self.layers.dtype).itemsize
        return Compiled(time.perf_counter() - start, len(fresh), temp, temp + stream, plans)

    # ---- memory

    def moments(self) -> list[Moment]:
        """Bytes of the caches while a prompt of `prompt` tokens and the steps after it run, from shapes alone, in order.

        A step that reads the whole prompt compresses a layer's cache before it makes the next; in chunks every prompt cache is whole
        before the first is compressed.
        """
        before, after = self._layer_bytes(PREFILL), self._layer_bytes(self._last)
        compresses = self.recipe.compresses
        at_once = not compresses or self.schedule.width(self.prompt) < self.prompt
        moments = []
        for i, size in enumerate(before):
            done = sum(after[:i]) if compresses else 0
            moments.append(Moment(PREFILL, i, sum(before) if at_once else done + size))
            if compresses:
                waiting = sum(before[i + 1 :]) if at_once else 0
                moments.append(Moment("repack", i, done + size + after[i] + waiting))
        return [*moments, *(Moment(DECODE, i, sum(after)) for i in range(len(after)))]

    def _layer_bytes(self, phase: str) -> list[int]:
        """Bytes of each layer's cache; layers of one kind are looked at once."""
        sizes: dict[int, int] = {}
        for i, kind in enumerate(self.kinds[phase]):
            if kind not in sizes:
                sizes[kind] = shape_bytes(jax.eval_shape(lambda i=i: self.empty(phase, i)))
        return [sizes[kind] for kind in self.kinds[phase]]

    def predicted_peak_cache_bytes(self) -> int:
        """Peak of the caches' bytes, `peak_cache_bytes`, after a prefill of `prompt` tokens, from shapes alone."""
        return max(moment.cache_bytes for moment in self.moments())


def _plan(report) -> dict[str, int]:
    """XLA's memory plan of a program in bytes.  Its own peak leaves out scratch on a CPU, so it is summed here."""
    plan = {
        "argument": report.argument_size_in_bytes,
        "output": report.output_size_in_bytes,
        "alias": report.alias_size_in_bytes,
        "temp": report.temp_size_in_bytes,
    }
    return plan | {"peak": plan["argument"] + plan["output"] + plan["temp"] - plan["alias"]}
