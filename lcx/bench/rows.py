"""Rows and checks of every kernel: programs with their arguments, as shapes and as arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

from lcx.bench import cases, decode, score
from lcx.bench.cases import SCORES, Case
from pallas_kernels.lists import ROWS, SIZE, BlockList


@dataclass(frozen=True)
class Row:
    """A timed program.

    Attributes:
      name: of the row.
      kernels: kernels whose checks must pass.
      program: a function of the arguments.
      abstract: makes the arguments as shapes.
      make: makes them as arrays.
      calls: number of repetitions within the program; times are reported for one.
      case: case of the benchmark; None for a part of a model.
    """

    name: str
    kernels: tuple[str, ...]
    program: Callable
    abstract: Callable[[], tuple]
    make: Callable[[], tuple]
    calls: int = 1
    case: Case | None = None


@dataclass(frozen=True)
class Check:
    """Program, its arguments as arrays and as shapes, and its plain reference."""

    name: str
    kernel: str
    program: Callable
    make: Callable[[], tuple]
    abstract: Callable[[], tuple]
    reference: Callable


def row_of(case: Case) -> Row:
    """Return the timed row of a case."""
    if case.kernel == "decode":
        sets = decode.calls(case)
        return Row(
            case.name,
            ("decode",),
            decode.program(case),
            lambda: decode.abstract(case, sets),
            lambda: decode.arrays(case, sets),
            sets,
            case,
        )
    if case.kernel in SCORES:
        return Row(
            case.name,
            (case.kernel,),
            score.program(case),
            lambda: score.abstract(case),
            lambda: score.arrays(case),
            case=case,
        )
    return Row(
        case.name,
        (case.kernel,),
        lambda q, k, v, blocks: cases.ours(case, blocks)(q, k, v),
        lambda: _abstract(case),
        lambda: (*case.arrays(), case.blocks()),
        case=case,
    )


def check_of(case: Case, on_gpu: bool) -> Check:
    """Return the check of a case."""
    if case.kernel == "decode":
        # in the interpreter, as many pieces as fill a GPU would take too long
        attend = decode.program(case, None if on_gpu else 2)
        one = lambda q, pages, table, length: attend(q, pages, table[None], length[None])[0]
        shapes = lambda: decode.abstract_small(case)
        return Check(case.name, case.kernel, one, lambda: decode.small(case), shapes, decode.reference(case))
    if case.kernel in SCORES:
        plain = jax.jit(score.reference(case))
        shapes = lambda: score.abstract(case)
        return Check(case.name, case.kernel, score.program(case), lambda: score.arrays(case), shapes, plain)
    plain = jax.jit(cases.reference(case))
    shapes = lambda: jax.eval_shape(case.arrays)
    return Check(case.name, case.kernel, cases.ours(case, case.blocks()), case.arrays, shapes, plain)


def _abstract(case: Case) -> tuple[Any, ...]:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in case.shapes]
    if case.density is None:
        return (*shapes, None)
    # about the width of the widest random row: the width changes no instruction
    width = max(1, int(1.5 * case.density * case.tokens / SIZE))
    return (*shapes, abstract_list((1, case.heads, -(-case.T // ROWS), width)))


def abstract_list(shape: tuple[int, ...]) -> BlockList:
    """Return a list with an index of this shape, as shapes."""
    kinds = ((shape, jnp.int32), (shape[:3], jnp.int32), (shape, jnp.int8))
    return BlockList(*(cast(jax.Array, jax.ShapeDtypeStruct(*kind)) for kind in kinds))
