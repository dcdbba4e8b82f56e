"""Times on a GPU: kernel time by CUPTI, rounds of ours and peers in turn, and the state of the card meanwhile."""

from __future__ import annotations

import importlib
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

ROUNDS, ITERATIONS, WARMUPS = 3, 7, 3
MOST_S = 6.0  # of one row, all implementations together

Timed = Callable[[int], list[float]]  # iterations -> milliseconds of each


def jax_timer(fn: Callable, args) -> Timed:
    """Return a timer of a jitted function's kernels, by CUPTI; warmed up."""
    import jax
    from jax.experimental.mosaic.gpu import profiler

    program = jax.jit(fn)
    for _ in range(WARMUPS):
        jax.block_until_ready(program(*args))

    def times(iterations: int) -> list[float]:
        _, measured = profiler.measure(program, iterations=iterations)(*args)
        return [float(x) for x in np.ravel(np.asarray(measured, np.float64))]

    return times


def repeated(timer: Timed, calls: int) -> Timed:
    """Return a timer of one of the `calls` that a program makes."""
    return lambda iterations: [t / calls for t in timer(iterations)]


def torch_timer(fn: Callable) -> Timed:
    """Return a timer of a torch function between CUDA events, the L2 cache flushed between calls, as triton.testing does it."""
    torch, do_bench = importlib.import_module("torch"), importlib.import_module("triton.testing").do_bench
    for _ in range(WARMUPS):
        fn()
    torch.cuda.synchronize()
    return lambda iterations: [
        float(x) for x in do_bench(fn, warmup=1, rep=50 * iterations, return_mode="all")[:iterations]
    ]


def wall_ms(fn: Callable, args, calls: int = 20) -> float:
    """Return the milliseconds of one of `calls` calls back to back: a check on CUPTI, launches included."""
    import jax

    program = jax.jit(fn)
    jax.block_until_ready(program(*args))
    start = time.perf_counter()
    out = [program(*args) for _ in range(calls)]
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls * 1e3


def in_turn(timers: Mapping[str, Timed]) -> tuple[dict[str, dict[str, float]], dict[str, Exception]]:
    """Time all timers in turn; "ours" is among the names.

    Returns:
      name -> median, p10, p90 of milliseconds, and the median over rounds of ours / it; and what peers raised, which have no times.
    """
    rounds: dict[str, list[list[float]]] = {name: [] for name in timers}
    raised: dict[str, Exception] = {}
    start = time.perf_counter()
    for _ in range(ROUNDS):
        for name in list(rounds):
            try:
                rounds[name].append(timers[name](ITERATIONS))
            # a peer that fails does not cost ours its row
            except Exception as error:
                if name == "ours":
                    raise
                raised[name] = error
                del rounds[name]
        if time.perf_counter() - start > MOST_S:
            break
    medians = {}
    for name, times in rounds.items():
        flat = np.concatenate([np.asarray(t) for t in times])
        ratio = np.median([np.median(a) / np.median(b) for a, b in zip(rounds["ours"], times, strict=True)])
        quantiles = {f"p{q}": float(np.percentile(flat, q)) for q in (10, 90)}
        medians[name] = {"ms": float(np.median(flat)), "ours_over_it": float(ratio), "n": len(flat), **quantiles}
    return medians, raised


def card() -> dict[str, Any]:
    """Return clock, power and throttle reasons now; an empty dict where nvidia-smi is not installed."""
    fields = "name,clocks.sm,power.draw,clocks_event_reasons.active,temperature.gpu"
    try:
        line = subprocess.run(  # noqa: S603
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    name, clock, power, reasons, temperature = (part.strip() for part in line.split(","))
    return {"card": name, "sm_mhz": clock, "watts": power, "throttle": reasons, "celsius": temperature}


def copy_bandwidth() -> float:
    """Return the bytes a second, read and written, of a copy of 4 GiB on the device."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (2**30,), jnp.float32)
    times = jax_timer(lambda x: x + 1, (x,))(10)
    return 2 * x.nbytes / (float(np.median(times)) * 1e-3)


def matmul_flops() -> float:
    """Return the operations a second of an 8,192^3 bfloat16 product of random values."""
    import jax
    import jax.numpy as jnp

    a, b = (jax.random.normal(jax.random.key(i), (8_192, 8_192), jnp.bfloat16) for i in range(2))
    times = jax_timer(lambda a, b: a @ b, (a, b))(10)
    return 2 * 8_192**3 / (float(np.median(times)) * 1e-3)
