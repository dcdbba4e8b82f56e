"""Every kernel compiles for the H200 at sizes that are multiples of nothing: TMA takes whole tiles of an array, and the interpreter any."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from aot_support import compile_kernel

from experiments.gpu.decode import abstract_pages
from lcx.backends.choose import AUTO, attend
from lcx.ops.attention import Source
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


@pytest.mark.parametrize(("stride", "T", "S"), [(16, 48, 1_999), pytest.param(4, 200, 333, marks=SLOW)])
def test_antidiagonals(stride, T, S):
    run = partial(score_antidiagonal, stride=stride, scale=0.1, q_offset=S - S % stride - T)
    compile_kernel(run, shape(2, 3, 3, T, 80), shape(2, 3, 80, S)).check()


@pytest.mark.parametrize(("T", "S", "D"), [(64, 5_003, 80), pytest.param(9, 333, 64, marks=SLOW)])
def test_probes(T, S, D):
    compile_kernel(partial(score_probe, scale=0.1, q_offset=S - T), shape(2, 3, 3, T, D), shape(2, 3, D, S)).check()
