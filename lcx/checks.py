"""Checks of the public entries before anything runs: ids, shapes, lengths, room, order.  Every error is one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lcx.axes import FACTS
from lcx.errors import UserError, brief
from lcx.ops.attention import EMPTY, FAR


def whole(name: str, value, least: int, most: int | None = None) -> int:
    """Return `value` where it is an integer of at least `least` (and at most `most`); raise UserError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise UserError(f"{name}={value!r} must be an integer of at least {least}")
    if most is not None and value > most:
        raise UserError(f"{name}={value!r} must be an integer of at most {most}")
    return int(value)


def kind(name: str, value, *allowed: type) -> None:
    """Raise UserError unless `value` is an instance of one of the types."""
    if not isinstance(value, allowed):
        words = " or ".join(t.__name__ for t in allowed)
        raise UserError(f"{name}={brief(value)} is a {type(value).__name__}; allowed is a {words}")


def listed(name: str, value) -> list:
    """Return a list, tuple, array or range as a list; raise UserError for anything else."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
        raise UserError(f"{name}={brief(value)} is a {type(value).__name__}; allowed is a list")
    return list(value)


def one_of(name: str, value, allowed: Sequence[str]) -> None:
    """Raise UserError unless `value` is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise UserError(f"{name}={brief(value)}: allowed are {', '.join(allowed)}")


def _integers(name: str, values) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:
        raise UserError(f"{name}: rows of different lengths; pad them on the right and give lengths") from None
    if array.dtype == object or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise UserError(f"{name}={brief(values)} are {array.dtype}; allowed are integers")
    return array


def token_ids(tokens, batch: int, vocab_size: int) -> np.ndarray:
    """Return int32 [B,T] of token ids; raise UserError for a shape that does not fit or an id outside the embedding."""
    array = _integers("tokens", tokens)
    if array.ndim not in (1, 2) or array.size == 0:
        raise UserError(
            f"tokens={brief(tokens)} have shape {array.shape}; allowed are [T] and [B,T] with at least one token"
        )
    array = np.atleast_2d(array)
    if array.shape[0] != batch:
        raise UserError(f"tokens have shape {array.shape}; the session is for batch {batch}")
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        row, place = (int(i) for i in np.argwhere(outside)[0])
        raise UserError(
            f"token id {array[row, place]} at row {row}, place {place}: allowed are 0 to {vocab_size - 1}, the rows of the embedding"
        )
    return array.astype(np.int32)


def fits(name: str, tokens: int, room: int) -> None:
    """Raise UserError where `tokens` tokens are more than a session was made for."""
    if tokens > room:
        raise UserError(f"{name} of {tokens} tokens is longer than the session's {room}; make it for a longer one")


def lengths(given, batch: int, tokens: int) -> np.ndarray:
    """Return int [B] of real tokens a row, 1 to `tokens`; None: all."""
    if given is None:
        return np.full(batch, tokens)
    real = _integers("lengths", given)
    if real.shape != (batch,):
        raise UserError(f"lengths have shape {real.shape}; allowed is one for each of {batch} rows")
    if (real < 1).any() or (real > tokens).any():
        raise UserError(f"lengths={real.tolist()}: allowed are 1 to {tokens} tokens")
    return real


def counts(name: str, given, batch: int) -> np.ndarray:
    """Return int32 [B] of numbers that are not negative."""
    values = _integers(name, given)
    if values.shape != (batch,) or (values < 0).any():
        raise UserError(f"{name}={values.tolist()}: allowed is one number of at least 0 for each of {batch} rows")
    return values.astype(np.int32)


