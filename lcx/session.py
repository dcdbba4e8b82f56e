"""Running a model under a recipe: prefill by a schedule, then steps of one or more tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.attention import EMPTY
from lcx.cache import device_bytes
from lcx.errors import UserError
from lcx.model import Layers, Model, block_program, embed_program, last_rows, repack_program
from lcx.recipe import Aux, Recipe
from lcx.schedules.chunked import OneShot


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

    Raises:
      UserError: a recipe that does not suit the model or the schedule, or aux that does not fit.
    """

    def __init__(
        self, model: Model | Layers, recipe: Recipe, prompt: int, new_tokens: int = 0, *, aux: Aux | None = None, batch=1, schedule=None
    ):
        self.layers = model if isinstance(model, Layers) else Layers.of(model)
        self.config = self.layers.config
        self.recipe, self.prompt, self.new_tokens, self.batch = recipe, prompt, new_tokens, batch
        self.schedule = schedule or OneShot()
        recipe.check(self.config, aux)
        if prompt < 1:
            raise UserError(f"prompt={prompt} must be at least 1 token")
        if recipe.one_shot and len(self.schedule.steps(prompt)) > 1:
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

    def _empty(self, phase: str, layer: int):
        return self.recipe.init_layer(
            self.config, layer, phase, self.sizes[phase], self._raw_aux, self.batch, self.layers.dtype
        )

    def block_call(self, phase: str, layer: int, x, pos, cache):
        """Arguments of `block_program` for one layer, so that it can be run or compiled ahead."""
        graph, state = self.layers.layers[layer]
        static = {
            "graph": graph,
            "config": self.config,
            "recipe": self.recipes[phase][layer],
            "local": self.config.is_local(layer),
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
        for i in range(self.config.num_layers):
            if self.cache[i] is None:
                self.cache[i] = self._empty(phase, i)
            args, static = self.block_call(phase, i, x, pos, self.cache[i])
            self.cache[i] = None
            x, self.cache[i] = block_program(*args, **static)
            if last and self.recipe.compresses:
                self._note_peak()
                args, static = self.repack_call(i, self.cache[i], self._empty("decode", i))
                self.cache[i] = repack_program(*args, **static)
        self._note_peak()
        return x

    def _note_peak(self):
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache_bytes)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the arrays that the cache holds now."""
        return device_bytes(self.cache)

    def prefill(self, tokens, lengths: Sequence[int] | None = None, *, rows: str = "last"):
        """Read the prompts.

        Args:
          tokens: int [B,T] (or [T] for one text), padded on the right.
          lengths: real tokens of each row; None: all T.
          rows: "last" for the logits after each text's last token, "all" for the residual stream of every token (one-shot only).

        Returns:
          float32 [B,V], or x [B,T,E] of the last step.
        """
        tokens = np.atleast_2d(np.asarray(tokens, np.int32))
        B, T = tokens.shape
        if B != self.batch or T > self.prompt:
            raise UserError(f"tokens have shape {tokens.shape}; the session is for batch {self.batch}, prompt {self.prompt}")
        lengths = np.full(B, T) if lengths is None else np.asarray(lengths)
        pos = np.where(np.arange(T) < lengths[:, None], np.arange(T), EMPTY).astype(np.int32)
        steps = self.schedule.steps(T)
        width = max(stop - start for start, stop in steps)
        wanted = [None] * B
        x = None
        for start, stop in steps:
            pad = ((0, 0), (0, width - (stop - start)))
            step_pos = jnp.asarray(np.pad(pos[:, start:stop], pad, constant_values=EMPTY))
            step_tokens = jnp.asarray(np.pad(tokens[:, start:stop], pad))
            x = embed_program(self.layers.embed, step_tokens, scale=self.config.embed_scale)
            x = self._blocks("prefill", x, step_pos, last=stop == T)
            if rows == "last":
                ends = last_rows(x, step_pos)
                for b in np.flatnonzero((lengths - 1 >= start) & (lengths - 1 < stop)):
                    wanted[b] = ends[b]
        self.next_pos = lengths.astype(np.int32)
        return x if rows == "all" else self.layers.logits(jnp.stack(wanted))

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


def generate(session: Session, prompt, num_tokens: int, *, stop: Sequence[int] = ()) -> Iterator[int]:
    """Greedy tokens of one text, one by one, until `num_tokens` or one of `stop`."""
    logits = session.prefill(prompt)
    for i in range(num_tokens):
        token = int(jnp.argmax(logits[0]))
        yield token
        if token in stop or i + 1 == num_tokens:
            return
        logits = session.step([[token]])
