"""K1, attention forward: the kernel interpreted with race detection against a float64 reference, and compiled for the H200."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiler_support import compile_kernel
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lcx.bench.interpret import interpreted
from lcx.errors import UserError
from lcx.ops.attention import EMPTY, merge
from pallas_kernels.attend import attend
from pallas_kernels.lists import BlockList, from_blocks, from_mask, to_blocks, transpose
from pallas_kernels.mask import Mask
from pallas_kernels.tables import ATTEND, AttendTile

pytestmark = pytest.mark.timeout(200)

FULL = Mask(causal=False)


def random_qkv(B=1, K=1, G=1, T=128, S=128, D=64, dtype=jnp.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(shape) for shape in [(B, K, G, T, D), (B, K, D, S), (B, K, S, D)])
    # 2: softmax weights that differ, so that a wrong key shows
    return jnp.asarray(2 * q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)


def visible(
    shape,
    causal=True,
    window=None,
    sink=0,
    q_pos=None,
    kv_pos=None,
    q_offset=0,
    kv_len=None,
    segments=None,
    spans=None,
    tiles=None,
):
    """bool [B,K,G,T,S], from the words of the contract alone."""
    B, K, G, T, S = shape
    q_pos = np.arange(T) + np.reshape(q_offset, (-1, 1)) if q_pos is None else np.asarray(q_pos)
    if kv_pos is None:
        limit = np.reshape(S if kv_len is None else kv_len, (-1, 1))
        kv_pos = np.where(np.arange(S) < limit, np.arange(S), -1)
    kv_pos = np.asarray(kv_pos)
    kv_pos = kv_pos if kv_pos.ndim == 3 else kv_pos[:, None]
    qp, kp = q_pos[:, None, None, :, None], kv_pos[:, :, None, None, :]
    mask = (kp >= 0) & (qp >= 0)
    if causal:
        mask = mask & (kp <= qp)
    if spans is not None:
        window = np.broadcast_to(spans, (B, K))[:, :, None, None, None]
    if window is not None:
        mask = mask & ((qp - kp < window) | (kp < sink))
    if segments is not None:
        a, b = (np.asarray(x) for x in segments)
        mask = mask & (a[:, None, None, :, None] == b[:, None, None, None, :])
    if tiles is not None:  # bool [b,h,Q,N]
        tiles = np.asarray(tiles)
        if tiles.shape[1] in (1, K):
            tiles = np.repeat(tiles, K * G // tiles.shape[1], 1)
        tiles = np.repeat(np.repeat(tiles, 128, 2), 128, 3)[:, :, :T, :S]
        mask = mask & tiles.reshape(-1, K, G, T, S)
    return np.broadcast_to(mask, shape)


def reference(q, k, v, mask, scale):
    """float64 attention of every query over the keys of its mask; (out, lse)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bkgtd,bkds->bkgts", q, k) * scale
    weights = np.where(mask, np.exp(np.where(mask, logits, 0)), 0)
    total = weights.sum(-1)
    out = np.einsum("bkgts,bksd->bkgtd", weights, v) / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):
        return out, np.log(total)


def agree(part, expected, dtype=jnp.bfloat16):
    out, lse = (np.asarray(x, np.float64) for x in part)
    expected_out, expected_lse = expected
    # P is rounded to the type of q before the second product: bfloat16 keeps 8 bits, float16 11
    tolerance = 1e-2 if dtype == jnp.bfloat16 else 2e-3
    assert np.abs(out - expected_out).max() <= tolerance * max(np.abs(expected_out).max(), 1e-6)
    empty = np.isneginf(expected_lse)
    assert np.array_equal(np.isneginf(lse), empty)
    assert not out[empty].any(), "a row without keys is not exactly 0"
    # logits and their sum are float32
    assert np.abs(np.where(empty, 0, lse - np.where(empty, 0, expected_lse))[~empty]).max(initial=0) <= 1e-3