def positions(pos, shape: tuple[int, ...], start: np.ndarray) -> np.ndarray:
    """Return int32 [B,T] of positions, EMPTY or rising within a row, none before `start` [B], where its text goes on."""
    array = _integers("pos", pos)
    if array.shape != shape and (1, *array.shape) != shape:
        raise UserError(f"pos have shape {array.shape}; the tokens have {shape}")
    array = array.reshape(shape)
    if (array < EMPTY).any() or (array >= FAR).any():
        wrong = array[(array < EMPTY) | (array >= FAR)][0]
        raise UserError(f"pos={wrong}: allowed are positions from 0 to {FAR - 1:,}, and {EMPTY} for padding")
    for row, places in enumerate(array):
        real = places[places != EMPTY]
        if (np.diff(real) <= 0).any():
            raise UserError(f"pos={brief(places.tolist())} of row {row}: allowed are rising positions, each once")
        if len(real) and real[0] < start[row]:
            raise UserError(f"pos={real[0]} of row {row} has been read; allowed are positions from {start[row]} on")
    return array.astype(np.int32)


def accepted(accept, shape: tuple[int, ...]) -> np.ndarray:
    """Return bool [B,T] from a mask, or from the number of leading tokens of each row."""
    array = np.asarray(accept)
    if array.dtype == bool:
        if array.shape != shape and (1, *array.shape) != shape:
            raise UserError(f"accept has shape {array.shape}; the peeked tokens have {shape}")
        return array.reshape(shape)
    leading = counts("accept", [accept] if array.ndim == 0 else accept, shape[0])
    if (leading > shape[1]).any():
        raise UserError(f"accept={leading.tolist()}: allowed are 0 to {shape[1]} tokens a row")
    return np.arange(shape[1]) < leading[:, None]


def order(recipe, value: str) -> None:
    """Raise UserError where a session cannot write before it reads."""
    one_of("order", value, ("attend", "write"))
    if value == "attend":
        return
    for segment, _, part in recipe.parts():
        for fact in ("every token", "all attention", "whole steps"):
            if fact in part.lacks or (fact != "every token" and fact in part.needs):
                raise UserError(
                    f"order='write' needs {FACTS[fact]} before it is written; {type(part).__name__} of {segment or 'the recipe'!r} "
                    "decides by what was read; use order='attend'"
                )


def by_step(recipes) -> str | None:
    """Name the part by which tokens of one step end up otherwise than if they had been fed one by one; None where no part does.

    Args:
      recipes: of each layer, as they act in decode.
    """
    for recipe in dict.fromkeys(recipes):
        for s in (s for chain in recipe.chains for s in chain):
            if not s.policy.ordered:
                return f"{type(s.policy).__name__} of {s.name!r} decides after every step"
            if s.codec.page > 1:
                return f"{type(s.codec).__name__} of {s.name!r} encodes pages after a step"
        if recipe.pattern.visits or recipe.pattern.turns:
            return f"{type(recipe.pattern).__name__} reads a step's own tokens in another way than those before it"
    return None


def aux_of(aux, num_layers: int) -> None:
    """Raise UserError unless `aux` is None or a list of dicts; `Recipe.check` looks into them."""
    if aux is not None and not (isinstance(aux, Sequence) and all(isinstance(x, Mapping) for x in aux)):
        raise UserError(f"aux={brief(aux)}: allowed is a list of {num_layers} dicts, one a layer")


def schedule(recipe, value, prompt: int) -> None:
    """Raise UserError where a recipe needs the prompt in one step and the schedule cuts it."""
    if not hasattr(value, "width") or not hasattr(value, "steps"):
        raise UserError(f"schedule={brief(value)}: allowed are OneShot() and Chunked(size)")
    if recipe.one_shot and value.width(prompt) < prompt:
        raise UserError(
            f"{type(recipe.pattern).__name__} needs the whole prompt at once; schedule {value} cuts {prompt} tokens"
        )
    multiple = recipe.pattern.step_multiple
    for start, _ in value.steps(prompt):
        if start % multiple:
            raise UserError(
                f"{type(recipe.pattern).__name__} reads blocks of {multiple} tokens; schedule {value} cuts the prompt at {start}, "
                f"use chunks of a multiple of {multiple}"
            )
