"""Segments and chains: the KV heads of a layer that share storage, policy and codec, and the rules for parts that go together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from typing import NamedTuple

from lcx.axes import FACTS, Aux, Codec, Compress, Exact, KeepAll, Part, Pattern, Policy, RawExact
from lcx.errors import UserError, brief
from lcx.model_config import ModelConfig


@dataclass(frozen=True)
class Segment:
    """Storage for some KV heads of every layer.

    Attributes:
      name: unique in the recipe.
      heads: "all", or a name in aux["heads"] (int arrays of KV heads, one per layer).
      policy: which tokens stay, at every step.
      codec: how they are written.
      compress: which tokens stay at the end of the prompt, on top of the policy; in a chain it belongs to the first segment.
    """

    name: str = "all"
    heads: str = "all"
    policy: Policy = field(default_factory=KeepAll)
    codec: Codec = field(default_factory=Exact)
    compress: Compress | None = None

    def __post_init__(self):
        for axis in ("policy", "codec", "compress"):
            check_part(f"{axis} of segment {self.name!r}", getattr(self, axis))


def check_part(axis: str, part: Part | None) -> None:
    """Raise UserError unless a part is an instance of a frozen dataclass whose fields are hashable: it is an argument of jit."""
    if part is None:
        return
    name = part.__name__ if isinstance(part, type) else type(part).__name__
    if isinstance(part, type):
        raise UserError(f"{axis}={name} is a class; allowed is an instance, such as {name}()")
    if not is_dataclass(part) or not part.__dataclass_params__.frozen:  # pyrefly: ignore
        raise UserError(f"{axis}={name}(...) can change; allowed is a class with @dataclass(frozen=True) above it")
    try:
        hash(part)
    except TypeError as error:
        raise UserError(
            f"{axis}={name}(...): {error}; allowed are fields that are numbers, texts or tuples of them"
        ) from None


def check_segments(segments) -> None:
    """Raise UserError unless `segments` is a tuple of segments, or of tuples of segments."""
    if isinstance(segments, Segment):
        raise UserError(
            f"segments=Segment(name={segments.name!r}, ...) is a Segment; allowed is a tuple: Recipe((Segment(...),)), with a comma"
        )
    if not isinstance(segments, tuple):
        raise UserError(
            f"segments={brief(segments)} is a {type(segments).__name__}; allowed is a tuple: Recipe((Segment(...),))"
        )
    for entry in segments:
        for s in entry if isinstance(entry, tuple) else (entry,):
            if not isinstance(s, Segment):
                raise UserError(
                    f"segments: {brief(s)} is a {type(s).__name__}; allowed are Segments, and tuples of them for chains"
                )


Chain = tuple[Segment, ...]


def num_rows(model: ModelConfig, heads: str, aux: Aux | None, layer: int) -> int:
    """Return the number of KV heads of one layer that belong to `heads`."""
    if heads == "all":
        return model.num_kv_heads
    if aux is None or heads not in aux[layer].get("heads", {}):
        raise UserError(f"heads={heads!r}: aux names no such heads in layer {layer}")
    return len(aux[layer]["heads"][heads])


def prompt_segment(chain: Chain) -> Segment:
    """Return the exact segment that holds the whole prompt of a chain that compresses at its end."""
    raw = any(s.codec.raw for s in chain)
    return Segment(name=chain[0].name, heads=chain[0].heads, codec=RawExact() if raw else Exact())


class _Stance(NamedTuple):
    """Needs of one part of a chain, and the facts that it does not leave to the others, as names of FACTS."""

    name: str
    needs: frozenset[str]
    lacks: frozenset[str]


def _stances(chain: Chain, pattern: Pattern, s: Segment) -> Iterator[_Stance]:
    """Yield a stance for every part that acts on one segment of a chain.  Implied needs are added to the stated ones."""

    def stance(part: Part, needs: str = "", lacks: str = "") -> _Stance:
        named = lambda text: frozenset(filter(None, text.split(", ")))
        return _Stance(type(part).__name__, part.needs | named(needs), part.lacks | named(lacks))

    yield stance(
        s.policy, lacks=", ".join(["" if s.policy.ordered else "ordered", "" if s.policy.shared else "one set"])
    )
    pages = s.codec.page > 1
    raw = "rotated keys" if s.codec.raw else ""
    yield stance(s.codec, needs="ordered" if pages else "", lacks=", ".join(["single tokens" if pages else "", raw]))
    compress = chain[0].compress
    if compress is not None:
        yield stance(compress, lacks="" if compress.shared else "one set")
    turns = "rotated keys" if pattern.turns else ""
    # pages of slots are listed head by head
    listed = "one set" if "held" in pattern.visits else ""
    yield stance(pattern, lacks=", ".join(["all attention, whole steps" if pattern.visits else "", turns, listed]))
    if compress is None:
        yield _Stance("a segment without compress", frozenset(), frozenset({"votes"}))
    if s.heads != "all":
        yield _Stance(f"heads={s.heads!r}", frozenset(), frozenset({"all heads"}))
    if len(chain) > 1:
        yield _Stance(f"chain {[x.name for x in chain]}", frozenset(), frozenset({"one segment"}))


def _hands_down(policy: Policy, page: int) -> bool:
    """Return True where a policy hands down whole pages of `page` tokens."""
    # texts of lengths that no page divides: pages of 4 tokens are now and then a page of 32
    return not any(policy.handed((1 << 20) + 997 * i) % page for i in range(16))


def check_chain(chain: Chain, pattern: Pattern) -> None:
    """Raise UserError where the parts of a chain do not go together; the line names both and the cause."""
    heads = {s.heads for s in chain}
    if len(heads) > 1:
        raise UserError(
            f"chain {[s.name for s in chain]} joins heads {sorted(heads)}; give all of its segments the same heads"
        )
    for before, s in zip((None, *chain), chain, strict=False):
        if s.compress is not None and before is not None:
            raise UserError(f"compress of segment {s.name!r}: only the first segment of a chain can have one")
        if before is not None and not before.policy.handed(1 << 20):
            raise UserError(
                f"{type(before.policy).__name__} of segment {before.name!r} hands nothing down, and segment {s.name!r} after it would stay "
                "empty; give the codec to the first segment, or put a policy before it that hands tokens down"
            )
        if s.codec.page > 1 and (before is None or not _hands_down(before.policy, s.codec.page)):
            raise UserError(
                f"{type(s.codec).__name__} encodes pages of {s.codec.page} tokens; put a segment before it in its chain "
                "that hands down whole pages"
            )
        stances = list(_stances(chain, pattern, s))
        for one in stances:
            for other in stances:
                for fact in sorted(one.needs & other.lacks):
                    raise UserError(
                        f"{one.name} needs {FACTS[fact]}, which {other.name} does not leave; choose one of the two"
                    )
