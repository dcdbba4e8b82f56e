"""`python -m experiments.autotune --kernel=attend --head_dim=128 --write`: the fastest tile sizes of a kernel on this GPU, into its table.

`--dry_run` needs no GPU: it compiles every candidate for the H200 and says which fit without spilled registers.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from lcx.errors import UserError

FLAGS = flags.FLAGS
TOKENS, BATCH = 16_384, 4
# what is tried of each field; combinations that do not compile are told and left out
CHOICES: dict[str, dict[str, tuple]] = {
    "attend": {"size": (64, 128), "stages": (2, 3, 4, 5), "ping_pong": (True, False)},
    "attend_grad": {"dq_stages": (1, 2, 3, 4, 5), "dkv_stages": (1, 2, 3, 4), "together": (True, False)},
}


def define_flags() -> None:
    flags.DEFINE_enum("kernel", "attend", list(CHOICES), "Whose table: pallas_kernels.tables.ATTEND or ATTEND_GRAD.")
    flags.DEFINE_integer("head_dim", 128, "Which entry of it.")
    flags.DEFINE_bool("write", False, "Put the fastest into pallas_kernels/tables.py; otherwise it is printed alone.")
    flags.DEFINE_bool("dry_run", False, "No GPU: compile for the H200, measure nothing.")


def table(kernel: str) -> tuple[str, dict[int, Any]]:
    """Name and entries of a kernel's table."""
    from pallas_kernels import tables

    name = kernel.upper()
    return name, getattr(tables, name)


def candidates(kernel: str, now: Any) -> Iterator[Any]:
    """The present entry first, then every other combination of CHOICES."""
    yield now
    names, values = zip(*CHOICES[kernel].items(), strict=True)
    for chosen in itertools.product(*values):
        tile = replace(now, **dict(zip(names, chosen, strict=True)))
        if tile != now:
            yield tile


def program(kernel: str, head_dim: int, tile: Any) -> Callable:
    """A function of (q, k, v)."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.attend import attend
    from pallas_kernels.attend_bwd import attend_with_gradient

    scale = head_dim**-0.5
    if kernel == "attend":
        return lambda q, k, v: attend(q, k, v, scale=scale, out_dtype=jnp.bfloat16, tile=tile)

    def loss(q, k, v):
        return attend_with_gradient(q, k, v, scale=scale, tile=tile).out.sum()

    return jax.grad(loss, (0, 1, 2))


def with_entry(source: str, name: str, head_dim: int, tile: Any) -> str:
    """The text of tables.py with another entry.

    Raises:
      UserError: the table has no line of its own for this head_dim.
    """
    start = source.find(f"\n{name} = {{")
    stop = source.find("\n}", start)
    fields = ", ".join(f"{n}={v!r}" for n, v in vars(tile).items())
    line = f"    {head_dim}: {type(tile).__name__}({fields}),"
    body, count = re.subn(rf"^    {head_dim}: .*,$", line, source[start:stop], flags=re.MULTILINE)
    if start < 0 or count != 1:
        raise UserError(f"tables.py: {name} has {count} lines for head_dim {head_dim}; one is needed")
    return source[:start] + body + source[stop:]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing on stderr: the compiler's dumps look for a disassembler that nobody needs, and log its absence for each kernel."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def main() -> None:
    import jax
    import jax.numpy as jnp

    from experiments.gpu.cases import Case
    from experiments.gpu.support import from_tests
    from pallas_kernels import tables

    name, entries = table(FLAGS.kernel)
    if FLAGS.head_dim not in entries:
        raise UserError(f"head_dim={FLAGS.head_dim}: {name} has {', '.join(map(str, entries))}")
    if not FLAGS.dry_run and jax.default_backend() != "gpu":
        raise UserError("no GPU here; --dry_run compiles every candidate for the H200")
    if FLAGS.dry_run and FLAGS.write:
        raise UserError("write: a dry run measures nothing that could be written")
    case = Case("forward", TOKENS, FLAGS.head_dim, batch=BATCH)
    best: tuple[float, Any] | None = None
    for tile in candidates(FLAGS.kernel, entries[FLAGS.head_dim]):
        run = program(FLAGS.kernel, FLAGS.head_dim, tile)
        told = ", ".join(f"{n}={v}" for n, v in vars(tile).items())
        # a candidate may ask for more shared memory than there is, or for a tile that wgmma does not take
        try:
            if FLAGS.dry_run:
                shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in case.shapes]
                with quiet():
                    report = from_tests("aot_support").compile_kernel(run, *shapes)
                fits = report.spill_stores == 0 and report.shared <= 232_448
                print(f"{'fits' if fits else 'no  '}  {told}   {report}", flush=True)
                continue
            from experiments.gpu.timing import ITERATIONS, jax_timer

            milliseconds = sorted(jax_timer(run, case.arrays())(ITERATIONS))[ITERATIONS // 2]
        except (ValueError, NotImplementedError, AssertionError, jax.errors.JaxRuntimeError) as error:
            print(f"no    {told}   {type(error).__name__}: {' '.join(str(error).split())[:120]}", flush=True)
            continue
        print(f"{milliseconds:8.3f} ms  {told}", flush=True)
        if best is None or milliseconds < best[0]:
            best = (milliseconds, tile)
    if best is not None:
        print(f"fastest: {best[1]}, {best[0]:.3f} ms on {jax.devices()[0].device_kind}")
        if FLAGS.write:
            path = Path(tables.__file__)
            path.write_text(with_entry(path.read_text(), name, FLAGS.head_dim, best[1]))
            print(f"written: {path}")


if __name__ == "__main__":
    define_flags()
    cli.run("autotune", main)
