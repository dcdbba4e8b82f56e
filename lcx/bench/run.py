"""The kernels beside the best of others on one Hopper GPU: checks first, then times, every row on disk as it is done.

A kernel that is wrong, or whose check fails, loses its rows and costs the others nothing.  A dry run needs no GPU: it checks the kernels in
interpret mode at small sizes, and compiles every check at the sizes that a GPU gets and every row for the H200.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jaxlib

from lcx.bench import cases, model, order, peers, timing
from lcx.bench import rows as programs
from lcx.bench.cases import CHECKED, Case
from lcx.bench.goals import summary
from lcx.checkout import git
from lcx.errors import UserError
from lcx.plan.targets import compile_device, compile_for, gpu_target, wheel_compiler

HIDDEN = ("kind", "name", "at_s", "case", "peers", "parts")  # of a printed line; the file has them
DRIFT = 0.03  # a row whose clock moved by more is marked


class Rows:
    """Writer of rows as they are done; remembers them for the summary."""

    def __init__(self, path: Path, shared: dict[str, Any]):
        self.path, self.shared, self.rows = path, shared, []
        self.start = time.perf_counter()

    def add(self, kind: str, name: str, **row) -> None:
        row = {"kind": kind, "name": name, "at_s": round(time.perf_counter() - self.start, 1), **row}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row | self.shared) + "\n")
        values = {n: f"{v:.4g}" if isinstance(v, float) else v for n, v in row.items() if n not in HIDDEN}
        line = ", ".join(f"{n} {v}" for n, v in values.items())
        print(f"{row['at_s']:6.1f} s  {kind:<8} {name:<52} {line}", flush=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


def versions() -> dict[str, Any]:
    """Return the versions and the commit that a row is judged by later."""

    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": sys.version.split()[0],
        # the spills of a kernel depend on it
        "ptxas": metadata.version("nvidia-cuda-nvcc") if wheel_compiler() else "not of the wheels",
        "commit": git("rev-parse", "--short", "HEAD") or "no checkout",
        "dirty": bool(git("status", "--porcelain")),
    }


def check(rows: Rows, on_gpu: bool, only: str = "") -> set[str]:
    """Check the kernels and return those that are wrong or whose check fails."""
    bad = set()
    for case in selected(cases.checks(on_gpu), only):
        start = time.perf_counter()
        # a kernel that does not compile or run does not cost the others
        try:
            difference = error_of(case, on_gpu)
        except Exception as error:
            bad.add(case.kernel)
            rows.add("failed", f"check {case.name}", why=one_line(error))
            continue
        right = difference <= CHECKED[case.kernel]
        if not right:
            bad.add(case.kernel)
        rows.add("check", case.name, error=difference, right=right, seconds=round(time.perf_counter() - start, 1))
    return bad


def error_of(case: Case, on_gpu: bool) -> float:
    """Return the error of a case's kernel against its reference."""
    execute: Callable = jax.jit
    if not on_gpu:
        # the import reaches into JAX's interpreter, which a GPU does without
        from lcx.bench.interpret import interpreted as execute
    one = programs.check_of(case, on_gpu)
    args = one.make()
    # without this a GPU multiplies float32 in 10 bits
    with jax.default_matmul_precision("highest"):
        want = one.reference(*args)
    return cases.error(execute(one.program)(*args), want)


def selected(rows, only: str) -> list:
    """Return the rows whose name contains `only`."""
    return [row for row in rows if only in row.name]


def add_composed(rows: Rows, timed: list[dict[str, Any]], only: str = "") -> None:
    """Add the rows of whole models, from the timed parts."""
    if only in model.COUNTED:
        rows.add("counted", model.COUNTED, **model.counted())
    for name, row in model.composed({r["name"]: r["ms"] for r in timed}):
        rows.add("composed", name, **row)


def compile_rows(rows: Rows, only: str = "") -> None:
    """Compile for the H200, from shapes, the programs that a GPU would run: every check at its sizes there, and every timed row."""
    target = gpu_target("h200")
    # without the compiler nothing is tried
    compile_device(target)
    makers = {f"check {c.name}": partial(programs.check_of, c, True) for c in selected(cases.checks(True), only)}
    makers |= {row.name: partial(lambda row: row, row) for row in selected(order.timed_rows(), only)}
    for name, make in makers.items():
        start = time.perf_counter()
        # every row that does not compile is named at once
        try:
            one = make()
            plan = compile_for(target, jax.jit(one.program), one.abstract()).memory_analysis()
        except Exception as error:
            rows.add("failed", name, why=one_line(error))
            continue
        rows.add("compiled", name, temp_bytes=plan.temp_size_in_bytes, seconds=round(time.perf_counter() - start, 1))


