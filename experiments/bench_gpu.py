"""`python -m experiments.bench_gpu --out=rows.jsonl`: the kernels beside the best of others on one Hopper GPU, within ten minutes.

Correctness comes first: a kernel that is wrong loses its rows.  Every row is on disk as it is done.  `--dry_run` needs no GPU: it compiles
every row for the H200 and checks the kernels in interpret mode at small sizes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from lcx.errors import UserError

# XLA says for each sort that it cannot time its library's without a GPU
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

FLAGS = flags.FLAGS
ROOT = Path(__file__).parent.parent
# least ratio to the best peer in the same run: kernel, head_dim, least tokens
GOALS = (
    ("forward", 128, 16_384, 0.95),
    ("forward", 64, 16_384, 0.90),
    ("forward", 256, 16_384, 0.95),
    ("backward", 128, 4_096, 0.85),
)
SPARSE_GOAL = 0.85  # of the dense kernel's rate, on the tiles that are computed
DECODE_GOAL = 0.88  # of the copy bandwidth of the same run
HIDDEN = ("kind", "name", "at_s", "case", "peers")  # of a printed line; the file has them
DRIFT = 0.03  # a row whose clock moved by more is marked


def define_flags() -> None:
    flags.DEFINE_string("out", "bench_gpu.jsonl", "Where rows go, one JSON object a line.")
    flags.DEFINE_bool("dry_run", False, "No GPU: compile every row for the H200, check in interpret mode.")
    flags.DEFINE_float("limit_s", 570.0, "Seconds after which no further row begins.", lower_bound=1.0)
    flags.DEFINE_string("only", "", "Rows whose name contains this, such as 'decode'.")


class Rows:
    """Writes rows as they are done; remembers them for the summary."""

    def __init__(self, path: Path, shared: dict[str, Any]):
        self.path, self.shared, self.rows = path, shared, []
        self.start = time.perf_counter()

    def add(self, kind: str, name: str, **row) -> None:
        row = {"kind": kind, "name": name, "at_s": round(time.perf_counter() - self.start, 1), **row}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row | self.shared) + "\n")
        shown = {n: f"{v:.4g}" if isinstance(v, float) else v for n, v in row.items() if n not in HIDDEN}
        told = ", ".join(f"{n} {v}" for n, v in shown.items())
        print(f"{row['at_s']:6.1f} s  {kind:<8} {name:<52} {told}", flush=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


def versions() -> dict[str, Any]:
    """What a row needs to be judged later."""
    import jax
    import jaxlib

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603, S607
        return done.stdout.strip()

    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": sys.version.split()[0],
        "commit": git("rev-parse", "--short", "HEAD") or "no checkout",
        "dirty": bool(git("status", "--porcelain")),
    }


def check(rows: Rows, on_gpu: bool) -> set[str]:
    """Kernels that are wrong."""
    import jax

    from experiments.gpu.cases import CHECKED, checks, error, ours, reference
    from experiments.gpu.support import from_tests

    wrong = set()
    run = jax.jit if on_gpu else from_tests("interpret_support").interpreted
    for case in selected(checks(on_gpu)):
        start = time.perf_counter()
        args = case.arrays()
        found = error(case, run(ours(case, case.blocks()))(*args), jax.jit(reference(case))(*args))
        right = found <= CHECKED[case.kernel]
        if not right:
            wrong.add(case.kernel)
        rows.add("check", case.name, error=found, right=right, seconds=round(time.perf_counter() - start, 1))
    return wrong


def selected(cases) -> list:
    return [case for case in cases if FLAGS.only in case.name]


def compile_rows(rows: Rows) -> None:
    """Every timed row compiled for the H200, from shapes alone."""
    from typing import cast

    import jax
    import jax.numpy as jnp

    from experiments.gpu.cases import ours, timed_cases
    from lcx.measure.gpu_targets import compile_for, gpu_target
    from pallas_kernels.lists import ROWS, SIZE, BlockList

    target = gpu_target("h200")
    done = set()
    for case in selected(timed_cases()):
        if case in done:
            continue
        done.add(case)
        start = time.perf_counter()
        shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in case.shapes]
        blocks = None
        if case.density is not None:
            # as wide as a random row is at most, near enough: the width changes no instruction
            at = (1, case.heads, -(-case.T // ROWS), max(1, int(1.5 * case.density * case.tokens / SIZE)))
            kinds = ((at, jnp.int32), (at[:3], jnp.int32), (at, jnp.int8))
            blocks = BlockList(*(cast(jax.Array, jax.ShapeDtypeStruct(*kind)) for kind in kinds))
        program = jax.jit(lambda q, k, v, blocks, case=case: ours(case, blocks)(q, k, v))
        plan = compile_for(target, program, (*shapes, blocks)).memory_analysis()
        rows.add(
            "compiled", case.name, temp_bytes=plan.temp_size_in_bytes, seconds=round(time.perf_counter() - start, 1)
        )


def time_rows(rows: Rows, wrong: set[str]) -> Iterator[dict[str, Any]]:
    """Times of every row, ours and the peers' in turn."""
    from experiments.gpu import peers
    from experiments.gpu.cases import ours, timed_cases
    from experiments.gpu.timing import card, copy_bandwidth, in_turn, jax_timer, matmul_flops, wall_ms

    copy, flops = copy_bandwidth(), matmul_flops()
    rows.add("card", "copy and matmul", copy_bytes_per_s=copy, matmul_flops_per_s=flops, **card())
    for case in selected(timed_cases()):
        if case.kernel in wrong:
            rows.add("skipped", case.name, why=f"{case.kernel} is wrong, see its checks")
            continue
        if rows.seconds > FLAGS.limit_s:
            rows.add("skipped", case.name, why=f"limit_s={FLAGS.limit_s:g} is over")
            continue
        args, blocks = case.arrays(), case.blocks()
        mine = jax_timer(lambda q, k, v, blocks, case=case: ours(case, blocks)(q, k, v), (*args, blocks))
        timed, absent = {"ours": mine}, {}
        for name, make in peers.timers(case):
            # whatever a peer raises is told in its place; ours is measured all the same
            try:
                timed[name] = make(args)
            except Exception as error:
                absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        before = card()
        found = in_turn(timed)
        after = card()
        best = min((n for n in found if n != "ours"), key=lambda n: found[n]["ms"], default=None)
        ms = found["ours"]["ms"]
        row: dict[str, Any] = {
            "ms": ms,
            "p10": found["ours"]["p10"],
            "p90": found["ours"]["p90"],
            "n": found["ours"]["n"],
            "tflops": case.flops / ms / 1e9,
            "of_matmul": case.flops / ms * 1e3 / flops,
        }
        if case.kernel == "decode":
            row |= {"gb_per_s": case.bytes / ms / 1e6, "of_copy": case.bytes / ms * 1e3 / copy}
        if best is not None:
            row |= {"best_peer": best, "best_peer_ms": found[best]["ms"], "ratio": 1 / found[best]["ours_over_it"]}
        if case.kernel == "forward" and case.tokens == 4_096:
            row["wall_ms"] = wall_ms(lambda q, k, v, case=case: ours(case)(q, k, v), args)
        clocks = [float(c.get("sm_mhz", 0)) for c in (before, after)]
        row |= {"drifted": abs(clocks[0] - clocks[1]) > DRIFT * max(clocks), "peers": found, "absent": absent}
        rows.add("timed", case.name, **row, case=vars(case), **after)
        yield rows.rows[-1]


