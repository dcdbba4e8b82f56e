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