def check(qkv, mask=Mask(), *, visible_by=None, out_dtype=None, tile=None, **data):  # noqa: B008
    """The interpreted kernel equals the reference; `visible_by`: arguments of `visible` beyond those of the mask and `data`."""
    q, k, v = qkv
    scale = q.shape[-1] ** -0.5
    run = interpreted(partial(attend, scale=scale, mask=mask, out_dtype=out_dtype, tile=tile))
    part = run(q, k, v, **data)
    assert part.out.dtype == (out_dtype or jnp.float32)
    about = {key: value for key, value in data.items() if key != "blocks"}
    about |= dict(causal=mask.causal, window=mask.window, sink=mask.sink) | (visible_by or {})
    seen = visible((*q.shape[:4], k.shape[-1]), **about)
    agree(part, reference(q, k, v, seen, scale), q.dtype)
    return part


def some_blocks(rng, shape, density):
    """bool, with the diagonal tile always in it."""
    return jnp.asarray(rng.random(shape) < density) | jnp.eye(shape[2], shape[3], dtype=bool)


# dense and masked by position


def test_dense_cross_attention_equals_the_reference():
    check(random_qkv(T=128, S=256), FULL)


@pytest.mark.parametrize("D", [128, 256])
def test_causal_attention_equals_the_reference(D):
    check(random_qkv(B=1, K=1, G=1, T=256, S=256, D=D))


