"""The axes of a recipe: the classes that a method extends, and the choice on each axis that changes nothing.

A method is one small subclass of one of them.  What a part needs from the others, gives up, and can say of itself is data on its class, so
that no other file has to know it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lcx.cache import Edit, Held, Leaf, Size, Slots, Tokens
from lcx.model_config import ModelConfig
from lcx.ops.attention import EMPTY, Source, used_length
from lcx.ops.masks import Mask
from lcx.ops.visits import Visit

PHASES = ("prefill", "decode")
LARGE = 1 << 20  # a budget above every sink and observation window

# one dict a layer: {"heads": {name: int [R]}, "arrays": {name: array}}
Aux = Sequence[dict[str, Any]]

# facts that a part may need from the others of its chain, in the words of an error
FACTS = {
    "ordered": "slots that are filled in the order of the text",
    "single tokens": "slots that are written one by one, not in pages",
    "every token": "every token to stay until it has been read",
    "all attention": "the attention over every key from the first token on",
    "whole steps": "the attention of a step over every key that is held",
    "votes": "the votes of a part that acts at the end of the prompt",
    "all heads": "every KV head of the layer in its segment",
    "one segment": "a chain of one segment",
    "rotated keys": "keys that are stored after RoPE",
    "one set": "one set of positions for all KV heads of the segment",
}


@dataclass(frozen=True)
class Array:
    """Declared shape of an array that a method owns: learnt, calibrated or random, never made inside a step.

    Attributes:
      shape: without the axis of the heads.
      dtype: of the values.
      per: "query head" for [H,*shape], "KV head" for [K,*shape], "layer" for [*shape].
      optional: True where the method works without the array.
    """

    shape: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    per: str = "layer"
    optional: bool = False

    def full(self, model: ModelConfig) -> tuple[int, ...]:
        """Return the shape of the array in aux."""
        heads = {"query head": (model.num_heads,), "KV head": (model.num_kv_heads,), "layer": ()}
        return (*heads[self.per], *self.shape)


class Part:
    """A choice on one axis; frozen and hashable.

    Attributes:
      exact: when it equals dense attention, as a sentence.
      small: fields at which it acts on a text of some 40 tokens; the conformance suite reads them.
      needs: names of FACTS that the other parts of its chain must leave.
      lacks: names of FACTS that it does not leave.
    """

    exact: ClassVar[str] = ""
    small: ClassVar[Mapping[str, Any]] = {}
    needs: ClassVar[frozenset[str]] = frozenset()
    lacks: ClassVar[frozenset[str]] = frozenset()

    def at(self, phase: str, layer: int, model: ModelConfig) -> Any:
        """Return the part that acts in this phase and layer (from 0)."""
        return self

    def phase(self, name: str) -> Any:
        """Return the part that acts in this phase in some layer, for the check that parts go together."""
        return self

    def program(self) -> Any:
        """Return the part as a program is compiled for it: without the settings that `data` carries."""
        return self

    def data(self) -> dict[str, Any]:
        """Return the settings that a program takes as numbers, `ctx.data`, so that parts which differ in them share it."""
        return {}

    def at_limit(self, tokens: int) -> Any:
        """Return the part at its exact limit, where it leaves attention over a text of `tokens` tokens dense."""
        wide = self.with_budget(tokens)
        return self if wide is None else wide

    def arrays(self, model: ModelConfig) -> dict[str, Array]:
        """Return the arrays that the part reads from `ctx.aux`, by name."""
        return {}

    def with_budget(self, budget: int) -> Any:
        """Return the part with `budget` tokens per KV head, or None where it has no budget."""
        return None

    def idle(self, prompt: int) -> str | None:
        """Return why the part chooses nothing for a prompt of `prompt` tokens, in words for a row; None where it acts."""
        return None


class Pattern(Part):
    """Choice of the keys that a query reads.  The base reads every causal key.

    A method overrides `mask` (by position) or `visit` (page lists); both see the heads of one chain.
    """

    visits: ClassVar[tuple[str, ...]] = ()  # "held", "own": the keys for which `visit` lists pages
    one_shot: ClassVar[bool] = False  # prefill needs the whole prompt in one step
    step_multiple: int = 1  # prefill steps begin at multiples of this number of tokens
    turns: ClassVar[bool] = False  # rotates by `rope_pos`, so that segments hold keys before RoPE

    def mask(self, ctx) -> Mask | None:
        """Return the mask over visible keys; None allows all."""
        return None

    def visit(self, ctx, held: Mapping[str, Held], own: Source) -> Visits:
        """Return the pages to read of the chain's segments and of the step's own tokens, "own"; others are read whole."""
        raise NotImplementedError

    def rope_pos(self, ctx, held_pos) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return (q_pos [B,T], own_pos [B,T], held_pos [B,R|1,S]) to rotate by."""
        raise NotImplementedError

    def layout(self, slots: int, size: Size) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return the state kept beside the slots: name -> (shape after [B,R], dtype)."""
        return {}

    def summarise(self, ctx, store, before: Slots, after: Slots, num_new: int) -> Slots:
        """Return `after` with this pattern's state brought up to date; at most `num_new` tokens were written."""
        return after

    def share(self, slots: int, group: int) -> float:
        """Upper bound on the share of `slots` held slots that one decode step reads for a KV head of `group` query heads."""
        return 1.0


