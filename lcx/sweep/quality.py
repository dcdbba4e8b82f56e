"""Quality of a point: its passages scored under each protocol, beside dense attention on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lcx.errors import NotFinite
from lcx.experiment import Experiment
from lcx.measure import protocols
from lcx.measure.finite import first_not_finite
from lcx.measure.paired import Difference, difference
from lcx.measure.quality import divergence, make_session, token_nll
from lcx.models.decoder import Layers
from lcx.ops.attention import EMPTY
from lcx.recipe import Recipe
from lcx.session import Session
from lcx.sweep.points import Point
from lcx.sweep.schema import Row
from lcx.tasks.perplexity import longppl_keys

SAME = 1e-5  # nats: a method whose tokens are all nearer to dense attention's did nothing


@dataclass(frozen=True)
class Scored:
    """A continuation of every passage; passages are counted over the batch, P in all.

    Attributes:
      x: float32 [P,M,E], the residual stream.
      nll: float32 [P,M].
      far: bool [P,M], tokens that dense attention predicts only with more than the nearest tokens; of dense points alone, else empty.
    """

    x: np.ndarray
    nll: np.ndarray
    far: np.ndarray


class References:
    """Store of what dense points leave for the methods that are compared with them.

    Args:
      folder: where they are written; None: they stay in memory.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._kept: dict[str, Scored] = {}

    def keep(self, key: str, scored: Scored) -> None:
        if self.folder is None:
            self._kept[key] = scored
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{key}.npz"
        # written aside and renamed: a killed sweep leaves a whole file or none
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, **{f.name: getattr(scored, f.name) for f in fields(scored)})
        part.replace(path)

    def get(self, key: str) -> Scored | None:
        """Return what a dense point left; None where it failed."""
        if self.folder is None:
            return self._kept.get(key)
        path = self.folder / f"{key}.npz"
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as archive:
            return Scored(**{name: archive[name] for name in archive.files})


