"""Two methods as one: what each chooses, side by side, or the reason why they do not go together."""

from __future__ import annotations

from dataclasses import replace

from lcx import checks
from lcx.axes import CAUSAL, PHASES, Pattern
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.patterns.by_phase import ByPhase
from lcx.recipe import Recipe
from lcx.segments import Segment

PLAIN = Segment()
WHAT = {
    "policy": "which tokens stay",
    "codec": "how tokens are written",
    "compress": "which tokens stay at the end of the prompt",
}
PROMPT = 4_096  # tokens of a prompt that schedules are checked with


def compose(first: Experiment | Recipe, second: Experiment | Recipe) -> Experiment:
    """Return the method that makes both methods' choices.

    Patterns of which one chooses while the prompt is read and the other in decode are joined by phase.  Storage (policy, codec, what acts
    at the end of the prompt) is joined choice by choice; a method of several segments takes the other's choices into the first segment of
    each of its chains, but those of tokens only where a chain keeps every token.  Settings stay as they are, except that a policy goes on
    from what a part kept of the prompt as its `after` says.

    Args:
      first, second: methods; the order does not matter.

    Raises:
      UserError: both choose the same thing, or parts do not go together; one line that names them.
    """
    a, b = (m if isinstance(m, Experiment) else Experiment(m) for m in (first, second))
    recipe = Recipe(
        _segments(a.recipe, b.recipe),
        _pattern(a.recipe.pattern, b.recipe.pattern),
        rounding=max(a.recipe.rounding, b.recipe.rounding),
    )
    plain = Experiment(Recipe())
    schedules = [m.schedule for m in (a, b) if m.schedule != plain.schedule]
    schedule = schedules[0] if schedules else plain.schedule
    checks.schedule(recipe, schedule, PROMPT)
    if a.aux is not None and b.aux is not None:
        raise UserError("both methods bring arrays of their own; write a config that joins them")
    return Experiment(recipe, aux=a.aux if b.aux is None else b.aux, schedule=schedule)


def _pattern(a: Pattern, b: Pattern) -> Pattern:
    """Return the pattern that reads as both, by phase."""
    if CAUSAL in (a, b):
        return b if a == CAUSAL else a
    for early, late in ((a, b), (b, a)):
        if early.phase(PHASES[1]) == CAUSAL and not late.phase(PHASES[0]).visits and late.phase(PHASES[0]) != late:
            return ByPhase(early, late)
    raise UserError(
        f"{type(a).__name__} and {type(b).__name__} both choose what is read in one phase; take one of them, or ByPhase(...)"
    )


def _segments(a: Recipe, b: Recipe):
    rich, poor = (a, b) if _links(a) >= _links(b) else (b, a)
    if _links(poor) > 1:
        raise UserError("both methods have several segments; write a recipe that joins them")
    (link,) = poor.chains[0]

    def joined(s: Segment) -> Segment:
        chosen = {}
        for axis in ("policy", "codec", "compress"):
            mine, other, plain = (getattr(x, axis) for x in (s, link, PLAIN))
            if plain not in (mine, other) and mine != other:
                raise UserError(
                    f"{type(mine).__name__} and {type(other).__name__} both choose {WHAT[axis]}; take one of them"
                )
            chosen[axis] = other if mine == plain else mine
        if chosen["compress"] is not None:
            chosen["policy"] = chosen["policy"].after(chosen["compress"])
        return replace(s, **chosen)

    if len(rich.chains) == 1:
        ((first, *rest),) = rich.chains
        return (_link((joined(first), *rest)),)
    # heads that forget already have their choice of tokens
    codec_alone = replace(PLAIN, codec=link.codec)
    open_ = [not _forgets(chain) for chain in rich.chains]
    if link != replace(codec_alone, name=link.name) and not any(open_):
        raise UserError("both methods choose the tokens that stay, in every head; take one of them")
    result = []
    for chain, takes in zip(rich.chains, open_, strict=True):
        link = poor.chains[0][0] if takes else codec_alone
        result.append(_link((joined(chain[0]), *chain[1:])))
    return tuple(result)


def _link(chain):
    """Return a chain of one segment as the segment itself, as recipes are written."""
    return chain if len(chain) > 1 else chain[0]


def _forgets(chain) -> bool:
    return chain[0].compress is not None or "every token" in chain[0].policy.lacks


def _links(recipe: Recipe) -> int:
    return sum(len(chain) for chain in recipe.chains)
