"""What every test runs under: JAX on the CPU unless JAX_PLATFORMS says otherwise, property tests without chance."""

import os

# before any import of jax; the workers of pytest-xdist import this file too
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from hypothesis import HealthCheck, settings  # noqa: E402

# the first example of a shape compiles, so a deadline per example says nothing
settings.register_profile(
    "lcx", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lcx")


def pytest_runtest_teardown(item, nextitem):
    """Drop compiled programs before the kernel's limit of memory maps (65,530 by default) ends the process: each takes a few."""
    if _mappings() > 40_000:
        import gc

        import jax

        jax.clear_caches()
        gc.collect()


def _mappings() -> int:
    try:
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0  # not Linux: no such limit
