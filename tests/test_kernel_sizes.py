"""Every kernel compiles for the H200 at sizes that are multiples of nothing: TMA takes whole tiles of an array, and the interpreter any."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from compiler_support import compile_kernel

from lcx.backends.choose import AUTO, attend
from lcx.bench.decode import abstract_pages
from lcx.ops.attention import Source
from lcx.ops.block_scores import STRIDES
from pallas_kernels.attend_bwd import attend_with_gradient
from pallas_kernels.decode import decode
from pallas_kernels.mask import Mask
from pallas_kernels.payloads import Payload
from pallas_kernels.score_blocks import score_antidiagonal, score_minmax, score_pooled
from pallas_kernels.score_probe import score_probe

SLOW = pytest.mark.slow


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("G", "T", "S", "D"),
    [(1, 3, 1_001, 80), pytest.param(3, 1, 77, 64, marks=SLOW), pytest.param(2, 200, 333, 128, marks=SLOW)],
)
def test_attend(G, T, S, D):
    def run(q, k, v, pos, q_pos):
        tile = lambda start, size: (
            jax.lax.dynamic_slice_in_dim(k, start, size, 3),
            jax.lax.dynamic_slice_in_dim(v, start, size, 2),
        )
        return attend(q, [Source(pos, tile, plain=True)], q_pos, scale=0.1, implementation=AUTO)

    q, k, v = shape(2, 3, G, T, D), shape(2, 3, D, S), shape(2, 3, S, D)
    compile_kernel(run, q, k, v, shape(2, 1, S, dtype=jnp.int32), shape(2, T, dtype=jnp.int32)).check()


@pytest.mark.parametrize(("G", "T", "S", "D"), [(3, 77, 201, 64), pytest.param(1, 130, 1_001, 80, marks=SLOW)])
def test_gradients(G, T, S, D):
    def run(q, k, v):
        loss = lambda *x: attend_with_gradient(*x, scale=0.1, mask=Mask(causal=True), q_offset=S - T).out.sum()
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    compile_kernel(run, shape(2, 3, G, T, D), shape(2, 3, D, S), shape(2, 3, S, D)).check()


@pytest.mark.parametrize(
    ("kind", "G", "T", "D", "n"), [("int4", 3, 1, 80, 7), pytest.param("bf16", 5, 3, 64, 1, marks=SLOW)]
)
def test_decode(kind, G, T, D, n):
    args = shape(2, 3, G, T, D), abstract_pages(Payload(kind), 64 if D == 64 else 128, 50)
    more = shape(2, 3, n, dtype=jnp.int32), shape(2, 3, dtype=jnp.int32)
    compile_kernel(lambda q, *held: decode(q, *held, scale=0.1), *args, *more).check()


@pytest.mark.parametrize("pages", [1, 520, *(pytest.param(n, marks=SLOW) for n in (33, 1_001))])
def test_extremes_and_pooled(pages):
    q, held = shape(2, 3, 3, 1, 64), shape(2, 3, 64, pages)
    compile_kernel(score_minmax, q, held, held).check()
    q, k = shape(2, 3, 3, 77, 80), shape(2, 3, 80, pages)
    compile_kernel(partial(score_pooled, scale=0.1, rows=1, size=16), q, k).check()


# blocks of 128 keys: from one to more than a tile takes (32, 16 and 8 at stride 16, 8 and 4), and no multiple of that
LENGTHS = (1, 77, 129, 333, 1_999, 2_432, 4_225, 5_000, 8_193, 10_000, 16_512, 131_001)
QUICK = [(16, 5_000), (16, 129), (8, 2_432), (4, 16_512)]


@pytest.mark.parametrize(
    ("stride", "S"),
    [pair if pair in QUICK else pytest.param(*pair, marks=SLOW) for pair in itertools.product(STRIDES, LENGTHS)],
)
def test_antidiagonals(stride, S):
    """At the end of a text, whose last queries are no multiple of a row either."""
    offset = max(0, S - 200) // stride * stride
    run = partial(score_antidiagonal, stride=stride, scale=0.1, q_offset=offset)
    compile_kernel(run, shape(2, 3, 3, S - offset, 80), shape(2, 3, 80, S)).check()


@pytest.mark.parametrize(("T", "S", "D"), [(64, 5_003, 80), pytest.param(9, 333, 64, marks=SLOW)])
def test_probes(T, S, D):
    compile_kernel(partial(score_probe, scale=0.1, q_offset=S - T), shape(2, 3, 3, T, D), shape(2, 3, D, S)).check()
