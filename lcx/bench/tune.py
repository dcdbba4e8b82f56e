"""The fastest tile sizes of a kernel on this GPU, into its table; a dry run compiles every candidate for the H200 and says which fit."""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax

from lcx.bench import cases, decode, score
from lcx.bench.cases import Case
from lcx.bench.compiled import SHARED_LIMIT, compile_kernel
from lcx.bench.rows import row_of
from lcx.bench.timing import ITERATIONS, jax_timer
from lcx.errors import UserError
from lcx.plan.targets import compile_device, gpu_target, wheel_compiler
from pallas_kernels import tables
from pallas_kernels.tables import DecodeTile

# what is tried of each field; combinations that do not compile are told and left out
CHOICES: dict[str, dict[str, tuple]] = {
    "attend": {"size": (64, 128), "stages": (2, 3, 4, 5), "ping_pong": (True, False)},
    "attend_grad": {"dq_stages": (1, 2, 3, 4, 5), "dkv_stages": (1, 2, 3, 4), "together": (True, False)},
    "decode": {"pages": (1, 2, 4), "stages": (2, 4, 6, 8), "consumers": (1, 2)},
    "score": {"columns": (128, 256), "stages": (2, 3, 4, 5, 6), "run": (1, 2, 4, 8)},
    "probe": {"stages": (2, 3, 4, 6, 8), "run": (16, 32, 64, 128)},
}
PAYLOADS = ("bf16", "fp8", "int8", "int4", "int2")
# rows of queries of an entry of DECODE -> query heads, of 8 KV heads, and tokens that make as many
ROWS = {8: (32, 1), 16: (32, 4), 32: (64, 4)}


def table(kernel: str, payload: str = "bf16", rows: int = 8) -> tuple[str, dict[int, Any]]:
    """Return the name of a kernel's table, and its entries by head_dim; None where decode has none."""
    name = kernel.upper()
    entries = getattr(tables, name)
    if kernel != "decode":
        return name, entries
    return name, {d: tiles[list(ROWS).index(rows)] for (kind, d), tiles in entries.items() if kind == payload}


def candidates(kernel: str, now: Any) -> Iterator[Any]:
    """Yield the present entry first, then every other combination of CHOICES."""
    if now is not None:
        yield now
    names, values = zip(*CHOICES[kernel].items(), strict=True)
    for chosen in itertools.product(*values):
        # only decode has entries that are None
        tile = replace(now or DecodeTile(pages=1, stages=2), **dict(zip(names, chosen, strict=True)))
        if tile != now:
            yield tile


def case_of(kernel: str, head_dim: int, payload: str = "bf16", rows: int = 8):
    """Return the row of the benchmark that a kernel is timed on."""
    if kernel == "decode":
        heads, queries = ROWS[rows]
        return Case("decode", 131_072, head_dim, heads=heads, queries=queries, payload=payload)
    if kernel == "score":
        return Case("antidiagonal", 131_072, head_dim, queries=16_384)
    if kernel == "probe":
        return Case("probe", 131_072, head_dim)
    return Case("forward" if kernel == "attend" else "backward", 16_384, head_dim, batch=4)


def program(case, tile: Any) -> Callable:
    """Return the case's program, of the arguments of its row, with other sizes."""
    if case.kernel == "decode":
        return decode.program(case, tile=tile)
    if case.kernel in cases.SCORES:
        return score.program(case, tile)
    return lambda q, k, v, blocks: cases.ours(case, blocks, tile)(q, k, v)


