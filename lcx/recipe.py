"""A paper as a value: the choice made on each axis, frozen and hashable, a static argument of jit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lcx.cache import Edit, Held, Slots, Store, Tokens, shape_bytes
from lcx.errors import UserError
from lcx.model_config import ModelConfig
from lcx.ops.attention import EMPTY, Near

PHASES = ("prefill", "decode")

Aux = Sequence[dict[str, Any]]  # one dict a layer: {"heads": {segment's heads: int [R]}, "per_head": {name: [K, ...]}}


class Pattern:
    """Which keys does a query read?  The base reads all that is causal.

    Override `allow` (elementwise, by position) or `visit` (page lists); both see the heads of one segment.
    """

    visits: ClassVar[str] = ""  # "held" or "own": the keys for which `visit` lists pages; "" means `allow` alone
    block_rows: ClassVar[int] = 1  # queries that share one page list
    one_shot: ClassVar[bool] = False  # prefill needs the whole prompt in one step

    def at(self, phase: str, layer: int) -> Pattern:
        """The pattern of this phase and layer (from 0)."""
        return self

    def allow(self, ctx, q_pos, kv_pos):
        """bool, broadcastable to [B,R,G,T,S], from q_pos [B,1,1,T,1] and kv_pos [B,R,1,1,S].  None: every visible key."""
        return None

    def reach(self, ctx, bounds):
        """(some pair of the tile may be allowed, every pair is), bool scalars, from `attention.Bounds`.  None: not known."""
        return None

    def near(self, ctx) -> Near | None:
        """`allow` as a window with sinks, where it is one: the only mask that kernels know.  None: it is not, or there is no `allow`."""
        return None

    def visit(self, ctx, held: Held):
        """(index [B,R,G,Q,M], count [B,R,G,Q], page size) of the keys named by `visits`."""
        raise NotImplementedError

    def rope_pos(self, ctx, held_pos) -> Any:
        """(q_pos [B,T], own_pos [B,T], held_pos [B,R|1,S]) to rotate by, or None for the text's positions.  Needs raw keys."""
        return None

    def layout(self, slots: int, head_dim: int, dtype) -> dict[str, tuple[tuple[int, ...], Any]]:
        """State kept beside the slots: name -> (shape after [B,R], dtype)."""
        return {}

    def summarise(self, store: Store, before: Slots, after: Slots, num_new: int) -> Slots:
        """`after` with this pattern's state brought up to date; `num_new` tokens at most were written."""
        return after

    def with_budget(self, budget: int) -> Pattern | None:
        """The same pattern reading `budget` tokens per KV head, or None where it has no budget."""
        return None


@dataclass(frozen=True)
class Causal(Pattern):
    """Every query reads every token before it and itself.  Exact."""


CAUSAL = Causal()


class Policy:
    """Which tokens stay?  Acts after every step."""

    shared: ClassVar[bool] = False  # one kept set for all KV heads of the layer: positions are stored once
    ordered: ClassVar[bool] = False  # slots are filled in order of the text, and nothing is evicted
    all_heads: ClassVar[bool] = False  # needs every KV head of the layer in its segment
    state: ClassVar[dict[str, Any]] = {}  # per-slot arrays: name -> dtype

    def capacity(self, tokens: int, page: int) -> int:
        """Slots needed when `tokens` tokens in all pass through."""
        raise NotImplementedError

    def handed(self, tokens: int) -> int:
        """Of `tokens` in all, how many at most the next segment of the chain receives."""
        return 0

    def edit(self, ctx, held: Held, new: Tokens) -> tuple[Slots, Edit, Tokens | None]:
        """The slots with updated state, what to write, and what the next segment of the chain gets."""
        raise NotImplementedError

    def with_budget(self, budget: int) -> Policy | None:
        """The same policy keeping `budget` tokens per KV head, or None where it has no budget."""
        return None


class Compress:
    """Which tokens stay at the end of the prompt?  Acts once; until then the whole prompt is held."""

    shared: ClassVar[bool] = False
    budget: int
    probe: int = 0  # last queries of the prompt that vote

    def score(self, ctx, held: Held) -> jax.Array:
        """float32 [B,R|1,S]: higher stays.  `ctx.probe` holds the last queries."""
        raise NotImplementedError


