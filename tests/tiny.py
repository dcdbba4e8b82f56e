"""What the test files share: the small model of the conformance checks, its weights and texts, quick compilation."""

from functools import cache

import numpy as np
import pytest

from lcx.conformance import small_model
from lcx.conformance.small_model import ATOL as ATOL
from lcx.conformance.small_model import TINY
from lcx.conformance.small_model import layers as layers
from lcx.conformance.small_model import poison as poison
from lcx.models.decoder import random_weights


@cache
def weights(config=TINY, seed=0):
    return random_weights(config, seed)


def text(length, seed=0):
    """Token ids of a random text, int [length]."""
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, length)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs of a module that imports this: they run once or twice."""
    with small_model.quick_compilation():
        yield