def with_entry(source: str, name: str, key: Any, tile: Any, part: int | None = None) -> str:
    """Return the text of tables.py with another entry.

    Args:
      source: the text.
      name, key: of the table, and of its entry.
      tile: the sizes.
      part: which place of an entry of several.

    Raises:
      UserError: there is no such entry.
    """
    entries = [
        value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and ast.unparse(node.targets[0]) == name
        for at, value in zip(node.value.keys, node.value.values, strict=True)
        if at is not None and ast.literal_eval(at) == key
    ]
    if len(entries) != 1:
        raise UserError(f"tables.py: {name} has {len(entries)} entries for {key}; one is needed")
    node = entries[0]
    if part is not None and isinstance(node, ast.Tuple):
        node = node.elts[part]
    # fields with their default are left out
    settings = ", ".join(
        f"{f.name}={getattr(tile, f.name)!r}" for f in fields(tile) if getattr(tile, f.name) != f.default
    )
    lines = source.splitlines(keepends=True)
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    line = lines[first][: node.col_offset] + f"{type(tile).__name__}({settings})" + lines[last][node.end_col_offset :]
    return "".join([*lines[:first], line, *lines[last + 1 :]])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence stderr: the compiler's dumps look for a disassembler that nobody needs, and log its absence for each kernel."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def tune(kernel: str, head_dim: int, *, payload: str = "bf16", rows: int = 8, write: bool, dry_run: bool) -> None:
    """Print what each candidate takes, or whether it fits, and put the fastest into its table.

    Args:
      kernel: a name of CHOICES.
      head_dim: which entry of its table.
      payload, rows: of decode's, rows one of ROWS.
      write: change pallas_kernels/tables.py; else the fastest is only printed.
      dry_run: no GPU: compile for the H200, measure nothing.

    Raises:
      UserError: no such entry, no GPU and no dry run, or a dry run that should write.
    """
    # on a GPU too: the spills of a kernel depend on the compiler
    wheel_compiler()
    name, entries = table(kernel, payload, rows)
    if head_dim not in entries:
        raise UserError(f"head_dim={head_dim}: {name} has {', '.join(map(str, entries))}")
    if not dry_run and jax.default_backend() != "gpu":
        raise UserError("no GPU here; --dry_run compiles every candidate for the H200")
    if dry_run and write:
        raise UserError("write: a dry run measures nothing that could be written; leave --write or --dry_run out")
    if dry_run:
        # without the compiler nothing is tried
        compile_device(gpu_target("h200"))
    case = case_of(kernel, head_dim, payload, rows)
    row = row_of(case)
    # one call is compiled as fast as it goes, several are timed
    args = row.make() if not dry_run else decode.abstract(case, 1) if kernel == "decode" else row.abstract()
    best: tuple[float, Any] | None = None
    for tile in candidates(kernel, entries[head_dim]):
        run = program(case, tile)
        sizes = ", ".join(f"{n}={v}" for n, v in vars(tile).items())
        # a candidate may ask for more shared memory than there is, or for a tile that wgmma does not take
        try:
            if dry_run:
                with quiet():
                    report = compile_kernel(run, *args)
                fits = report.spill_stores == 0 and report.shared <= SHARED_LIMIT
                print(f"{'fits' if fits else 'no  '}  {sizes}   {report}", flush=True)
                continue
            milliseconds = sorted(jax_timer(run, args)(ITERATIONS))[ITERATIONS // 2] / row.calls
        except (ValueError, NotImplementedError, AssertionError, jax.errors.JaxRuntimeError) as error:
            print(f"no    {sizes}   {type(error).__name__}: {' '.join(str(error).split())[:120]}", flush=True)
            continue
        print(f"{milliseconds:8.3f} ms  {sizes}", flush=True)
        if best is None or milliseconds < best[0]:
            best = (milliseconds, tile)
    if best is not None:
        print(f"fastest: {best[1]}, {best[0]:.3f} ms on {jax.devices()[0].device_kind}")
        if write:
            path = Path(tables.__file__)
            key = (payload, head_dim) if kernel == "decode" else head_dim
            part = list(ROWS).index(rows) if kernel == "decode" else None
            path.write_text(with_entry(path.read_text(), name, key, best[1], part))
            print(f"written: {path}")
