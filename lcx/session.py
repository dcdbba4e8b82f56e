"""Running a model under a recipe: prefill by a schedule, then steps of one or more tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcx.attention import EMPTY
from lcx.cache import device_bytes, shape_bytes
from lcx.errors import UserError
from lcx.implementation import resolve
from lcx.model import Layers, Model, block_program, embed_program, last_rows, repack_program
from lcx.recipe import Aux, Recipe
from lcx.schedules.chunked import OneShot


@dataclass(frozen=True)
class Compiled:
    """What compiling ahead took and found.

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


class Session:
    """One batch of texts under one recipe: holds the cache and knows how far each text has come.

    Args:
      model: a `Model`, or its `Layers` (saves splitting it again).
      recipe: the method.
      prompt: tokens of the longest prompt; sets capacities.
      new_tokens: tokens that may follow it.
      aux: the method's arrays, one dict a layer.
      batch: texts side by side.
      schedule: `OneShot()` or `Chunked(size)`.
      implementation: of attention: None, "xla", "pallas" or "cudnn", see `lcx.implementation`.

    Raises:
      UserError: a recipe that does not suit the model or the schedule, or aux that does not fit.
    """

    def __init__(
        self,
        model: Model | Layers,
        recipe: Recipe,
        prompt: int,
        new_tokens: int = 0,
        *,
        aux: Aux | None = None,
        batch=1,
        schedule=None,
        implementation: str | None = None,
    ):
        self.implementation = resolve(implementation)
        self.layers = model if isinstance(model, Layers) else Layers.of(model)
        # RoPE may depend on the length of the text
        self.config = self.layers.config.at_length(prompt + new_tokens)
        self.recipe, self.prompt, self.new_tokens, self.batch = recipe, prompt, new_tokens, batch
        self.schedule = schedule or OneShot()
        recipe.check(self.config, aux)
        if prompt < 1:
            raise UserError(f"prompt={prompt} must be at least 1 token")
        if recipe.one_shot and self.schedule.width(prompt) < prompt:
            raise UserError(
                f"{type(recipe.pattern).__name__} needs the whole prompt at once; schedule {self.schedule} cuts {prompt} tokens"
            )
        self.aux = [jax.tree.map(jnp.asarray, aux[i] if aux else {}) for i in range(self.config.num_layers)]
        self._raw_aux = aux
        self.recipes = {
            phase: [recipe.at(phase, i) for i in range(self.config.num_layers)] for phase in ("prefill", "decode")
        }
        self.sizes = {phase: recipe.capacities(phase, prompt, new_tokens) for phase in ("prefill", "decode")}
        self.cache: list[dict[str, Any] | None] = [None] * self.config.num_layers
        self.next_pos = np.zeros(batch, np.int32)
        self.peak_cache_bytes = 0
        # called with (phase, layer, x [B,T,E]) after each layer, to look for values that are not finite
        self.watch: Callable[[str, int, jax.Array], None] | None = None
        self._programs: dict[Any, Any] = {}
        # phase -> a number for each layer; layers that differ neither in recipe nor in shapes share it, and a program
        self.kinds = {phase: [self._kind(phase, i) for i in range(self.config.num_layers)] for phase in self.recipes}

    def _kind(self, phase: str, layer: int):
        cache = jax.eval_shape(lambda: self.empty(phase, layer))
        leaves, tree = jax.tree.flatten((cache, self.aux[layer]))
        shapes = tuple((x.shape, jnp.dtype(x.dtype)) for x in leaves)
        return hash((phase, self.recipes[phase][layer], self.config.is_local(layer), tree, shapes))

    def compile(self, prefill: int | None = None, steps: Sequence[int] = ()) -> Compiled:
        """Compile ahead what `prefill` of this many tokens and steps of these many tokens will run.

        Without it each program is compiled when it is first needed.
        """
        start = time.perf_counter()
        wanted = [("decode", n) for n in steps]
        if prefill is not None:
            wanted.append(("prefill", self.schedule.width(prefill)))
        calls: dict[Any, Any] = {}
        for phase, tokens in wanted:
            x = jax.ShapeDtypeStruct((self.batch, tokens, self.config.d_model), self.layers.dtype)
            pos = jax.ShapeDtypeStruct((self.batch, tokens), jnp.int32)
            for i, kind in enumerate(self.kinds[phase]):
                cache = jax.eval_shape(lambda i=i, phase=phase: self.empty(phase, i))
                calls.setdefault((kind, tokens), (block_program, self.block_call(phase, i, x, pos, cache)))
                if phase == "prefill" and self.recipe.compresses:
                    empty = jax.eval_shape(lambda i=i: self.empty("decode", i))
                    key = (kind, self.kinds["decode"][i])
                    calls.setdefault(key, (repack_program, self.repack_call(i, cache, empty)))
        fresh = [key for key in calls if key not in self._programs]
        lowered = [calls[key][0].lower(*calls[key][1][0], **calls[key][1][1]) for key in fresh]
        # XLA compiles outside the interpreter's lock, most of the time on one core
        with ThreadPoolExecutor(max_workers=2) as pool:
            self._programs |= zip(fresh, pool.map(lambda program: program.compile(), lowered), strict=True)
        reports = [self._programs[key].memory_analysis() for key in calls]
        plans: dict[str, dict[str, int]] = {}
        for phase, tokens in wanted:
            here = [_plan(self._programs[kind, tokens].memory_analysis()) for kind in self.kinds[phase]]
            largest = max(here, key=lambda plan: plan["peak"])
            # a phase's steps of one token are decode; the longer ones of it read a continuation
            if phase == "prefill" or tokens == 1:
                plans[phase] = largest
        self.layers.logits(jnp.zeros((self.batch, self.config.d_model), self.layers.dtype)).block_until_ready()
        temp = max((r.temp_size_in_bytes for r in reports), default=0)
        widest = max((n for _, n in wanted), default=1)
        stream = 2 * self.batch * widest * self.config.d_model * jnp.dtype(self.layers.dtype).itemsize
        return Compiled(time.perf_counter() - start, len(fresh), temp, temp + stream, plans)

    def empty(self, phase: str, layer: int):
        """The cache of a layer before its first token."""
        return self.recipe.init_layer(
            self.config, layer, phase, self.sizes[phase], self._raw_aux, self.batch, self.layers.dtype
        )

    def moments(self) -> list[Moment]:
        """What the caches take while a prompt of `prompt` tokens and the steps after it run, from shapes alone, in order.

        A step that reads the whole prompt compresses a layer's cache before it makes the next; in chunks every prompt cache is whole
        before the first is compressed.
        """
        before, after = self._layer_bytes("prefill"), self._layer_bytes("decode")
        compresses = self.recipe.compresses
        at_once = not compresses or self.schedule.width(self.prompt) < self.prompt
        found = []
        for i, size in enumerate(before):
            done = sum(after[:i]) if compresses else 0
            found.append(Moment("prefill", i, sum(before) if at_once else done + size))
            if compresses:
                waiting = sum(before[i + 1 :]) if at_once else 0
                found.append(Moment("repack", i, done + size + after[i] + waiting))
        return [*found, *(Moment("decode", i, sum(after)) for i in range(len(after)))]

    def _layer_bytes(self, phase: str) -> list[int]:
        """Bytes of each layer's cache; layers of one kind are looked at once."""
        sizes: dict[int, int] = {}
        for i, kind in enumerate(self.kinds[phase]):
            if kind not in sizes:
                sizes[kind] = shape_bytes(jax.eval_shape(lambda i=i: self.empty(phase, i)))
        return [sizes[kind] for kind in self.kinds[phase]]

    def predicted_peak_cache_bytes(self) -> int:
        """What `peak_cache_bytes` will be after a prefill of `prompt` tokens, from shapes alone."""
        return max(moment.cache_bytes for moment in self.moments())

    def reset(self) -> None:
        """Forget the texts; compiled programs stay."""
        self.cache = [None] * self.config.num_layers
        self.next_pos = np.zeros(self.batch, np.int32)

    def block_call(self, phase: str, layer: int, x, pos, cache):
        """Arguments of `block_program` for one layer, so that it can be run or compiled ahead."""
        graph, state = self.layers.layers[layer]
        static = {
            "graph": graph,
            "config": self.config,
            "recipe": self.recipes[phase][layer],
            "local": self.config.is_local(layer),
            "implementation": self.implementation,
        }
        return (state, x, pos, cache, self.aux[layer]), static

    def repack_call(self, layer: int, cache, empty):
        """Arguments of `repack_program` for one layer."""
        static = {
            "config": self.config,
            "recipe": self.recipes["decode"][layer],
            "old_recipe": self.recipes["prefill"][layer],
            "local": self.config.is_local(layer),
        }
        return (cache, empty, self.aux[layer]), static

    def _blocks(self, phase: str, x, pos, last: bool = False):
        if not self.recipe.compresses:
            # all at once, before the device is busy; a cache that will be compressed waits, so that few are whole at a time
            self.cache = [self.empty(phase, i) if c is None else c for i, c in enumerate(self.cache)]
        for i in range(self.config.num_layers):
            if self.cache[i] is None:
                self.cache[i] = self.empty(phase, i)
            args, static = self.block_call(phase, i, x, pos, self.cache[i])
            self.cache[i] = None
            kind = self.kinds[phase][i]
            program = self._programs.get((kind, x.shape[1]))
            x, self.cache[i] = block_program(*args, **static) if program is None else program(*args)
            if self.watch is not None:
                self.watch(phase, i, x)
            if last and self.recipe.compresses:
                empty = self.empty("decode", i)
                self._note_peak(device_bytes(empty))
                args, static = self.repack_call(i, self.cache[i], empty)
                program = self._programs.get((kind, self.kinds["decode"][i]))
                self.cache[i] = repack_program(*args, **static) if program is None else program(*args)
        if phase == "prefill":
            self._note_peak()
        return x

    def _note_peak(self, beside: int = 0):
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache_bytes + beside)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the arrays that the cache holds now."""
        return device_bytes(self.cache)

    def prefill(self, tokens, lengths: Sequence[int] | None = None, *, rows: str = "last"):
        """Read the prompts.

        Args:
          tokens: int [B,T] (or [T] for one text), padded on the right.
          lengths: real tokens of each row; None: all T.
          rows: "last" for the logits after each text's last token, "all" for the residual stream of every token.

        Returns:
          float32 [B,V], or x [B,T,E].
        """
        tokens = np.atleast_2d(np.asarray(tokens, np.int32))
        B, T = tokens.shape
        if B != self.batch or T > self.prompt:
            raise UserError(
                f"tokens have shape {tokens.shape}; the session is for batch {self.batch}, prompt {self.prompt}"
            )
        real = np.full(B, T) if lengths is None else np.asarray(lengths)
        pos = np.where(np.arange(T) < real[:, None], np.arange(T), EMPTY).astype(np.int32)
        steps = self.schedule.steps(T)
        width = self.schedule.width(T)
        wanted: list[Any] = [None] * B
        streams = []
        for start, stop in steps:
            pad = ((0, 0), (0, width - (stop - start)))
            step_pos = jnp.asarray(np.pad(pos[:, start:stop], pad, constant_values=EMPTY))
            step_tokens = jnp.asarray(np.pad(tokens[:, start:stop], pad))
            x = embed_program(self.layers.embed, step_tokens, scale=self.config.embed_scale)
            x = self._blocks("prefill", x, step_pos, last=stop == T)
            if rows == "all":
                streams.append(x[:, : stop - start])
            else:
                ends = last_rows(x, step_pos)
                for b in np.flatnonzero((real - 1 >= start) & (real - 1 < stop)):
                    wanted[b] = ends[b]
        self.next_pos = real.astype(np.int32)
        if rows == "all":
            return streams[0] if len(streams) == 1 else jnp.concatenate(streams, 1)
        return self.layers.logits(jnp.stack(wanted))

    def step(self, tokens, *, rows: str = "last"):
        """Feed tokens at their true positions.

        Args:
          tokens: int [B,T] (or [T]); every row has T real tokens.
          rows: "last" or "all", as in `prefill`.

        Returns:
          float32 [B,V] after the last token, or x [B,T,E].
        """
        tokens = jnp.atleast_2d(jnp.asarray(tokens, jnp.int32))
        pos = jnp.asarray(self.next_pos[:, None] + np.arange(tokens.shape[1], dtype=np.int32))
        x = embed_program(self.layers.embed, tokens, scale=self.config.embed_scale)
        x = self._blocks("decode", x, pos)
        self.next_pos = self.next_pos + tokens.shape[1]
        return x if rows == "all" else self.layers.logits(x[:, -1])


def _plan(report) -> dict[str, int]:
    """XLA's memory plan of a program in bytes.  Its own peak leaves out scratch on a CPU, so it is summed here."""
    found = {
        "argument": report.argument_size_in_bytes,
        "output": report.output_size_in_bytes,
        "alias": report.alias_size_in_bytes,
        "temp": report.temp_size_in_bytes,
    }
    return found | {"peak": found["argument"] + found["output"] + found["temp"] - found["alias"]}


def generate(
    session: Session, prompt, num_tokens: int, *, stop: Sequence[int] = (), choose: Callable | None = None
) -> Iterator[int]:
    """Greedy tokens of one text, one by one, until `num_tokens` or one of `stop`.

    `choose`: logits [B,V] -> token ids [B], such as `Pretrained.choose`; None: the largest logit.
    """
    choose = choose or (lambda logits: jnp.argmax(logits, -1))
    logits = session.prefill(prompt)
    for i in range(num_tokens):
        token = int(choose(logits)[0])
        yield token
        if token in stop or i + 1 == num_tokens:
            return
        logits = session.step([[token]])
