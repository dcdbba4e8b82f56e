"""Tokens that a method keeps, by layer and KV head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lcx import checks
from lcx.axes import CAUSAL
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.measure.quality import make_session
from lcx.models.loading import Pretrained
from lcx.ops.attention import EMPTY
from lcx.recipe import Recipe
from lcx.session import Session
from lcx.session_programs import DECODE
from lcx.text import visible

WIDTH = 48  # characters of a layer's bar
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Kept:
    """Tokens of a text that are held after it was read.

    Attributes:
      held: bool [L,K,N], True where a KV head of a layer holds the token at a position.
      ids: int32 [N], the text.
      reads: name of the pattern that chooses at each step which of the held tokens a query reads; None where all are read.
      tokenizer: of the model, for the text of spans.
    """

    held: np.ndarray
    ids: np.ndarray
    reads: str | None = None
    tokenizer: Any = field(default=None, repr=False, compare=False)

    @property
    def share(self) -> np.ndarray:
        """Return the share of the text that each KV head holds, float64 [L,K]."""
        return self.held.mean(2)

    @property
    def by_position(self) -> np.ndarray:
        """Return the share of a layer's KV heads that hold each position, float64 [L,N]."""
        return self.held.mean(1)

    def spans(self, layer: int, head: int) -> list[tuple[int, int]]:
        """Return (first, last) positions of the runs that one KV head holds, both ends held, in order.

        Raises:
          UserError: no such layer or head.
        """
        checks.whole("layer", layer, 0, self.held.shape[0] - 1)
        checks.whole("head", head, 0, self.held.shape[1] - 1)
        edges = np.flatnonzero(np.diff(self.held[layer, head].astype(np.int8), prepend=0, append=0))
        return [(int(start), int(stop) - 1) for start, stop in edges.reshape(-1, 2)]

    def text(self, layer: int, head: int, most: int = 40) -> Iterator[str]:
        """Yield a line for each span of one KV head, `first-last  'text'`; the middle is left out beyond `most` spans."""
        spans = self.spans(layer, head)
        count = sum(last - first + 1 for first, last in spans)
        yield f"layer {layer}, KV head {head}: {count:,} of {len(self.ids):,} tokens in {len(spans):,} spans"
        end = most // 2
        left_out = len(spans) - most
        for i, (first, last) in enumerate(spans):
            if left_out > 0 and i == most - end:
                yield f"  ... {left_out:,} spans more ..."
            if left_out > 0 and most - end <= i < len(spans) - end:
                continue
            place = f"{first:,}" if first == last else f"{first:,}-{last:,}"
            yield f"  {place:>15}  {visible(repr(self._words(first, last)))}"

    def _words(self, first: int, last: int) -> str:
        if self.tokenizer is None:
            return " ".join(str(i) for i in self.ids[first : last + 1])
        return self.tokenizer.decode(self.ids[first : last + 1].tolist())

    def lines(self) -> Iterator[str]:
        """Yield the table: a line a layer with the share that is kept, and a bar of the positions."""
        L, K, N = self.held.shape
        each = -(-N // WIDTH)
        yield f"{self.held.mean():.3f} of {N:,} tokens are kept on average over {L} layers x {K} KV heads"
        if self.held.all():
            yield "every token is kept in every layer and head"
        if self.reads is not None:
            yield f"{self.reads} chooses at each step which of these a query reads; this is what is held"
        yield f"layer   kept  by head, least to most  positions 0 to {N - 1:,}, {each:,} of them a character"
        for layer in range(L):
            heads = self.share[layer]
            shares = [self.by_position[layer, i : i + each].mean() for i in range(0, N, each)]
            # a column that holds anything is not drawn as empty
            bar = "".join(BARS[int(np.ceil(share * (len(BARS) - 1)))] for share in shares)
            yield f"{layer:>5}  {heads.mean():.3f}  {heads.min():.3f} to {heads.max():.3f}{'':<9}  |{bar}|"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def save(self, path: str | Path, title: str = "") -> None:
        """Write the map of layers and positions, PNG or SVG by the name's end.

        Raises:
          UserError: another format, or a file that cannot be written.
        """
        # matplotlib takes a second to import
        from lcx.report.figures import save
        from lcx.report.kept import kept_map

        save(kept_map(self, title), path)


def look(
    model: Pretrained,
    method: Experiment | Recipe,
    text: str | Sequence[int] | np.ndarray,
    *,
    new_tokens: int = 0,
    allow_extrapolation: bool = False,
) -> Kept:
    """Read a text under a method and return which tokens each KV head then holds; `print` it, or `save` its map.

    Args:
      model: as `lcx.load` gives it.
      method: recipe, or an experiment, whose arrays and schedule are used.
      text: as it is tokenized, with the model's bos token where its tokenizer puts it there; or token ids, int [N].
      new_tokens: last tokens of the text that are read one by one, as in decode, after the others as the prompt.
      allow_extrapolation: read a text beyond the context that the model was trained for.

    Raises:
      UserError: a method that does not suit the model, or a text that is empty or too long.
    """
    checks.kind("model", model, Pretrained)
    checks.kind("method", method, Experiment, Recipe)
    experiment = method if isinstance(method, Experiment) else Experiment(method)
    experiment.check_weights(model.config, model.sha256)
    tokens = model.tokenizer.text_ids(text) if isinstance(text, str) else text
    ids = checks.token_ids(tokens, 1, model.config.vocab_size)[0]
    if checks.whole("new_tokens", new_tokens, 0) >= len(ids):
        raise UserError(f"new_tokens={new_tokens}: the text has {len(ids)} tokens, and at least one must be the prompt")
    model.check_length(len(ids), allow_extrapolation)
    prompt = len(ids) - new_tokens
    session = make_session(model.layers, experiment, prompt, new_tokens)
    session.prefill(ids[:prompt])
    for i in range(prompt, len(ids)):
        session.step(ids[i : i + 1])
    pattern = experiment.recipe.pattern
    reads = None if pattern == CAUSAL else type(pattern).__name__
    return Kept(held_positions(session, len(ids))[0], ids, reads, model.tokenizer)


def held_positions(session: Session, tokens: int) -> np.ndarray:
    """Return bool [B,L,K,N]: the positions below `tokens` that each KV head of a session's cache holds."""
    config = session.config
    held = np.zeros((session.batch, config.num_layers, config.num_kv_heads, tokens), bool)
    cache: list[Any] = session.cache
    for layer, segments in enumerate(cache):
        for chain in session.recipes[DECODE][layer].chains:
            names = session.aux[layer].get("heads", {})
            rows = range(config.num_kv_heads) if chain[0].heads == "all" else np.asarray(names[chain[0].heads])
            for s in chain:
                pos = np.asarray(segments[s.name].pos)
                # one set of positions may serve all rows
                pos = np.broadcast_to(pos, (pos.shape[0], len(rows), pos.shape[2]))
                for row, head in enumerate(rows):
                    for b in range(session.batch):
                        real = pos[b, row][pos[b, row] != EMPTY]
                        held[b, layer, head, real[real < tokens]] = True
    return held
