"""Reports of kernels compiled for the H200, for tests: they are skipped where the compiler is not installed."""

import pytest

from lcx.bench import compiled
from lcx.errors import UserError
from lcx.plan.targets import TARGETS, compile_device


def require_compiler():
    """Skips the test where the compile-only CUDA wheels (the extra `plan`) are not installed."""
    try:
        compile_device(TARGETS["h200"])
    except UserError as error:
        pytest.skip(str(error))


def compile_kernel(fn, *shapes):
    """As `compiled.compile_kernel`."""
    require_compiler()
    return compiled.compile_kernel(fn, *shapes)