@dataclass(frozen=True)
class Visits:
    """Pages that a pattern reads in one step.

    Attributes:
      pages: segment name, or "own" -> one `Visit` or several disjoint ones.
      state: segment name -> the pattern's new state of that segment, where reading changes it.
    """

    pages: Mapping[str, Visit | Sequence[Visit]]
    state: Mapping[str, dict[str, jax.Array]] | None = None


@dataclass(frozen=True)
class Causal(Pattern):
    """Pattern in which every query reads itself and every token before it."""

    exact = "Always."


CAUSAL = Causal()


class Policy(Part):
    """Choice of the tokens that stay.  Acts after every step."""

    shared: ClassVar[bool] = False  # one kept set for all KV heads of the layer: positions are stored once
    ordered: ClassVar[bool] = False  # slots are filled in order of the text, and nothing is evicted
    state: ClassVar[Mapping[str, Any]] = {}  # per-slot arrays: name -> dtype
    votes: ClassVar[bool] = False  # at the end of the prompt it sees `new.state["votes"]`, see `layer.repack`

    def capacity(self, tokens: int, page: int) -> int:
        """Return the slots needed when a total of `tokens` tokens pass through; at most `tokens`, rounded up to `page`."""
        raise NotImplementedError

    def after(self, compress: Compress) -> Any:
        """Return the policy at the settings at which it goes on from what a part kept of the prompt, for `compose`."""
        return self

    def handed(self, tokens: int) -> int:
        """Return the upper bound on the tokens handed to the next segment, out of `tokens` in total."""
        return 0

    def edit(self, ctx, held: Held, new: Tokens) -> tuple[Slots, Edit, Tokens | None]:
        """Return the slots with updated state, what to write, and what the next segment of the chain gets."""
        raise NotImplementedError


class Compress(Part):
    """Choice of the tokens that stay at the end of the prompt.  Acts once; until then the whole prompt is held."""

    lacks = frozenset({"all attention"})
    shared: ClassVar[bool] = False
    raw_probe: ClassVar[bool] = False  # also needs the last queries before RoPE, `ctx.q_raw`
    budget_is_data: ClassVar[bool] = (
        False  # `score` never asks `self.budget`: budgets of equal capacity share their programs
    )
    probe: int = 0  # last queries of the prompt that vote
    budget: int

    def score(self, ctx, held: Held) -> jax.Array:
        """Return float32 [B,R|1,S]: higher stays.  `ctx.q` holds the last `probe` queries; k and v are None."""
        raise NotImplementedError

    def capacity(self, tokens: int) -> int:
        """Return the most that stays of a prompt of at most `tokens` tokens."""
        return min(self.budget, tokens)

    def keep(self, ctx, length: jax.Array) -> jax.Array:
        """Return int32, broadcastable to [B]: the tokens to keep of prompts of `length` [B] tokens."""
        return jnp.asarray(ctx.data.get("budget", self.budget), jnp.int32)

    def program(self):
        return self.with_budget(LARGE) if self.budget_is_data else self

    def data(self):
        return {"budget": self.budget} if self.budget_is_data else {}

    def with_budget(self, budget):
        return replace(self, budget=budget)  # pyrefly: ignore