@pytest.mark.parametrize("G", [1, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_gqa_needs_no_repeated_keys(G):
    check(random_qkv(B=1, K=2, G=G, T=100, S=100))


def test_lengths_that_are_no_multiples_of_the_tile():
    check(random_qkv(B=2, T=131, S=259), q_offset=jnp.asarray([128, 40]), kv_len=jnp.asarray([259, 171]))


def test_window_with_sink():
    # 1,024 keys: tiles 0 (sink) and 5 ... 7 (window) are visited
    check(random_qkv(T=256, S=1024), Mask(window=200, sink=5), q_offset=768)


def test_a_window_visits_no_tile_outside_of_it():
    """Keys that a window hides by whole tiles are not even read: NaN in them does no harm."""
    q, k, v = random_qkv(T=128, S=512)
    k, v = k.at[..., :128].set(jnp.nan), v.at[:, :, :128].set(jnp.nan)
    part = interpreted(partial(attend, scale=0.125, mask=Mask(window=128)))(q, k, v, q_offset=384)
    assert np.isfinite(part.out).all()


def test_offsets_by_sequence_and_rows_before_every_key():
    """Sequence 0 holds nothing; all rows of it are 0 and -inf."""
    check(random_qkv(B=2, T=64, S=128), q_offset=jnp.asarray([0, 60]), kv_len=jnp.asarray([0, 100]))


def test_spans_differ_by_kv_head():
    check(random_qkv(K=2, T=256, S=256), Mask(spans=True, sink=3), spans=jnp.asarray([70, 1 << 20]))


def test_segments_do_not_see_each_other():
    segments = jnp.asarray(np.repeat([0, 1, 2], [50, 100, 106])[None])
    check(random_qkv(T=256, S=256), Mask(segments=True), segments=(segments, segments))


def test_unordered_slots_with_holes():
    rng = np.random.default_rng(1)
    kv_pos = np.stack([rng.permutation(300)[:200] for _ in range(2)])[None]
    kv_pos[:, :, rng.random(200) < 0.2] = EMPTY
    q_pos = np.concatenate([[EMPTY], 100 + np.arange(99)])[None]
    mask = Mask(positions=True, window=120, sink=4)
    check(random_qkv(K=2, T=100, S=200), mask, q_pos=jnp.asarray(q_pos), kv_pos=jnp.asarray(kv_pos))


def test_float16_and_results_in_the_type_of_q():
    check(random_qkv(T=128, S=256, dtype=jnp.float16), FULL, out_dtype=jnp.float16)
    check(random_qkv(T=128, S=128), out_dtype=jnp.bfloat16)


@pytest.mark.parametrize("D", [80, pytest.param(96, marks=pytest.mark.slow)])
def test_other_head_dims_are_padded(D):
    check(random_qkv(T=128, S=128, D=D))


@pytest.mark.parametrize("tile", [AttendTile(size=64, stages=3), AttendTile(size=128, stages=2, ping_pong=False)])
def test_other_tiles_give_the_same(tile):
    check(random_qkv(T=128, S=320), q_offset=192, tile=tile)


def test_hidden_keys_may_hold_nan():
    q, k, v = random_qkv(T=128, S=128)
    part = interpreted(partial(attend, scale=0.125))(q, k.at[..., 100:].set(jnp.nan), v, kv_len=100)
    agree(part, reference(q, k, v, visible((1, 1, 1, 128, 128), kv_len=100), 0.125))


# lists


@pytest.mark.parametrize("by", ["query head", "kv head", pytest.param("all", marks=pytest.mark.slow)])
def test_block_list_by_head(by):
    rng = np.random.default_rng(2)
    heads = {"query head": 4, "kv head": 2, "all": 1}[by]
    tiles = some_blocks(rng, (1, heads, 2, 8), 0.2)
    blocks = from_blocks(tiles, Mask(), 256, 1024, q_offset=768)
    check(random_qkv(K=2, G=2, T=256, S=1024), blocks=blocks, q_offset=768, visible_by=dict(tiles=tiles))


def test_ten_per_cent_list_over_tiles_smaller_than_listed():
    """head_dim 256 walks a listed tile of 128 keys in two steps."""
    rng = np.random.default_rng(3)
    tiles = some_blocks(rng, (1, 1, 1, 20), 0.1)
    blocks = from_blocks(tiles, FULL, 128, 2500)
    check(random_qkv(T=128, S=2500, D=256), FULL, blocks=blocks, visible_by=dict(tiles=tiles))


def test_a_list_without_entries_gives_zero_and_minus_infinity():
    tiles = jnp.zeros((1, 1, 2, 2), bool).at[0, 0, 1, 0].set(True)
    blocks = from_blocks(tiles, FULL, 256, 256)
    part = check(random_qkv(T=256, S=256), FULL, blocks=blocks, visible_by=dict(tiles=tiles))
    assert np.isneginf(part.lse[..., :128]).all() and np.isfinite(part.lse[..., 128:]).all()


def test_positions_with_the_list_of_their_mask():
    rng = np.random.default_rng(4)
    kv_pos = rng.permutation(np.repeat([np.arange(0, 128), np.arange(128, 256), np.arange(900, 1028)], 1, 0)).reshape(
        1, 1, 384
    )
    q_pos = np.arange(200, 328)[None]
    q_pos[0, 100:] = EMPTY
    mask = Mask(positions=True, window=180)
    blocks = from_mask(mask, 128, 384, q_pos=jnp.asarray(q_pos), kv_pos=jnp.asarray(kv_pos))
    assert int(blocks.count[0, 0, 0]) == 2, "the tile that lies in the future is not listed"
    check(random_qkv(T=128, S=384), mask, blocks=blocks, q_pos=jnp.asarray(q_pos), kv_pos=jnp.asarray(kv_pos))


# lists alone, without a kernel


@pytest.mark.parametrize("mask", [FULL, Mask(), Mask(window=200, sink=130), Mask(spans=True)])
def test_a_mask_lists_the_tiles_that_some_pair_of_it_needs(mask):
    T, S, offset = 300, 900, 600
    data = dict(spans=jnp.asarray([100, 500])) if mask.spans else {}
    blocks = from_mask(mask, T, S, q_offset=offset, **data)
    visit, full = (np.asarray(x) for x in to_blocks(blocks, 8))
    seen = visible(
        (1, 2, 1, T, S),
        mask.causal,
        mask.window,
        mask.sink,
        q_offset=offset,
        spans=np.asarray([100, 500]) if mask.spans else None,
    )
    padded = np.zeros((2, 384, 1024), bool)
    padded[:, :T, :S] = seen[0, :, 0]
    tiles = padded.reshape(2, 3, 128, 8, 128)
    some = tiles.any((2, 4))[: visit.shape[1]]
    assert np.array_equal(visit[0], some)
    # rows of padding do not count against FULL
    tiles = np.concatenate([padded[:, :T], np.ones((2, 384 - T, 1024), bool)], 1).reshape(2, 3, 128, 8, 128)
    assert np.array_equal(full[0], tiles.all((2, 4))[: visit.shape[1]] & some)


def test_transpose_of_a_list_lists_the_same_tiles():
    rng = np.random.default_rng(5)
    tiles = jnp.asarray(rng.random((2, 3, 5, 7)) < 0.4)
    blocks = from_blocks(tiles, Mask(), 640, 896, q_offset=256)
    back = transpose(transpose(blocks, 7), 5)
    for a, b in zip(to_blocks(blocks, 7), to_blocks(back, 7), strict=True):
        assert np.array_equal(a, b)


def test_the_walk_of_a_kernel_visits_the_tiles_of_the_list():
    """Both work out the same tiles for masks that need no data."""
    for mask in [FULL, Mask(), Mask(window=1), Mask(window=130, sink=1), Mask(window=300, sink=500)]:
        for offset in (0, 77, 512):
            blocks = from_mask(mask, 384, 900, q_offset=offset, kv_len=min(900, offset + 384))
            for i in range(3):
                walk = mask.walk(offset + 128 * i, offset + 128 * i + 127, min(900, offset + 384), 128)
                tiles = [int(walk.tile(j)) for j in range(int(walk.steps))]
                assert tiles == list(map(int, blocks.index[0, 0, i, : int(blocks.count[0, 0, i])])), (mask, offset, i)


# properties


def test_merging_two_halves_equals_the_whole():
    q, k, v = random_qkv(T=128, S=512)
    run = interpreted(partial(attend, scale=0.125))
    halves = [run(q, k[..., :256], v[:, :, :256], q_offset=384), run(q, k[..., 256:], v[:, :, 256:], q_offset=128)]
    agree(merge(halves), reference(q, k, v, visible((1, 1, 1, 128, 512), q_offset=384), 0.125))


lengths = st.integers(1, 300)


def any_lengths(T, S, causal):
    mask = Mask(causal=causal)
    check(random_qkv(T=T, S=S), mask, q_offset=max(S - T, 0) if causal else 0)


@settings(max_examples=3)
@given(lengths, lengths, st.booleans())
@example(1, 1, True)
@example(129, 257, False)
def test_any_lengths(T, S, causal):
    any_lengths(T, S, causal)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=40)
@given(lengths, lengths, st.booleans())
def test_any_lengths_in_full(T, S, causal):
    any_lengths(T, S, causal)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("mask", [FULL, Mask(), Mask(window=100, sink=10)])
@pytest.mark.parametrize("listed", [False, True])
def test_every_combination(D, dtype, mask, listed):
    data = dict(q_offset=jnp.asarray([100, 60]), kv_len=jnp.asarray([300, 260]))
    about = {}
    if listed:
        tiles = some_blocks(np.random.default_rng(6), (2, 4, 2, 3), 0.5)
        data["blocks"] = from_blocks(tiles, mask, 200, 300, **data)
        about = dict(tiles=tiles)
    check(random_qkv(B=2, K=2, G=2, T=200, S=300, D=D, dtype=dtype), mask, visible_by=about, **data)


# what is refused


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=jnp.zeros((1, 1, 1, 128, 64), jnp.float32)), "float32"),
        (dict(v=jnp.zeros((1, 1, 64, 128), jnp.bfloat16)), "v "),
        (dict(scale=0.0), "scale=0.0"),
        (dict(out_dtype=jnp.float16), "out_dtype=float16"),
        (dict(segments=jnp.zeros((1, 128), jnp.int32)), "segments"),
        (dict(spans=jnp.zeros((1,), jnp.int32)), "spans"),
        (dict(mask=Mask(spans=True)), "spans"),
        (dict(kv_pos=jnp.zeros((1, 128), jnp.int32)), "q_pos, kv_pos"),
        (dict(mask=Mask(positions=True)), "q_pos, kv_pos"),
        (dict(q_offset=jnp.zeros((3,), jnp.int32)), "q_offset"),
        (
            dict(
                blocks=BlockList(
                    *(
                        jnp.zeros(s, t)
                        for s, t in [((1, 3, 1, 1), "int32"), ((1, 3, 1), "int32"), ((1, 3, 1, 1), "int8")]
                    )
                )
            ),
            "blocks",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(change, message):
    q, k, v = random_qkv()
    with pytest.raises(UserError, match=message):
        attend(**(dict(q=q, k=k, v=v, scale=0.125) | change))


@pytest.mark.parametrize(
    "fields", [dict(window=0), dict(sink=-1), dict(sink=4), dict(causal=False, window=4), dict(window=4, spans=True)]
)
def test_masks_that_mean_nothing_are_refused(fields):
    with pytest.raises(UserError):
        Mask(**fields)


# compiled for the H200

B, K, G, T, S = 2, 2, 4, 500, 1000
INT = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
LIST = BlockList(INT((B, K * G, 4, 8)), INT((B, K * G, 4)), jax.ShapeDtypeStruct((B, K * G, 4, 8), jnp.int8))
SPAN, POSITIONS = dict(spans=INT((K,))), dict(q_pos=INT((B, T)), kv_pos=INT((B, K, S)))
SEGMENTS = dict(segments=(INT((B, T)), INT((B, S))))
VARIANTS = {
    "dense": (FULL, {}, {}),
    "causal": (Mask(), {}, {}),
    "window": (Mask(window=300, sink=4), {}, {}),
    "spans": (Mask(spans=True, sink=4), SPAN, {}),
    "segments": (Mask(segments=True), SEGMENTS, {}),
    "positions": (Mask(positions=True, window=300, sink=4), POSITIONS, {}),
    "f16 out": (Mask(), {}, dict(out_dtype=jnp.bfloat16)),
    "all": (Mask(spans=True, segments=True, positions=True, sink=4), SPAN | POSITIONS | SEGMENTS, {}),
}
CHEAP = {("causal", False), ("window", True), ("all", True)}


def compiled(D, variant, listed, dtype=jnp.bfloat16, tile=None):
    mask, data, static = VARIANTS[variant]
    data = data | (dict(blocks=LIST) if listed else {})
    q, k, v = (jax.ShapeDtypeStruct(s, dtype) for s in [(B, K, G, T, D), (B, K, D, S), (B, K, S, D)])

    def run(q, k, v, data):
        return attend(q, k, v, scale=0.1, mask=mask, tile=tile, **data, **static)

    return compile_kernel(run, q, k, v, data)


def cases():
    for D in ATTEND:
        for variant in VARIANTS:
            for listed in (False, True):
                cheap = (variant, listed) in CHEAP
                yield pytest.param(D, variant, listed, marks=() if cheap else pytest.mark.slow)


@pytest.mark.parametrize("D, variant, listed", list(cases()))
def test_every_table_entry_compiles_for_the_h200(D, variant, listed):
    report = compiled(D, variant, listed).check()
    # 65,536 registers a core over three warpgroups: what set_max_registers then shares out
    assert report.registers == 168


@pytest.mark.slow
@pytest.mark.parametrize("D", ATTEND)
def test_float16_compiles_for_the_h200(D):
    compiled(D, "causal", True, jnp.float16).check()


def test_a_tile_that_does_not_fit_is_seen():
    """The check has teeth: twice the keys at head_dim 256 spill or exceed shared memory."""
    with pytest.raises((AssertionError, ValueError)):
        compiled(256, "causal", False, tile=dataclasses.replace(ATTEND[256], size=128)).check()