class Codec:
    """How is a slot written?  The base has no page; a paged codec encodes `page` neighbouring tokens together."""

    page: int = 1
    rotated: ClassVar[bool] = True  # keys come after RoPE
    plain: ClassVar[bool] = False  # the payload is k [B,R,D,S] and v [B,R,S,D] in a float type

    def leaves(self, head_dim: int, dtype):
        """Name -> `cache.Leaf` of the payload."""
        raise NotImplementedError

    def encode(self, k, v, valid):
        """k, v [B,R,N,D], valid bool [B,R|1,N] -> payload of N slots (N a multiple of `page`)."""
        raise NotImplementedError

    def decode(self, payload):
        """Payload of n slots -> k [B,R,D,n], v [B,R,n,D], in any float type; channels behind those of the head are cut off."""
        raise NotImplementedError

    def pages(self, payload):
        """The payload as the decode kernel reads it, `pallas_kernels.payloads.Pages`, row by row; None where it lies otherwise."""
        return None

    def check(self, head_dim: int) -> None:
        """Raise UserError when head_dim does not suit."""


@dataclass(frozen=True)
class Segment:
    """Storage for some KV heads of every layer.

    Attributes:
      name: unique in the recipe.
      heads: "all", or a name in aux["heads"] (int arrays of KV heads, one per layer).
      policy: which tokens stay, at every step.
      codec: how they are written.
      compress: which tokens stay at the end of the prompt, on top of the policy; in a chain it belongs to the first segment.
      slots: capacity per KV head; None: what policy, prompt and new tokens need.
    """

    name: str = "all"
    heads: str = "all"
    policy: Policy = field(default_factory=lambda: _keep_all())
    codec: Codec = field(default_factory=lambda: _exact())
    compress: Compress | None = None
    slots: int | None = None

    def __post_init__(self):
        if self.slots is not None and self.slots < 1:
            raise UserError(f"slots={self.slots} of segment {self.name!r} must be at least 1")
        page = self.codec.page
        if self.slots is not None and self.slots % page:
            raise UserError(f"slots={self.slots} is not a multiple of page={page}; use {-(-self.slots // page) * page}")


def _keep_all():
    from lcx.policies.flush import KeepAll

    return KeepAll()


def _exact():
    from lcx.codecs.exact import Exact

    return Exact()


Chain = tuple[Segment, ...]