class Codec(Part):
    """Format of a slot.  The base has no page; a paged codec encodes `page` neighbouring tokens together."""

    page: int = 1
    raw: ClassVar[bool] = False  # keys come before RoPE
    plain: ClassVar[bool] = False  # the payload is k [B,R,D,S] and v [B,R,S,D] in a float type

    def leaves(self, size: Size) -> dict[str, Leaf]:
        """Return the leaves of the payload by name."""
        raise NotImplementedError

    def encode(self, ctx, tokens: Tokens, pick) -> dict[str, jax.Array]:
        """Return the payload of the N tokens (N a multiple of `page`).

        Args:
          ctx: of the step that writes; `ctx.aux` has the codec's arrays.
          tokens: k, v [B,R,N,D] and pos [B,R|1,N], EMPTY where there is no token.
          pick: cuts the slots that are written out of any [B,R|1,S,...] array that lies beside the segment.
        """
        raise NotImplementedError

    def decode(self, ctx, payload: dict[str, jax.Array], pick) -> tuple[jax.Array, jax.Array]:
        """Return k [B,R,D,n], v [B,R,n,D] of n slots, in any float type; channels behind those of the head are cut off."""
        raise NotImplementedError

    def pages(self, payload) -> Any:
        """Return the payload as the decode kernel reads it, `payloads.Pages`, row by row; None where it lies otherwise."""
        return None

    def at_limit(self, tokens):
        # a codec that rounds has no setting at which it does not
        return RawExact() if self.raw else Exact()

    def check(self, size: Size) -> None:
        """Raise UserError when the head size or the number of KV heads does not suit."""


# kernels read keys [D,S] in boxes of 64 slots, and a cache of another size would be copied; 63 slots of 4,096 are 1.5 %
ALIGNED, ALIGNED_FROM = 64, 4_096


@dataclass(frozen=True)
class KeepAll(Policy):
    """Policy that keeps every token, in the order of the text."""

    exact = "Always."
    shared = True
    ordered = True

    def capacity(self, tokens, page):
        if tokens >= ALIGNED_FROM:
            page = math.lcm(page, ALIGNED)
        return -(-tokens // page) * page

    def edit(self, ctx, held: Held, new: Tokens):
        valid = new.pos != EMPTY
        # padding takes no slot: each row of the batch appends at its own end, behind a page that is cut off where tokens were forgotten
        page = held.store.codec.page
        end = -(-used_length(held.pos, axis=-1) // page) * page
        slot = end[..., None] + jnp.cumsum(valid, -1) - 1
        return held.slots, Edit(jnp.where(valid, slot, held.pos.shape[-1]).astype(jnp.int32), new), None


@dataclass(frozen=True)
class Exact(Codec):
    """Keys and values as they are, in the model's type.

    Keys lie channel-major, [D, S]: decode on XLA:CPU reads them 4 times faster than [S, D].
    """

    exact = "Always."
    plain = True

    def leaves(self, size):
        return {"k": Leaf(size.dtype, before=(size.head_dim,)), "v": Leaf(size.dtype, after=(size.head_dim,))}

    def encode(self, ctx, tokens, pick):
        return {"k": tokens.k.swapaxes(2, 3), "v": tokens.v}

    def decode(self, ctx, payload, pick):
        return payload["k"], payload["v"]


@dataclass(frozen=True)
class RawExact(Exact):
    """Keys before RoPE and values, in the model's type: the prompt of a chain whose codec wants raw keys."""

    raw = True
