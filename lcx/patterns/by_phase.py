"""One pattern while the prompt is read, another in decode."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lcx.axes import CAUSAL, PHASES, Pattern
from lcx.errors import UserError


@dataclass(frozen=True)
class ByPhase(Pattern):
    """Pattern that reads as one pattern while the prompt is read, and as another afterwards: MInference, then Quest.

    Each keeps what it needs beside the slots in both phases, so that decode finds page summaries of the prompt.

    Args:
      prefill: reads while the prompt is read.
      decode: reads afterwards.

    Raises:
      UserError: a part that is no pattern, or two of which one rotates keys by positions of its own and the other does not.
    """

    prefill: Pattern = CAUSAL
    decode: Pattern = CAUSAL

    def __post_init__(self):
        for name in ("prefill", "decode"):
            if not hasattr(getattr(self, name), "visits"):
                raise UserError(f"ByPhase: {name}={getattr(self, name)!r}: allowed is a pattern")
        if self.prefill.turns != self.decode.turns:
            turning = type(self.prefill if self.prefill.turns else self.decode).__name__
            raise UserError(
                f"ByPhase: {turning} stores keys before RoPE and the other pattern after it; choose one of the two"
            )

    both = property(lambda self: (self.prefill, self.decode))
    exact = property(lambda self: " ".join(f"In {n}: {p.exact}" for n, p in zip(PHASES, self.both, strict=True)))
    small = property(lambda self: {n: replace(p, **p.small) for n, p in zip(PHASES, self.both, strict=True)})
    needs = property(lambda self: self.prefill.needs | self.decode.needs)
    lacks = property(lambda self: self.prefill.lacks | self.decode.lacks)
    visits = property(lambda self: tuple(dict.fromkeys(v for n in PHASES for v in self.phase(n).visits)))
    one_shot = property(lambda self: self.prefill.one_shot)
    step_multiple = property(lambda self: self.prefill.step_multiple)
    turns = property(lambda self: self.prefill.turns)

    def phase(self, name):
        return (self.prefill if name == PHASES[0] else self.decode).phase(name)

    def at(self, phase, layer, model):
        prefill, decode = (p.at(phase, layer, model) for p in self.both)
        # one that chooses in prefill alone is there in decode as what it is then, and the other way round
        return prefill if prefill == decode else InPhase(prefill if phase == PHASES[0] else decode, (prefill, decode))

    def at_limit(self, tokens):
        return ByPhase(*(p.at_limit(tokens) for p in self.both))

    def arrays(self, model):
        return self.prefill.arrays(model) | self.decode.arrays(model)

    def idle(self, prompt):
        reasons = [p.idle(prompt) for p in self.both]
        return "; ".join(r for r in reasons if r) or None

    @property
    def budget(self) -> int | None:
        """Tokens that the one with a budget reads; None where not exactly one has."""
        budgets = [p.budget for p in self.both if p.with_budget(1 << 20) is not None]  # pyrefly: ignore
        return budgets[0] if len(budgets) == 1 else None

    def with_budget(self, budget):
        changed = [p.with_budget(budget) for p in self.both]
        if sum(c is not None for c in changed) != 1:
            return None
        return ByPhase(*(p if c is None else c for p, c in zip(self.both, changed, strict=True)))

    def share(self, slots, group):
        return self.decode.share(slots, group)


@dataclass(frozen=True)
class InPhase(Pattern):
    """Pattern that reads as one pattern and keeps the state of several."""

    reads: Pattern
    kept: tuple[Pattern, ...]

    exact = property(lambda self: self.reads.exact)
    visits = property(lambda self: self.reads.visits)
    one_shot = property(lambda self: self.reads.one_shot)
    step_multiple = property(lambda self: self.reads.step_multiple)
    turns = property(lambda self: self.reads.turns)

    def mask(self, ctx):
        return self.reads.mask(ctx)

    def visit(self, ctx, held, own):
        return self.reads.visit(ctx, held, own)

    def rope_pos(self, ctx, held_pos):
        return self.reads.rope_pos(ctx, held_pos)

    def share(self, slots, group):
        return self.reads.share(slots, group)

    def layout(self, slots, size):
        kept: dict = {}
        for pattern in dict.fromkeys(self.kept):
            mine = pattern.layout(slots, size)
            if kept.keys() & mine.keys():
                raise UserError(f"ByPhase: both patterns keep {', '.join(kept.keys() & mine.keys())} beside the slots")
            kept |= mine
        return kept

    def summarise(self, ctx, store, before, after, num_new):
        for pattern in dict.fromkeys(self.kept):
            after = pattern.summarise(ctx, store, before, after, num_new)
        return after
