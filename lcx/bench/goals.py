"""The goals of the kernels, and a run's verdict on each."""

from __future__ import annotations

from typing import Any

from lcx.bench.cases import Case

# least ratio to the best peer in the same run: kernel, head_dim, least tokens
GOALS = (
    ("forward", 128, 16_384, 0.95),
    ("forward", 64, 16_384, 0.90),
    ("forward", 256, 16_384, 0.95),
    ("backward", 128, 4_096, 0.85),
)
GRADIENT_256 = 1.3  # only of tokamax
SPARSE = 0.85  # of the dense kernel's rate, on the tiles that are computed
DECODE = {"bf16": 0.88, "fp8": 0.80, "int4": 0.70, "int2": 0.50}  # of the copy bandwidth of the same run
FASTER = {"int4": 2.7, "int2": 3.8}  # times our bf16, at LONG tokens
FA3 = 1.0  # of FA3's decode, the better of its splits
LONG = 131_072
SCORES = {"antidiagonal": 0.04, "probe": 0.02}  # at most, of the dense forward pass

Timed = dict[str, Any]


def summary(timed: list[Timed]) -> None:
    """Print the goals and the measured values."""
    print("\ngoal, ratio to the best peer in this run (above 1: ours is faster)")
    rows = [r for r in timed if r.get("case")]
    for lines in (_peers(rows), _sparse(rows), _decode(rows), _scores(rows)):
        print(*lines, sep="\n")


def judged(value: float, goal: float, met: bool | None = None) -> str:
    """Return a figure beside its goal; `met`: None where more is better."""
    met = value >= goal if met is None else met
    return f"{value:.3f}, goal {goal:g} {'met' if met else 'NOT met'}"


def _is(row: Timed, **fields) -> bool:
    return all(row["case"][name] == value for name, value in fields.items())


def _peers(rows: list[Timed]) -> list[str]:
    lines = []
    for kernel, head_dim, tokens, least in GOALS:
        measured = [
            r for r in rows
            if _is(r, kernel=kernel, head_dim=head_dim, density=None) and r["case"]["tokens"] >= tokens and "ratio" in r
        ]  # fmt: skip
        ratio = min((r["ratio"] for r in measured), default=None)
        verdict = "no row" if ratio is None else f"{ratio:.3f} {'met' if ratio >= least else 'NOT met'}"
        lines.append(f"  {kernel:<9} D {head_dim:<4} from {tokens:,} tokens: {least:.2f}   {verdict}")
    for r in rows:
        if _is(r, kernel="backward", head_dim=256):
            ratio = _beside(r, "tokamax")
            verdict = f"no tokamax, goal {GRADIENT_256:g}" if ratio is None else judged(ratio, GRADIENT_256)
            lines.append(f"  {r['name']}: of tokamax {verdict}")
    return lines


def _beside(row: Timed, name: str) -> float | None:
    """Return our speed over that of the best peer whose name begins with `name`."""
    ratios = [1 / peer["ours_over_it"] for n, peer in row.get("peers", {}).items() if n.startswith(name)]
    return min(ratios, default=None)


def _sparse(rows: list[Timed]) -> list[str]:
    whole = [r for r in rows if _is(r, kernel="forward", head_dim=128, density=None)]
    dense = {r["case"]["tokens"]: r["tflops"] for r in whole}
    return [
        f"  {r['name']}: efficiency {judged(r['tflops'] / dense[r['case']['tokens']], SPARSE)}"
        for r in rows
        if r["case"]["density"] is not None and r["case"]["tokens"] in dense
    ]


def _decode(rows: list[Timed]) -> list[str]:
    lines = []
    ours = {r["case"]["payload"]: r["ms"] for r in rows if _is(r, kernel="decode", tokens=LONG, batch=1)}
    for r in rows:
        if not _is(r, kernel="decode"):
            continue
        payload = r["case"]["payload"]
        lines.append(f"  {r['name']}: of the copy bandwidth {judged(r['of_copy'], DECODE[payload])}")
        if payload == "bf16":
            ratio = _beside(r, "fa3")
            lines.append(f"  {r['name']}: of FA3 {f'no row, goal {FA3:g}' if ratio is None else judged(ratio, FA3)}")
    for payload, goal in FASTER.items():
        if {"bf16", payload} <= set(ours):
            lines.append(
                f"  decode {payload} {LONG:,}: speed over our bf16 {judged(ours['bf16'] / ours[payload], goal)}"
            )
    return lines


def _scores(rows: list[Timed]) -> list[str]:
    """Compare with the dense forward pass of the scored queries; a probe, made once a text, with that of all queries."""
    dense = [r for r in rows if _is(r, kernel="forward", head_dim=128, tokens=LONG, density=None, batch=1)]
    lines = []
    for r in rows:
        name = r["case"]["kernel"]
        if name not in SCORES or not _is(r, tokens=LONG) or not dense or (name, r["case"]["stride"]) == (name, 8):
            continue
        part, of = 1.0, "the whole text"
        if name == "antidiagonal":
            part = Case("forward", LONG, queries=r["case"]["queries"]).flops / Case("forward", LONG).flops
            of = f"the same queries (that of {LONG:,} x {part:.3f}, by operations)"
        share = r["ms"] / (dense[0]["ms"] * part)
        lines.append(
            f"  {r['name']}: of the dense forward of {of} {judged(share, SCORES[name], share <= SCORES[name])}"
        )
    return lines
