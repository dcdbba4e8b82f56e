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
    """Drop compiled programs between modules.

    A process may hold 65,530 memory maps (Linux's default) and each program takes a few: all modules in one worker came to 50,000 and a
    crash.  And a module that compiles with fewer optimisations must not meet programs of another: XLA's flags are not part of jit's key.
    Not within a module: its tests count compilations, and compare with results that they keep.
    """
    if nextitem is not None and nextitem.path == item.path:
        return
    import gc

    import jax

    jax.clear_caches()
    gc.collect()
