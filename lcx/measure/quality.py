"""Quality of a method's predictions: negative log likelihood of real text, and the distance to dense attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lcx import checks
from lcx.errors import NotFinite, UserError
from lcx.experiment import Experiment
from lcx.measure import protocols
from lcx.measure.finite import first_not_finite
from lcx.models.decoder import Layers
from lcx.recipe import Recipe
from lcx.segments import Segment
from lcx.session import Session

ROWS = 256  # tokens whose logits exist at a time: 50 MB for a vocabulary of 49,152


@dataclass(frozen=True)
class Score:
    """Negative log likelihoods in nats.

    Attributes:
      nll: float32 [M].
      ids: int32, all tokens that were read.
      cache_bytes: bytes of the arrays when the last token had been read.
      seconds: prefill and continuation, compiling included where it was not done ahead.
    """

    nll: np.ndarray
    ids: np.ndarray
    cache_bytes: int
    seconds: float

    @property
    def mean(self) -> float:
        return float(self.nll.mean(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """Return exp of the mean; infinite where that is above 709 nats."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.mean))


@jax.jit
def _nll(logits, targets):
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]


@jax.jit
def _divergence(reference, logits):
    """Return KL(reference || other) in nats and whether the most likely token is the same, each [N]."""
    p, q = jax.nn.log_softmax(reference, -1), jax.nn.log_softmax(logits, -1)
    return jnp.sum(jnp.exp(p) * (p - q), -1), jnp.argmax(p, -1) == jnp.argmax(q, -1)


def _by_rows(call: Callable, num_rows: int) -> np.ndarray:
    parts = [np.asarray(call(slice(i, i + ROWS))) for i in range(0, num_rows, ROWS)]
    return np.concatenate(parts, -1)


def token_nll(layers: Layers, x: jax.Array, targets) -> np.ndarray:
    """Return -log p of each target, float32 [N], from the residual stream x [N,E] of the tokens before."""
    targets = jnp.asarray(targets, jnp.int32)
    return _by_rows(lambda rows: _nll(layers.logits(x[rows]), targets[rows]), x.shape[0])


def divergence(layers: Layers, reference: jax.Array, x: jax.Array) -> tuple[float, float]:
    """Return (mean KL(dense || method) in nats, share of tokens whose most likely next token is dense's) from residual streams [N,E]."""

    def both(rows):
        kl, same = _divergence(layers.logits(reference[rows]), layers.logits(x[rows]))
        return jnp.stack([kl, same.astype(jnp.float32)])

    kl, same = _by_rows(both, x.shape[0])
    return float(kl.mean(dtype=np.float64)), float(same.mean())


def make_session(
    layers: Layers, experiment: Experiment, prompt: int, new_tokens: int = 0, batch: int = 1, check_finite: bool = True
) -> Session:
    """Return a session for an experiment's recipe, arrays and schedule."""
    aux = experiment.load_aux(layers.config)
    return Session(
        layers,
        experiment.recipe,
        prompt,
        new_tokens,
        aux=aux,
        batch=batch,
        schedule=experiment.schedule,
        check_finite=check_finite,
        implementation=experiment.implementation,
    )


def _checked(layers: Layers, experiment: Experiment, ids) -> np.ndarray:
    """Return ids, int32 [N]; raise UserError for arguments of another kind, or ids that do not fit the model."""
    checks.kind("layers", layers, Layers)
    if isinstance(experiment, Recipe):
        raise UserError("experiment is a Recipe; give lcx.Experiment(recipe)")
    checks.kind("experiment", experiment, Experiment)
    if np.ndim(ids) != 1:
        raise UserError(f"ids={checks.brief(ids)}: allowed is one text, [N]")
    return checks.token_ids(ids, 1, layers.config.vocab_size)[0]


def _finite(session: Session, nll: np.ndarray, again: Callable[[], object]) -> None:
    """Raise NotFinite, with layer and step of a second run, where a likelihood is nan or infinite."""
    if not np.isfinite(nll).all():
        raise NotFinite(f"token {int(np.argmin(np.isfinite(nll)))} of the score: {first_not_finite(session, again)}")


def unread_part(experiment: Experiment, tokens: int) -> str | None:
    """Name the part of a method that acts on held tokens alone, where a pass over `tokens` tokens is one step and reads none."""
    if experiment.schedule.width(tokens) < tokens:
        return None
    plain = Segment()
    for segment, axis, part in experiment.recipe.parts():
        if axis != "pattern" and part not in (plain.policy, plain.codec, None):
            return f"{type(part).__name__} of {segment!r}"
    return None


def score_text(layers: Layers, experiment: Experiment, ids) -> Score:
    """Return the next-token NLL at every position of one pass over `ids` [N]: nll [N-1].

    Raises:
      UserError: ids that do not fit, or a method that one pass does not exercise, before anything runs; NotFinite: a likelihood that is
        not finite, with layer and step.
    """
    ids = _checked(layers, experiment, ids)
    if len(ids) < 2:
        raise UserError(f"num_tokens={len(ids)} must be at least 2: the first token is not predicted")
    start = time.perf_counter()
    # a recipe that does not fit the model is the first thing to say
    session = make_session(layers, experiment, len(ids) - 1)
    unread = unread_part(experiment, len(ids) - 1)
    if unread is not None:
        raise UserError(
            f"one pass over {len(ids) - 1} tokens never reads what {unread} holds, and would score dense attention; give a prompt and a "
            "continuation (--prompt_tokens, --continuation_tokens), or a smaller chunk_size"
        )
    run = lambda: session.prefill(ids[:-1], rows="all")
    nll = token_nll(layers, run()[0], ids[1:])
    score = Score(nll, ids, session.cache_bytes, time.perf_counter() - start)
    _finite(session, nll, run)
    return score


def continue_session(session: Session, ids, prompt: int) -> jax.Array:
    """Feed ids[prompt:-1] in one step after a prompt of `prompt` tokens: x [M,E] of the tokens before ids[prompt + 1:]."""
    return session.step(ids[None, prompt:-1], rows="all")[0]


def score_continuation(
    layers: Layers, experiment: Experiment, ids, prompt: int, *, protocol: str = protocols.PROTOCOLS[0]
) -> Score:
    """Return the NLL of a continuation after a prompt that was read under the recipe.

    Reads ids[:prompt] under the recipe (its prefill attention, then its eviction), then ids[prompt:-1] at their true positions under a
    protocol of `lcx.measure.protocols`: token by token as in generation, or in one step, in which nothing is evicted.

    Args:
      ids: int [prompt + M + 1].
      prompt: tokens of the prompt.
      protocol: "decode" or "prompt".

    Returns:
      Score with nll[i] = -log p(ids[prompt + i + 1]), [M].

    Raises:
      UserError: ids or sizes that do not fit, before anything runs; NotFinite: a likelihood that is not finite, with layer and step.
    """
    ids = _checked(layers, experiment, ids)
    protocols.check(protocol)
    prompt = checks.whole("prompt", prompt, 1)
    count = len(ids) - prompt - 1
    if count < 1:
        raise UserError(
            f"prompt_tokens={prompt} and continuation_tokens={count} must be at least 1: {len(ids)} ids are a prompt, the tokens "
            "after it and one more"
        )
    start = time.perf_counter()
    session = make_session(layers, experiment, prompt, count, check_finite=False)

    def run():
        session.prefill(ids[:prompt])
        return protocols.continuation(session, ids[None, prompt:-1], protocol)[0]

    nll = token_nll(layers, run(), ids[prompt + 1 :])
    score = Score(nll, ids, session.cache_bytes, time.perf_counter() - start)
    _finite(session, nll, run)
    return score
