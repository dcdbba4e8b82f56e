"""Running a model under a recipe: prefill by a schedule, then steps of one or more tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx import checks
from lcx.axes import Aux
from lcx.cache import LayerCache, device_bytes
from lcx.ctx import Step
from lcx.errors import NotFinite, UserError
from lcx.models.decoder import Layers, Model, embed_program, last_rows
from lcx.ops.attention import EMPTY
from lcx.programs import block_program, commit_program, forget_program, peek_program, repack_program
from lcx.recipe import Recipe
from lcx.session_programs import DECODE, PREFILL, SessionPrograms


class Session(SessionPrograms):
    """One batch of texts under one recipe: holds the cache and knows how far each text has come.

    Args:
      model: a `Model`, or its `Layers` (saves splitting it again).
      recipe: the method.
      prompt: tokens of the longest prompt; sets capacities.
      new_tokens: tokens that may follow it.
      aux: the method's arrays, one dict a layer.
      batch: texts side by side.
      schedule: `OneShot()` or `Chunked(size)`.
      implementation: of attention: None, "xla", "pallas" or "cudnn", see `lcx.backends.choose`.
      order: "attend" (a step reads what is held and its own tokens, then writes), or "write" (it writes first and reads its own tokens as
        they are stored, the protocol of KVQuant's perplexities); only for recipes that keep every token.
      check_finite: `prefill` and `step` wait for their logits and raise where one is nan; False: they return at once, unchecked.

    Raises:
      UserError: a size out of range, a recipe that does not suit the model, the schedule or the order, or aux that does not fit.
    """

    def __init__(
        self,
        model: Model | Layers,
        recipe: Recipe,
        prompt: int,
        new_tokens: int = 0,
        *,
        aux: Aux | None = None,
        batch: int = 1,
        schedule=None,
        implementation: str | None = None,
        order: str = "attend",
        check_finite: bool = True,
    ):
        super().__init__(model, recipe, prompt, new_tokens, aux, batch, schedule, implementation, order)
        self.cache: list[LayerCache | None] = [None] * self.config.num_layers
        self.check_finite = check_finite
        self.next_pos = np.zeros(batch, np.int32)
        # tokens of each row that have taken room; those that an evicting recipe has dropped among them
        self.written = np.zeros(batch, np.int64)
        self.pending: tuple[Step, list[Any]] | None = None
        self.peak_cache_bytes = 0
        self.notes: dict[str, jax.Array] = {}
        # called with (phase, layer, x [B,T,E]) after each layer, to look for values that are not finite
        self.watch: Callable[[str, int, jax.Array], None] | None = None

    # ---- memory

    @property
    def cache_bytes(self) -> int:
        """Bytes of the arrays that the cache holds now."""
        return device_bytes(self.cache)

    def _note_peak(self, beside: int = 0):
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache_bytes + beside)

    @property
    def overflow(self) -> int:
        """Pages that a pattern wanted to read and its lists had no place for, summed over steps, layers and heads; 0 is exact."""
        return int(self.notes.get("overflow", 0))

    def reset(self) -> None:
        """Forget the texts; compiled programs stay."""
        self.cache = [None] * self.config.num_layers
        self.next_pos = np.zeros(self.batch, np.int32)
        self.written, self.pending, self.notes = np.zeros(self.batch, np.int64), None, {}

    # ---- steps

    def _blocks(self, phase: str, x, step: Step, last: bool = False):
        if not self.recipe.compresses:
            # all at once, before the device is busy; a cache that will be compressed waits, so that few are whole at a time
            self.cache = [self.empty(phase, i) if c is None else c for i, c in enumerate(self.cache)]
        for i in range(self.config.num_layers):
            cache = self.cache[i]
            args, static = self.block_call(phase, i, x, step, self.empty(phase, i) if cache is None else cache)
            self.cache[i] = cache = None
            kind = self.kinds[phase][i]
            program = self._programs.get((kind, x.shape[1]))
            x, cache, notes = block_program(*args, **static) if program is None else program(*args)
            self.cache[i] = cache
            self._count(notes)
            if self.watch is not None:
                self.watch(phase, i, x)
            if last and self.recipe.compresses:
                self._repack(i)
        if phase == PREFILL:
            self._note_peak()
        return x

    def _repack(self, layer: int) -> None:
        """Turn a layer's cache of the prompt into that of decoding."""
        empty = self.empty(self._last, layer)
        self._note_peak(device_bytes(empty))
        args, static = self.repack_call(layer, self.cache[layer], empty)
        program = self._programs.get(self.repack_key(layer))
        self.cache[layer] = repack_program(*args, **static) if program is None else program(*args)

    def _count(self, notes: dict[str, jax.Array]) -> None:
        for name, count in notes.items():
            self.notes[name] = self.notes.get(name, 0) + count

    def prefill(self, tokens, lengths: Sequence[int] | None = None, *, rows: str = "last"):
        """Read the prompts.  A session that has read texts before forgets them.

        Args:
          tokens: int [B,T] (or [T] for one text), padded on the right.
          lengths: real tokens of each row, 1 to T; None: all T.
          rows: "last" for the logits after each text's last token, "all" for the residual stream of every token.

        Returns:
          float32 [B,V], or x [B,T,E].

        Raises:
          UserError: ids, shapes or lengths that do not fit; NotFinite: logits that are nan.
        """
        checks.one_of("rows", rows, ("last", "all"))
        tokens = checks.token_ids(tokens, self.batch, self.config.vocab_size)
        B, T = tokens.shape
        checks.fits("prompt", T, self.prompt)
        real = checks.lengths(lengths, B, T)
        if self.written.any() or self.pending is not None:
            self.reset()
        pos = np.where(np.arange(T) < real[:, None], np.arange(T), EMPTY).astype(np.int32)
        width = self.schedule.width(T)
        wanted: list[Any] = [None] * B
        streams = []
        for start, stop in self.schedule.steps(T):
            pad = ((0, 0), (0, width - (stop - start)))
            step_pos = np.pad(pos[:, start:stop], pad, constant_values=EMPTY)
            step = Step(jnp.asarray(step_pos), jnp.asarray(np.maximum(real - stop, 0), jnp.int32))
            x = self._embed(np.pad(tokens[:, start:stop], pad))
            x = self._blocks(PREFILL, x, step, last=stop == T)
            if rows == "all":
                streams.append(x[:, : stop - start])
            else:
                ends = last_rows(x, step.pos)
                for b in np.flatnonzero((real - 1 >= start) & (real - 1 < stop)):
                    wanted[b] = ends[b]
        self.next_pos = real.astype(np.int32)
        self.written = self._taken(real)
        if rows == "all":
            return streams[0] if len(streams) == 1 else jnp.concatenate(streams, 1)
        return self._logits(jnp.stack(wanted))

    def _logits(self, x: jax.Array) -> jax.Array:
        """Logits [B,V] of the residual stream [B,E]; a run that looks for the layer itself (`watch`) is not stopped."""
        logits = self.layers.logits(x)
        if self.check_finite and self.watch is None:
            bad = np.flatnonzero(np.asarray(jnp.isnan(logits).any(1)))
            if len(bad):
                row = int(bad[0])
                raise NotFinite(
                    f"logits of row {row} are nan after {int(self.next_pos[row])} tokens; "
                    "lcx.measure.finite.first_not_finite(session, run) names the layer"
                )
        return logits

    def _taken(self, real: np.ndarray) -> np.ndarray:
        """int64 [B], room that prompts of `real` [B] tokens have taken; slots that were cut off with a longer prompt are not there."""
        taken = real.astype(np.int64)
        widths = {width for i in range(self.config.num_layers) for _, width in self.recipe.kept(i, self.shape)}
        for width in widths:
            taken = np.maximum(taken, self.prompt - width + np.minimum(width, real))
        return taken

    def _embed(self, tokens) -> jax.Array:
        return embed_program(self.layers.embed, jnp.asarray(tokens, jnp.int32), scale=self.config.embed_scale)

    def _room(self, pos: np.ndarray) -> np.ndarray:
        """Return int [B] of real tokens a row; raise UserError where they have no place."""
        tokens = (pos != EMPTY).sum(1)
        left = self.prompt + self.new_tokens - self.written
        if (tokens > left).any():
            row = int((tokens - left).argmax())
            raise UserError(
                f"a step of {tokens[row]} tokens is beyond the session's room of {self.prompt} + {self.new_tokens}, of which "
                f"row {row} has {left[row]} left; make it with more new_tokens"
            )
        return tokens

    def step(self, tokens, *, rows: str = "last"):
        """Feed tokens at their true positions.

        Args:
          tokens: int [B,T] (or [T]); every row has T real tokens.
          rows: "last" or "all", as in `prefill`.

        Returns:
          float32 [B,V] after the last token, or x [B,T,E].

        Raises:
          UserError: ids or shapes that do not fit, or no room left; NotFinite: logits that are nan.
        """
        checks.one_of("rows", rows, ("last", "all"))
        tokens = checks.token_ids(tokens, self.batch, self.config.vocab_size)
        pos = self.next_pos[:, None] + np.arange(tokens.shape[1], dtype=np.int32)
        x = self.feed(tokens, pos)
        return x if rows == "all" else self._logits(x[:, -1])

    def feed(self, tokens, pos, *, phase: str = DECODE, left=None) -> jax.Array:
        """Feed tokens at given positions; rows may differ in how many are real, so that one decodes while another reads its prompt.

        Args:
          tokens: int [B,T] (or [T]).
          pos: int [B,T], positions in the text, EMPTY for padding.
          phase: of the recipe; one that compresses at the end of the prompt, or chooses by phase, cannot mix rows of both.
          left: int [B], prompt tokens of each row that are still to come; None: none.

        Returns:
          x [B,T,E], the residual stream.

        Raises:
          UserError: ids, shapes, positions or phase that do not fit, no room left, or a pending `peek`.
        """
        tokens = checks.token_ids(tokens, self.batch, self.config.vocab_size)
        pos, step = self._place(tokens, pos, phase, left)
        real = self._room(pos)
        x = self._blocks(phase, self._embed(tokens), step)
        self.written += real
        self.next_pos = np.maximum(self.next_pos, pos.max(1) + 1).astype(np.int32)
        return x

    def _place(self, tokens: np.ndarray, pos, phase: str, left) -> tuple[np.ndarray, Step]:
        """The checked positions of a step, for the host and for its programs."""
        if self.pending is not None:
            raise UserError("a peeked step waits for commit(accept); commit it before another step")
        checks.one_of("phase", phase, self.recipe.phases)
        pos = checks.positions(pos, tokens.shape, self.next_pos)
        if not self.written.any() and phase != PREFILL and self.recipes[PREFILL] != self.recipes[phase]:
            raise UserError(
                f"phase={phase!r} before any prompt: this recipe reads its prompt in another way; call prefill first"
            )
        if phase == PREFILL and self.recipe.compresses:
            raise UserError("phase='prefill' by feed: this recipe chooses at the end of the prompt; call prefill")
        if phase == PREFILL and self.recipe.one_shot:
            raise UserError("phase='prefill' by feed: this recipe needs the whole prompt at once; call prefill")
        rest = np.zeros(self.batch, np.int32) if left is None else checks.counts("left", left, self.batch)
        return pos, Step(jnp.asarray(pos), jnp.asarray(rest))

    def peek(self, tokens, pos=None, *, as_stored: bool = False) -> jax.Array:
        """A step that writes nothing until `commit`: x [B,T,E].

        Args:
          tokens: int [B,T] (or [T]), such as drafted tokens.
          pos: int [B,T]; None: the next positions of each row.
          as_stored: each token reads those before it in this step as they will be stored, so that a recipe which keeps every token
            gives what it gives for steps of one token; False: as they are, like `step`.

        Raises:
          UserError: as `feed`, a session whose order is "write", or `as_stored` for a recipe whose steps are more than their tokens.
        """
        if self.order != "attend":
            raise UserError(f"peek: order={self.order!r} writes before it reads; make the session with order='attend'")
        why = checks.by_step(self.recipes[DECODE]) if as_stored else None
        if why is not None:
            raise UserError(f"as_stored=True: {why}; allowed is as_stored=False")
        tokens = checks.token_ids(tokens, self.batch, self.config.vocab_size)
        if pos is None:
            pos = self.next_pos[:, None] + np.arange(tokens.shape[1], dtype=np.int32)
        place, step = self._place(tokens, pos, DECODE, None)
        self._room(place)
        x, pending = self._embed(tokens), []
        self.cache = [self.empty(DECODE, i) if c is None else c for i, c in enumerate(self.cache)]
        for i in range(self.config.num_layers):
            args, static = self.peek_call(i, x, step, self.cache[i], as_stored)
            program = self._programs.get(self.peek_key(i, tokens.shape[1], as_stored))
            x, kept, notes = peek_program(*args, **static) if program is None else program(*args)
            pending.append(kept)
            self._count(notes)
            if self.watch is not None:
                self.watch(DECODE, i, x)
        self.pending = (step, pending)
        return x

    def commit(self, accept) -> None:
        """Write the peeked tokens that are accepted; the others leave no trace.

        Args:
          accept: bool [B,T] (or [T]), or int [B] of leading tokens to keep.

        Raises:
          UserError: nothing was peeked, or a shape that does not fit.
        """
        if self.pending is None:
            raise UserError("commit: nothing is pending; call peek first")
        step, pending = self.pending
        accept = checks.accepted(accept, step.pos.shape)
        pos = np.where(accept, np.asarray(step.pos), EMPTY).astype(np.int32)
        place = replace(step, pos=jnp.asarray(pos))
        for i, kept in enumerate(pending):
            cache, self.cache[i] = self.cache[i], None
            args, static = self.commit_call(i, kept, place, cache)
            program = self._programs.get(self.commit_key(i, pos.shape[1]))
            self.cache[i] = commit_program(*args, **static) if program is None else program(*args)
        self.pending = None
        self.written += (pos != EMPTY).sum(1)
        self.next_pos = np.maximum(self.next_pos, pos.max(1) + 1).astype(np.int32)

    def discard(self) -> None:
        """Drop what was peeked, all of it; the cache is as it was."""
        self.pending = None

    def forget(self, first: int, last: int | None = None, rows: Sequence[int] | None = None) -> None:
        """Forget the tokens at positions `first` ... `last` - 1; the room that they took is not given back.

        What a policy remembers of other tokens stays: sums of attention that they received, extremes of a page that they lay in.

        Args:
          first, last: positions; `last` None: all from `first` on, and the row goes on at `first`.
          rows: rows of the batch; None: all.

        Raises:
          UserError: a position or row out of range, or a pending `peek`.
        """
        if self.pending is not None:
            raise UserError("a peeked step waits for commit(accept); commit it before forget")
        end = int(self.next_pos.max()) if last is None else last
        checks.whole("first", first, 0, end if last is None else None)
        checks.whole("last", end, first)
        chosen = range(self.batch) if rows is None else checks.listed("rows", rows)
        span = np.zeros((self.batch, 2), np.int32)
        for row in chosen:
            checks.whole("rows", row, 0, self.batch - 1)
            span[row] = (first, end)
            if last is None or end >= self.next_pos[row]:
                self.next_pos[row] = min(first, self.next_pos[row])
        self.cache = [None if c is None else forget_program(c, jnp.asarray(span)) for c in self.cache]
