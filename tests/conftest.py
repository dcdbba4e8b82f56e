"""What every test runs under: JAX on the CPU unless JAX_PLATFORMS says otherwise, property tests without chance."""

import atexit
import os
import shutil
import tempfile

# before any import of jax; the workers of pytest-xdist import this file too
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# an interpreted kernel has three warpgroups that wait for each other inside of callbacks, and XLA:CPU has as many threads as cores:
# with two cores the third may never run.  Read once, when the backend starts; commands that tests run must not inherit it
os.environ["NPROC"] = str(max(8, os.cpu_count() or 1))

import jax  # noqa: E402

jax.devices()
del os.environ["NPROC"]

# commands that tests run share what they compile; programs of the tests' own processes are compiled anew, as some tests count them
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="lcx_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

from hypothesis import HealthCheck, settings  # noqa: E402

# the first example of a shape compiles, so a deadline per example says nothing
settings.register_profile(
    "lcx", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lcx")


MOST_MAPS = 40_000  # of the 65,530 memory maps that a process may hold by Linux's default


def _num_maps() -> int:
    try:
        with open("/proc/self/maps") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def pytest_runtest_teardown(item, nextitem):
    """Drop compiled programs between modules, and between the test functions of one module when they hold many memory maps.

    Each program takes a few maps: all modules in one worker came to 50,000, the slow conformance tests alone to the limit and a crash.
    And a module that compiles with fewer optimisations must not meet programs of another: XLA's flags are not part of jit's key.
    Not within a test function: its cases count compilations, and compare with results that they keep.
    """
    if nextitem is not None and nextitem.path == item.path:
        if nextitem.originalname == item.originalname or _num_maps() < MOST_MAPS:
            return
    import gc

    jax.clear_caches()
    gc.collect()
