"""Method under check: its recipe at small sizes and at its exact limit, and the runs that several checks look at."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np

from lcx import checks
from lcx.axes import Aux
from lcx.conformance.small_model import TINY, layers, poison
from lcx.errors import UserError
from lcx.model_config import ModelConfig
from lcx.ops.attention import EMPTY
from lcx.recipe import Recipe
from lcx.schedules.chunked import Chunked, OneShot
from lcx.segments import num_rows
from lcx.session import Session

# compiling is what a check costs: one chunk size, one batch and one length serve nearly all of them, and slots in multiples of ROUNDING
# let the settings of a method share programs where budgets are data
PROMPT, CHUNK, NEW, BATCH, ROUNDING = 37, 16, 2, 2, 64
# the longer prompt: some checks read 24 tokens one by one, and with as many slots as a head has channels a mistaken axis would not show
FEWEST = TINY.head_dim + 1


@dataclass(eq=False)
class Subject:
    """Method to check.  Runs are kept, so that checks share them.

    Attributes:
      recipe: as a user has it.
      aux: the method's arrays for the small model (3 layers, 6 query and 2 KV heads of 32 channels); None: random numbers for what the
        recipe declares, and both kinds of heads in every layer where it names heads.
      prompt: tokens of the longer prompt, at least 33.
      chunk: tokens of a prefill step, rounded up to what the pattern's blocks want.
      shrink: classes take their `small` sizes; one without them that keeps more than the prompt takes a budget of a quarter of it.
      any_chunk: how the prompt is cut does not matter even at small sizes.

    Raises:
      UserError: a prompt or chunk out of range.
    """

    recipe: Recipe
    aux: Aux | None = None
    prompt: int = PROMPT
    chunk: int = CHUNK
    shrink: bool = True
    any_chunk: bool = False
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        checks.kind("recipe", self.recipe, Recipe)
        checks.whole("prompt", self.prompt, FEWEST)
        checks.whole("chunk", self.chunk, 1)

    def keep(self, key: Any, make) -> Any:
        """Return `make()`, run once for each key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    # ---- the method

    def at(self, setting: str) -> Recipe:
        """Return the recipe at "small" sizes, or at its exact "limit"."""
        return self.keep(("recipe", setting), lambda: self._at(setting))

    def _at(self, setting: str) -> Recipe:
        recipe = self.recipe.map_parts(self._shrunk) if self.shrink else self.recipe
        recipe = replace(recipe, rounding=ROUNDING)
        limit = self.prompt + NEW
        return recipe if setting == "small" else recipe.map_parts(lambda part: part.at_limit(limit))

    def _shrunk(self, part):
        if part.small:
            return replace(part, **part.small)
        if getattr(part, "budget", 0) < self.prompt:
            return part
        try:
            return part.with_budget(self.prompt // 4) or part
        except UserError:
            # its budget has a lower end; "acts" says so where it does nothing at this length
            return part

    def aux_of(self, recipe: Recipe, model: ModelConfig = TINY) -> Aux | None:
        """Return the method's arrays for the small model."""
        if self.aux is not None:
            return self.aux
        named = list(dict.fromkeys(c[0].heads for c in recipe.chains if c[0].heads != "all"))
        declared = {n: a for n, a in recipe.arrays(model).items() if not a.optional}
        if not named and not declared:
            return None
        rng = np.random.default_rng(3)
        aux = []
        for layer in range(model.num_layers):
            owner = [named[(head + layer) % len(named)] for head in range(model.num_kv_heads)] if named else []
            heads = {n: np.array([h for h, o in enumerate(owner) if o == n], np.int32) for n in named}
            arrays = {n: rng.standard_normal(a.full(model)).astype(a.dtype) for n, a in declared.items()}
            aux.append(({"heads": heads} if named else {}) | ({"arrays": arrays} if arrays else {}))
        return aux

    def session(
        self,
        recipe: Recipe,
        *,
        batch: int = BATCH,
        chunk: int | None = 0,
        dtype: str = "float32",
        model: ModelConfig = TINY,
        prompt: int | None = None,
        new_tokens: int = NEW,
    ) -> Session:
        """Return a session of the small model; `chunk` 0: the subject's own, None: the whole prompt in one step."""
        size = self.chunk if chunk == 0 else chunk
        block = recipe.pattern.step_multiple
        schedule = OneShot() if recipe.one_shot or size is None else Chunked(-(-size // block) * block)
        prompt = self.prompt if prompt is None else prompt
        aux = self.aux_of(recipe, model)
        return Session(layers(model, 0, dtype), recipe, prompt, new_tokens, batch=batch, aux=aux, schedule=schedule)

    # ---- runs

    @property
    def lengths(self) -> list[int]:
        return [self.prompt, self.short]

    @property
    def short(self) -> int:
        """Return the tokens of the shorter prompt: it ends within a chunk, so that tokens and padding meet in one step."""
        return 13 if 13 % self.chunk else 14

    @property
    def texts(self) -> np.ndarray:
        """Token ids of two texts, int [2, prompt + NEW]."""
        return texts(self.prompt)

    def width(self, setting: str) -> int:
        """Return the padded length of short prompts, at most 11 tokens: whole chunks, so that they need no program of their own."""
        return self.prompt if self.at(setting).one_shot else min(max(self.chunk, CHUNK), self.prompt)

    def ragged(self, setting: str, dtype: str = "float32", poisoned: bool = False) -> tuple[np.ndarray, list, Session]:
        """Return `play` for two texts of different lengths, and the session."""

        def run():
            session = self.session(self.at(setting), dtype=dtype)
            return *play(session, self.texts, self.lengths, poisoned), session

        return self.keep(("ragged", setting, dtype, poisoned), run)

    def dense(self) -> np.ndarray:
        """Return the logits of dense attention for the two texts, [1 + NEW,2,V]."""
        return dense(self.prompt, self.short)

    def dense_stream(self) -> np.ndarray:
        """Return the residual stream of dense attention [2,prompt,E], both texts whole."""
        return dense_stream(self.prompt)


@cache
def texts(prompt: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, TINY.vocab_size, (BATCH, prompt + NEW))


@cache
def dense(prompt: int, short: int, model: ModelConfig = TINY) -> np.ndarray:
    session = Subject(Recipe(), prompt=prompt).session(Recipe(), chunk=None, model=model)
    return play(session, texts(prompt), [prompt, short])[0]


@cache
def dense_stream(prompt: int) -> np.ndarray:
    session = Subject(Recipe(), prompt=prompt).session(Recipe(), chunk=None)
    return np.asarray(session.prefill(texts(prompt)[:, :prompt], rows="all"))


def play(session: Session, tokens: np.ndarray, lengths=None, poisoned: bool = False) -> tuple[np.ndarray, list]:
    """Read prompts and NEW tokens after them.

    Args:
      session: fresh.
      tokens: int [B, prompt + NEW].
      lengths: real tokens of each prompt.
      poisoned: garbage lies in slots without a token, before the prompt and before the first step.

    Returns:
      Logits [1 + NEW,B,V] after the prompt and after each step, and what was held then, as `held` gives it.
    """
    prompt = tokens.shape[1] - NEW
    if poisoned:
        poison(session, "prefill")
    logits = [session.prefill(tokens[:, :prompt], lengths)]
    states = [held(session)]
    if poisoned:
        poison(session)
    for i in range(prompt, prompt + NEW):
        logits.append(session.step(tokens[:, i : i + 1]))
        states.append(held(session))
    return np.stack(logits), states


def held(session: Session) -> list:
    """Return [layer][chain][text][head]: the positions held in the chain's segments, in ascending order."""
    states = []
    cache: list[Any] = session.cache
    for i, layer in enumerate(cache):
        chains = []
        for links in session.recipes["decode"][i].chains:
            rows = num_rows(session.config, links[0].heads, session._raw_aux, i)
            pos = [np.asarray(layer[s.name].pos) for s in links]
            pos = np.concatenate([np.broadcast_to(p, (p.shape[0], rows, p.shape[2])) for p in pos], 2)
            chains.append([[np.sort(row[row != EMPTY]) for row in text] for text in pos])
        states.append(chains)
    return states


def size_of(session: Session, phase: str, dtype: str = "float32") -> int:
    """Return the bytes that the recipe predicts for a session's caches."""
    s = session
    sizes = {"phase": phase, "aux": s._raw_aux, "batch": s.batch, "dtype": jnp.dtype(dtype)}
    return s.recipe.bytes(s.config, s.prompt, s.new_tokens, **sizes)