def summary(timed: list[dict[str, Any]]) -> None:
    """Goals and what came out."""
    print("\ngoal, ratio to the best peer in this run (above 1: ours is faster)")
    for kernel, head_dim, tokens, least in GOALS:
        found = [
            r for r in timed
            if (r["case"]["kernel"], r["case"]["head_dim"]) == (kernel, head_dim)
            and r["case"]["tokens"] >= tokens and r["case"]["density"] is None and "ratio" in r
        ]  # fmt: skip
        ratio = min((r["ratio"] for r in found), default=None)
        told = "no row" if ratio is None else f"{ratio:.3f} {'met' if ratio >= least else 'NOT met'}"
        print(f"  {kernel:<9} D {head_dim:<4} from {tokens:,} tokens: {least:.2f}   {told}")
    whole = [
        r for r in timed if (r["case"]["kernel"], r["case"]["head_dim"], r["case"]["density"]) == ("forward", 128, None)
    ]
    dense = {r["case"]["tokens"]: r["tflops"] for r in whole}
    for r in timed:
        if r["case"]["density"] is not None and r["case"]["tokens"] in dense:
            eta = r["tflops"] / dense[r["case"]["tokens"]]
            print(
                f"  {r['name']}: efficiency {eta:.3f}, goal {SPARSE_GOAL} {'met' if eta >= SPARSE_GOAL else 'NOT met'}"
            )
        if r["case"]["kernel"] == "decode":
            of = r["of_copy"]
            print(
                f"  {r['name']}: {of:.3f} of the copy bandwidth, goal {DECODE_GOAL} {'met' if of >= DECODE_GOAL else 'NOT met'}"
            )


def main() -> None:
    # the interpreter's three threads wait for each other on XLA's own, of which there must be enough; read when the backend starts
    if FLAGS.dry_run:
        os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))
    import jax

    out = Path(FLAGS.out)
    if not out.parent.is_dir():
        raise UserError(f"out={FLAGS.out!r}: its folder is not there")
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not FLAGS.dry_run:
        raise UserError("no GPU here; --dry_run compiles for the H200 and checks in interpret mode")
    rows = Rows(out, versions() | {"command": " ".join(sys.argv), "dry_run": FLAGS.dry_run})
    wrong = check(rows, on_gpu and not FLAGS.dry_run)
    if FLAGS.dry_run:
        compile_rows(rows)
    else:
        summary(list(time_rows(rows, wrong)))
    print(f"{rows.seconds:.0f} s   rows: {out}")
    if wrong:
        raise UserError(f"wrong: {', '.join(sorted(wrong))}")


if __name__ == "__main__":
    define_flags()
    cli.run("bench_gpu", main)