def time_rows(rows: Rows, bad: set[str], only: str = "", limit_s: float = 570.0) -> Iterator[dict[str, Any]]:
    """Time every row, ours and the peers' in turn; none begins after `limit_s` seconds."""
    copy, flops = timing.copy_bandwidth(), timing.matmul_flops()
    rows.add("card", "copy and matmul", copy_bytes_per_s=copy, matmul_flops_per_s=flops, **timing.card())
    for row in selected(order.timed_rows(), only):
        lost = sorted(bad.intersection(row.kernels))
        if lost:
            rows.add("skipped", row.name, why=f"{', '.join(lost)} is wrong or fails, see its checks")
            continue
        if rows.seconds > limit_s:
            rows.add("skipped", row.name, why=f"limit_s={limit_s:g} is over")
            continue
        before = timing.card()
        try:
            figures = time_row(row, copy, flops)
        # one row that fails, such as for want of memory, does not cost the others
        except Exception as error:
            rows.add("failed", row.name, why=one_line(error))
            continue
        after = timing.card()
        rows.add("timed", row.name, **figures, drifted=drifted(before, after), **after)
        yield rows.rows[-1]


def drifted(before: dict[str, Any], after: dict[str, Any]) -> bool | None:
    """Return True where the clock moved by more than DRIFT; None where the card does not report it."""
    try:
        clocks = [float(state["sm_mhz"]) for state in (before, after)]
    except (KeyError, ValueError):
        return None
    return abs(clocks[0] - clocks[1]) > DRIFT * max(clocks)


def one_line(error: Exception) -> str:
    """Return the type of an error and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def time_row(row, copy: float, flops: float) -> dict[str, Any]:
    """Return the figures of one timed row; its arrays are freed afterwards."""
    args, case = row.make(), row.case
    timed, absent = {"ours": timing.repeated(timing.jax_timer(row.program, args), row.calls)}, {}
    for name, make in peers.timers(case, args) if case else ():
        # the error of a peer stands in its place; ours is measured all the same
        try:
            timed[name] = make()
        except peers.Absent as error:
            absent[name] = f"absent: {error}"
        except Exception as error:
            absent[name] = f"absent: {one_line(error)}"
    times, raised = timing.in_turn(timed)
    absent |= {name: f"absent: {one_line(error)}" for name, error in raised.items()}
    mine = times["ours"]
    ms = mine["ms"]
    figures: dict[str, Any] = {name: mine[name] for name in ("ms", "p10", "p90", "n")}
    if case is None:
        return figures
    figures |= {"tflops": case.flops / ms / 1e9, "of_matmul": case.flops / ms * 1e3 / flops, "calls": row.calls}
    if case.kernel.startswith("decode"):
        figures |= {"gb_per_s": case.bytes / ms / 1e6, "of_copy": case.bytes / ms * 1e3 / copy}
    best = min((n for n in times if n != "ours"), key=lambda n: times[n]["ms"], default=None)
    if best is not None:
        figures |= {"best_peer": best, "best_peer_ms": times[best]["ms"], "ratio": 1 / times[best]["ours_over_it"]}
    if (case.kernel, case.tokens) == ("forward", 4_096) or case == Case("decode", 131_072):
        figures["wall_ms"] = timing.wall_ms(row.program, args) / row.calls
    return figures | {"peers": times, "absent": absent, "case": vars(case)}


def run(out: Path, *, dry_run: bool, only: str = "", limit_s: float = 570.0) -> None:
    """Write the rows of a run, or of a dry run, and print the goals.

    Args:
      out: where rows go, one JSON object a line.
      dry_run: without a GPU.
      only: rows whose name contains this.
      limit_s: seconds after which no further row begins.

    Raises:
      UserError: no GPU and no dry run, or `out` has no folder; when all is done: checks that are wrong, and what failed.
    """
    # the interpreter's three threads wait for each other on XLA's own, of which there must be enough; read when the backend starts
    if dry_run:
        os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))
    if not out.parent.is_dir():
        raise UserError(f"out={str(out)!r}: its folder does not exist")
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not dry_run:
        raise UserError("no GPU here; --dry_run compiles for the H200 and checks in interpret mode")
    rows = Rows(out, versions() | {"command": " ".join(sys.argv), "dry_run": dry_run})
    bad = check(rows, on_gpu and not dry_run, only)
    if dry_run:
        compile_rows(rows, only)
        add_composed(rows, [], only)
    else:
        timed = list(time_rows(rows, bad, only, limit_s))
        summary(timed)
        add_composed(rows, timed, only)
    print(f"{rows.seconds:.0f} s   rows: {out}")
    wrong = [row["name"] for row in rows.rows if not row.get("right", True)]
    failed = [row["name"] for row in rows.rows if row["kind"] == "failed"]
    problems = [f"{word}: {', '.join(names)}" for word, names in (("wrong", wrong), ("failed", failed)) if names]
    if problems:
        raise UserError(f"{'; '.join(problems)}; the rows say why")