def score(
    session: Session,
    layers: Layers,
    ids: np.ndarray,
    prompt: int,
    count: int,
    names: Sequence[str],
    on_prompt: Callable[[], None],
) -> dict[str, Scored]:
    """Return the scores of all passages by protocol.

    Args:
      session: of the point; forgets its texts.
      layers: of the model.
      ids: int [S,B,T], S sets of a batch of passages.
      prompt, count: tokens of the prompt and of the continuation.
      names: the protocols.
      on_prompt: called when the first prompt has been read.

    Raises:
      NotFinite: a likelihood is nan or infinite; names layer and step.
    """
    end = prompt + count
    streams: dict[str, list[np.ndarray]] = {name: [] for name in names}
    # one run serves protocols that are the same by construction
    runs = list(names) if protocols.differ(session) else list(names)[:1]
    peeked = protocols.peeked(session, runs)
    for i, passages in enumerate(ids):
        # the protocol that is not written comes first: the next one goes on from the same prompt
        for j, name in enumerate(sorted(runs, key=lambda n: n != peeked)):
            if j == 0 or peeked is None:
                session.prefill(passages[:, :prompt])
            if i == j == 0:
                on_prompt()
            x = protocols.continuation(session, passages[:, prompt:end], name, written=name != peeked)
            streams[name].append(np.asarray(x, np.float32))
    targets = ids[:, :, prompt + 1 : end + 1].reshape(-1)
    scored = {}
    for name in runs:
        x = np.concatenate(streams[name])
        flat = jnp.asarray(x.reshape(-1, x.shape[-1]), layers.dtype)
        nll = token_nll(layers, flat, targets).reshape(x.shape[:2])
        if not np.isfinite(nll).all():
            bad = np.argwhere(~np.isfinite(nll))[0]
            passages = ids[bad[0] // ids.shape[1]]

            def again(passages=passages, name=name) -> None:
                session.prefill(passages[:, :prompt])
                protocols.continuation(session, passages[:, prompt:end], name)

            raise NotFinite(f"protocol {name}, token {bad[1]}: {first_not_finite(session, again)}")
        scored[name] = Scored(x, nll, np.zeros((0, 0), bool))
    return scored | {name: scored[runs[0]] for name in names if name not in scored}


def far_tokens(layers: Layers, ids: np.ndarray, prompt: int, near: int, nll: np.ndarray) -> np.ndarray:
    """Return the tokens that need more than the `near` tokens before the continuation, and those of it: bool [P,M].

    LongPPL's key tokens, arXiv:2410.23771, equation 5 with its 2 nats: dense attention gains more than alpha from the far context, and
    then has them likely.  Differs: the evaluator is the model itself, and the short context begins `near` tokens before the continuation
    for all of its tokens.

    Args:
      ids: int [S,B,T].
      nll: float [P,M], of dense attention after the whole prompt.
    """
    start, count = max(0, prompt - near), nll.shape[1]
    if start == 0:
        return np.zeros(nll.shape, bool)
    session = make_session(layers, Experiment(Recipe()), prompt - start + count, batch=ids.shape[1])
    short = []
    for passages in ids:
        tokens = passages[:, start : prompt + count].copy()
        # the first token of the text is what attention rests on where there is nothing to read
        tokens[:, 0] = passages[:, 0]
        x = session.prefill(tokens, rows="all")[:, prompt - start :]
        targets = passages[:, prompt + 1 : prompt + count + 1].reshape(-1)
        short.append(token_nll(layers, x.reshape(-1, x.shape[-1]), targets).reshape(len(passages), count))
    return longppl_keys(np.concatenate(short), nll)


def columns(layers: Layers, point: Point, scored: dict[str, Scored], dense: Scored | None, differs: str | None) -> Row:
    """Return the columns of quality, and why the method did nothing where it did.

    Args:
      scored: by protocol.
      dense: of the reference; None where that failed.
      differs: why the protocols differ; None: they do not.
    """
    first, *others = point.settings.protocols
    row: Row = {"protocol": first, "acts_in_decode": differs or "no"}
    for name in (first, *others):
        mine, prefix = scored[name], "" if name == first else f"{name}_"
        row |= {f"{prefix}nll": _mean(mine.nll)}
        if dense is None:
            continue
        if mine is dense:
            kl, top1 = 0.0, 1.0
        else:
            flat = lambda s: jnp.asarray(s.x.reshape(-1, s.x.shape[-1]), layers.dtype)
            kl, top1 = divergence(layers, flat(dense), flat(mine))
        plain, far = difference(mine.nll, dense.nll), difference(mine.nll, dense.nll, dense.far)
        row |= {f"{prefix}kl": kl, f"{prefix}top1_agreement": top1}
        row |= _errors(prefix, plain)
        row |= {f"{prefix}far_minus_dense": None if far is None else far.mean}
        row |= {f"{prefix}far_se": None if far is None else far.se}
        if name == first:
            row |= {
                "far_tokens": int(dense.far.sum()),
                "far_nll": _mean(mine.nll[dense.far]) if dense.far.any() else None,
            }
    return row


def idle(scored: dict[str, Scored], dense: Scored | None) -> str | None:
    """Return the words for a method that did nothing under any protocol; None for one that acted, or where dense attention is not known."""
    if dense is None or any(s is dense for s in scored.values()):
        return None
    parts = [difference(s.nll, dense.nll) for s in scored.values()]
    if all(d is not None and d.largest <= SAME for d in parts):
        return "did nothing: every token's NLL is dense attention's"
    return None


def held_tokens(session: Session) -> dict[str, float]:
    """Return the tokens that each segment holds of a text, a mean over layers, KV heads and texts of the batch."""
    counts: dict[str, list[float]] = {}
    for layer in session.cache:
        for name, slots in ({} if layer is None else layer.segments).items():
            pos = np.asarray(slots.pos)
            counts.setdefault(name, []).append(float((pos != EMPTY).sum(-1).mean()) if pos.size else 0.0)
    return {name: float(np.mean(values)) for name, values in counts.items()}


def _errors(prefix: str, gap: Difference | None) -> Row:
    return {
        f"{prefix}se_tokens": None if gap is None else gap.se_tokens,
        f"{prefix}se_passages": None if gap is None else gap.se_passages,
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64))