@dataclass(frozen=True)
class Recipe:
    """A method: segments (or chains of segments for the same heads), and a pattern.

    In a chain new tokens enter the first segment; what it hands down enters the next; after the last it is gone.

    Raises:
      UserError: names that repeat, or choices that do not go together; one line that names the pair.
    """

    segments: tuple[Segment | Chain, ...] = field(default_factory=lambda: (Segment(),))
    pattern: Pattern = CAUSAL

    def __post_init__(self):
        names = [s.name for chain in self.chains for s in chain]
        if not names:
            raise UserError("segments=() holds nothing: give at least one Segment")
        if len(set(names)) < len(names):
            raise UserError(f"segment names {names} repeat; each must be unique")
        for chain in self.chains:
            heads = {s.heads for s in chain}
            if len(heads) > 1:
                raise UserError(
                    f"chain {[s.name for s in chain]} joins heads {sorted(heads)}; a chain has one set of heads"
                )
            if self.raw_keys and len(chain) > 1:
                raise UserError(
                    f"{type(self.pattern).__name__} rotates by cache position; not with chain {[s.name for s in chain]}"
                )
            for s in chain:
                if s.compress is not None and s is not chain[0]:
                    raise UserError(f"compress of segment {s.name!r}: only the first segment of a chain can have one")
                if chain[0].compress is not None and (s.policy.state or s.policy.all_heads):
                    raise UserError(
                        f"{type(s.policy).__name__} ranks by attention that {type(chain[0].compress).__name__} does not keep; "
                        "take one of them"
                    )
                if s.policy.all_heads and s.heads != "all":
                    raise UserError(
                        f"{type(s.policy).__name__} keeps one set for the layer; heads={s.heads!r} must be 'all'"
                    )
                if s.codec.page > 1 and not s.policy.ordered:
                    raise UserError(
                        f"{type(s.codec).__name__} encodes pages of {s.codec.page}; {type(s.policy).__name__} evicts single tokens"
                    )
                if s.codec.page > 1 and s is chain[0]:
                    raise UserError(
                        f"{type(s.codec).__name__} needs a segment before it in a chain that hands down whole pages"
                    )
                if self.pattern.visits == "held" and (s.codec.page > 1 or not s.policy.ordered):
                    raise UserError(
                        f"{type(self.pattern).__name__} reads pages in order; not with "
                        f"{type(s.codec).__name__} or {type(s.policy).__name__}"
                    )
                if self.pattern.visits and s.policy.state:
                    raise UserError(
                        f"{type(s.policy).__name__} sums attention over all keys; {type(self.pattern).__name__} visits some"
                    )

    @property
    def chains(self) -> tuple[Chain, ...]:
        return tuple(c if isinstance(c, tuple) else (c,) for c in self.segments)

    @property
    def raw_keys(self) -> bool:
        """Whether the pattern rotates by positions of its own, so that segments hold keys before RoPE."""
        return type(self.pattern).rope_pos is not Pattern.rope_pos

    @property
    def has_budget(self) -> bool:
        """Whether `with_budget` applies: exactly one part of the recipe keeps or reads a number of tokens."""
        return self._num_budgets == 1 and (len(self.chains) == 1 or self.pattern.with_budget(1 << 20) is not None)

    @property
    def _num_budgets(self) -> int:
        large = 1 << 20  # above every sink and observation window
        parts = [c[0].policy.with_budget(large) if c[0].compress is None else c[0].compress for c in self.chains]
        return sum(p is not None for p in (*parts, self.pattern.with_budget(large)))

    @property
    def one_shot(self) -> bool:
        """Whether prefill must take the whole prompt in one step."""
        return self.pattern.one_shot

    @property
    def compresses(self) -> bool:
        """Whether something happens at the end of the prompt."""
        return any(chain[0].compress is not None for chain in self.chains)

    @property
    def probe(self) -> int:
        """Queries of the prompt's end that are kept until then."""
        return max([0, *(c[0].compress.probe for c in self.chains if c[0].compress is not None)])

    def at(self, phase: str, layer: int) -> Recipe:
        """The recipe of this phase and layer: what a layer's program is compiled for."""
        if phase not in PHASES:
            raise ValueError(f"phase={phase!r}: allowed are {', '.join(PHASES)}")
        segments = self.segments
        if phase == "prefill":
            segments = tuple(c if c[0].compress is None else (_prompt_segment(c),) for c in self.chains)
        return replace(self, segments=segments, pattern=self.pattern.at(phase, layer))

    def with_budget(self, budget: int) -> Recipe:
        """The same recipe with `budget` tokens per KV head, sinks and observation window included.

        Raises:
          UserError: the recipe has no budget, or more than one.
        """
        if not self.has_budget:
            raise UserError(
                f"budget={budget}: this recipe keeps all tokens or has several budgets; it takes no --budget or --keep_ratio"
            )
        chains: list[Chain] = []
        for chain in self.chains:
            first = chain[0]
            policy = first.policy.with_budget(budget)
            if first.compress is not None:
                first = replace(first, compress=replace(first.compress, budget=budget))
            elif policy is not None:
                first = replace(first, policy=policy)
            chains.append((first, *chain[1:]))
        pattern = self.pattern.with_budget(budget)
        segments = tuple(c[0] if len(c) == 1 else c for c in chains)
        return replace(self, segments=segments, pattern=self.pattern if pattern is None else pattern)

    def capacities(self, phase: str, prompt: int, new_tokens: int) -> dict[str, int]:
        """Slots per KV head of every segment, for a prompt of `prompt` tokens and `new_tokens` after it."""
        sizes = {}
        for chain, here in zip(self.chains, self.at(phase, 0).chains, strict=True):
            compress = here[0].compress
            tokens = prompt if compress is None else min(prompt, compress.budget)
            # a chain that compresses has caches of its own in both phases; every other cache lives through both
            tokens += 0 if phase == "prefill" and chain[0].compress is not None else new_tokens
            for s in here:
                need = s.policy.capacity(tokens, s.codec.page)
                if s.slots is not None and s.slots < need:
                    raise UserError(
                        f"slots={s.slots} of segment {s.name!r} cannot hold {need} tokens; give at least {need}"
                    )
                sizes[s.name] = need if s.slots is None else s.slots
                tokens = s.policy.handed(tokens)
        return sizes

    def init_layer(
        self, model: ModelConfig, layer: int, phase: str, sizes: dict[str, int], aux: Aux | None, batch: int, dtype
    ):
        """An empty cache of one layer: segment name -> Slots, and the probe of the prefill phase."""
        here = self.at(phase, layer)
        cache: dict[str, Any] = {}
        for chain in here.chains:
            rows = num_rows(model, chain[0].heads, aux, layer)
            one_set = chain[0].compress is None or chain[0].compress.shared
            for s in chain:
                store = Store(s.codec, model.head_dim, dtype)
                pos_rows = min(1, rows) if s.policy.shared and one_set else rows
                slots = store.empty(batch, rows, pos_rows, sizes[s.name], s.policy.state)
                for name, (shape, kind) in here.pattern.layout(sizes[s.name], model.head_dim, dtype).items():
                    slots.state[name] = jnp.zeros((batch, rows, *shape), kind)
                cache[s.name] = slots
        if phase == "prefill" and self.probe:
            shape = (batch, model.num_kv_heads, model.group, self.probe, model.head_dim)
            cache["probe"] = {"q": jnp.zeros(shape, dtype), "pos": jnp.full((batch, self.probe), EMPTY, jnp.int32)}
        return cache

    def init(
        self,
        model: ModelConfig,
        prompt: int,
        new_tokens: int = 0,
        *,
        phase="decode",
        aux=None,
        batch=1,
        dtype=jnp.float32,
    ):
        """The empty cache: a list with one dict of segments a layer."""
        sizes = self.capacities(phase, prompt, new_tokens)
        return [self.init_layer(model, i, phase, sizes, aux, batch, dtype) for i in range(model.num_layers)]

    def bytes(
        self,
        model: ModelConfig,
        context: int,
        new_tokens: int = 0,
        *,
        phase="decode",
        aux=None,
        batch=1,
        dtype=jnp.float32,
    ):
        """Bytes of the cache's arrays, everything counted: codes, scales, tails, positions, page summaries, scores.

        Args:
          model: its shape; no weights are needed.
          context: tokens of the prompt.
          new_tokens: tokens after it.
          phase: "decode", or "prefill" for what is held until the end of the prompt.
          aux, batch, dtype: as in `init`.
        """
        make = lambda: self.init(model, context, new_tokens, phase=phase, aux=aux, batch=batch, dtype=dtype)  # noqa: E731
        return shape_bytes(jax.eval_shape(make))

    def check(self, model: ModelConfig, aux: Aux | None = None) -> None:
        """Raise UserError when the recipe does not suit the model: head sizes, or aux that is missing or does not fit."""
        for chain in self.chains:
            for s in chain:
                s.codec.check(model.head_dim)
        if aux is not None and len(aux) != model.num_layers:
            raise UserError(f"aux has {len(aux)} layers, model {model.name!r} has {model.num_layers}")
        named = {c[0].heads for c in self.chains} - {"all"}
        if named and len(named) < len(self.chains):
            raise UserError("heads: a recipe either gives every chain 'all' once or splits the heads by name")
        for layer in range(model.num_layers if named else 0):
            heads = (aux[layer] if aux else {}).get("heads", {})
            missing = sorted(named - set(heads))
            if missing:
                raise UserError(f"aux names no heads {missing} in layer {layer}; the recipe needs {sorted(named)}")
            every = sorted(int(h) for n in named for h in heads[n])
            if every != list(range(model.num_kv_heads)):
                raise UserError(
                    f"heads of layer {layer} are {every}; each of 0..{model.num_kv_heads - 1} must appear once"
                )


def num_rows(model: ModelConfig, heads: str, aux: Aux | None, layer: int) -> int:
    """KV heads of one layer that belong to `heads`."""
    if heads == "all":
        return model.num_kv_heads
    if aux is None or heads not in aux[layer].get("heads", {}):
        raise UserError(f"heads={heads!r}: aux names no such heads in layer {layer}")
    return len(aux[layer]["heads"][heads])


def _prompt_segment(chain: Chain) -> Segment:
    """The exact segment that holds the whole prompt of a chain that compresses at its end."""
    return Segment(name=chain[0].name, heads=chain[0].heads)
