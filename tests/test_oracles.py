"""The oracles of tests/oracles on examples worked by hand, and on what their papers' rules imply."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from oracles import EMPTY, keydiff, positions, pyramidkv, xattention

LENGTHS, T, D = (37, 22), 37, 6
GROUPS = (1, 3, 8)
PEERS = np.load(Path(__file__).parent / "data" / "peers_smollm2_layers.npz", allow_pickle=False)


@pytest.fixture(params=GROUPS, ids=lambda group: f"group{group}")
def batch(request):
    """(q, k, v, pos): two texts of odd and even length, 2 KV heads, padding full of nan."""
    rng = np.random.default_rng(request.param)
    pos = positions(LENGTHS, T)
    q, k, v = (rng.normal(size=(2, 2, *shape, T, D)) * 2 for shape in ((request.param,), (), ()))
    for x in (q, k, v):
        np.moveaxis(x, -2, 1)[pos == EMPTY] = np.nan
    return q, k, v, pos


def alone(b, *arrays):
    """The arrays of one text as a batch of its own, without padding.  The tokens' axis is the last but one."""
    *vectors, pos = arrays
    return *(x[b : b + 1, ..., : LENGTHS[b], :] for x in vectors), pos[b : b + 1, : LENGTHS[b]]


def rows_of(k):
    return np.asarray(k, float)[None, None], np.arange(len(k))[None]


def assert_same_sets(ours, theirs):
    for row, other in zip(ours, theirs, strict=True):
        for head, expected in zip(row, other, strict=True):
            np.testing.assert_array_equal(head, expected)


# ---- KeyDiff


def test_keydiff_scores_by_hand():
    # directions (1,0), (0,1), (1,0): anchor (2/3, 1/3), of length sqrt(5)/3; the length of a key does not matter
    np.testing.assert_allclose(keydiff.scores([(3, 0), (0, 2), (1, 0)]), [-2 / 5**0.5, -1 / 5**0.5, -2 / 5**0.5])


def test_keydiff_keeps_in_one_step_and_step_by_step_by_hand():
    """Keys of directions a=(1,0), b=(0,-1), c=(-.6,.8), d=(.8,-.6); the score falls with the product with their sum."""
    k, pos = rows_of([(1, 0), (0, -1), (-3, 4), (4, -3)])
    # sum (1.2,-.8): 1.2, .8, -1.36, 1.44
    assert keydiff.kept(k, pos, 2)[0][0].tolist() == [1, 2]
    # a b c: sum (.4,-.2): .4, .2, -.4 drops a; then b c d: sum (.2,-.8): .8, -.76, .64 drops b
    assert keydiff.kept_in_steps(k, pos, 2, [2, 1, 1])[0][0].tolist() == [2, 3]


def test_keydiff_of_a_key_of_length_zero_is_finite():
    np.testing.assert_array_equal(keydiff.scores(np.zeros((3, 2))), 0)


@pytest.mark.parametrize("widths", [[37], [17, 17, 3], [9, *[1] * 28]], ids=["one", "chunks", "tokens"])
def test_keydiff_reads_each_text_alone(batch, widths):
    _, k, _, pos = batch
    both = keydiff.kept_in_steps(k, pos, 9, widths)
    for b, length in enumerate(LENGTHS):
        inside = [max(0, min(w, length - start)) for w, start in zip(widths, np.cumsum([0, *widths[:-1]]), strict=True)]
        assert_same_sets(both[b : b + 1], keydiff.kept_in_steps(*alone(b, k, pos), 9, inside))
        assert [len(head) for head in both[b]] == [9, 9]


def test_keydiff_keeps_a_short_text_whole(batch):
    _, k, _, pos = batch
    for head in keydiff.kept(k, pos, 30)[1]:
        assert head.tolist() == list(range(22))


# ---- PyramidKV


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # b 50, last 5, first 95, step 22.5: 95, 72.5, 50, 27.5, 5, halves to even
        ((100, 0.5, 4, 10, 5), [95, 72, 50, 28, 5]),
        # b 75, first 142.5 is above 100 - 4, so 96 and 54, step 10.5: 96, 85.5, 75, 64.5, 54
        ((100, 0.75, 4, 10, 5), [96, 86, 75, 64, 54]),
        # last 19.2 is below the window: uniform
        ((1_536, 0.25, 64, 20, 3), [384] * 3),
        ((100, 0.5, 4, 10, 1), [95]),
    ],
)
def test_budgets_of_kvpress_by_hand(sizes, expected):
    assert pyramidkv.budgets_kvpress(*sizes) == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # b 100, last 5, first 195, step 190 // 4 = 47: 195, 148, 101, 54, 7 and the window of 32
        ((1_000, 132, 32, 20, 5), [227, 180, 133, 86, 39]),
        # first 195 is above 210 - 32, so 178 and 22, step 39: 178, 139, 100, 61, 22
        ((210, 132, 32, 20, 5), [210, 171, 132, 93, 54]),
        ((150, 132, 32, 20, 5), [132] * 5),
        ((131, 132, 32, 20, 5), [131] * 5),
    ],
)
def test_budgets_of_the_authors_by_hand(sizes, expected):
    assert pyramidkv.budgets_authors(*sizes) == expected


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_budgets_equal_those_that_kvpress_used(ratio):
    used = PEERS[f"main/pyramidkv/{ratio}/budget"]
    assert pyramidkv.budgets_kvpress(1_536, ratio, 16, 10, 30) == used.tolist()
    assert used.mean() == pytest.approx(1_536 * ratio, abs=0.5)


def test_votes_by_hand():
    """One query over four keys; softmax of 1 x ln(1, 2, 3, 4) is .1, .2, .3, .4, of 0 x it .25 each."""
    k = np.log([1.0, 2, 3, 4])[:, None]
    q = np.array([1.0, 0])[:, None, None]
    np.testing.assert_allclose(pyramidkv.votes(q[:1], k, 1), [0.1, 0.2, 0.3])
    np.testing.assert_allclose(pyramidkv.votes(q[:1], k, 3), [0.1, 0.2, 0.5 / 3])  # 0.3 / 3, 0.6 / 3, 0.5 / 3
    np.testing.assert_allclose(pyramidkv.votes(q, k, 1), [0.175, 0.225, 0.275])


def test_votes_of_a_window_are_causal():
    """Two queries over four keys of weight 1, 2, 3, 4: shares of 6, then of 10."""
    k = np.log([1.0, 2, 3, 4])[:, None]
    np.testing.assert_allclose(
        pyramidkv.votes(np.ones((1, 2, 1)), k, 1), [(1 / 6 + 1 / 10) / 2, (2 / 6 + 2 / 10) / 2], rtol=1e-12
    )


def test_pooling_decides_by_hand():
    k, pos = rows_of(np.log([1.0, 2, 3, 4])[:, None])
    q = np.ones((1, 1, 1, 4, 1))
    assert pyramidkv.kept(q, k, pos, 2, 1, kernel=1)[0][0].tolist() == [2, 3]
    assert pyramidkv.kept(q, k, pos, 2, 1, kernel=3)[0][0].tolist() == [1, 3]


def test_pyramidkv_reads_each_text_alone(batch):
    q, k, _, pos = batch
    # b 12: 12 / 4 = 3, 21, and 12 in between
    budgets = pyramidkv.budgets_kvpress(24, 0.5, 3, 4, 3)
    assert budgets == [21, 12, 3]
    for num_kept, both in zip(budgets, pyramidkv.kept_by_layer([q] * 3, [k] * 3, pos, budgets, 3), strict=True):
        for b, length in enumerate(LENGTHS):
            q_alone, k_alone, pos_alone = alone(b, q, k, pos)
            assert_same_sets(both[b : b + 1], pyramidkv.kept(q_alone, k_alone, pos_alone, num_kept, 3))
            for head in both[b]:
                assert len(set(head.tolist())) == num_kept
                assert head[-3:].tolist() == list(range(length - 3, length))


def test_a_larger_budget_keeps_the_smaller_ones_tokens(batch):
    q, k, _, pos = batch
    small, large = (pyramidkv.kept(q, k, pos, num_kept, 3) for num_kept in (7, 15))
    for row, other in zip(small, large, strict=True):
        assert all(set(a.tolist()) < set(b.tolist()) for a, b in zip(row, other, strict=True))


# ---- XAttention


def one_head(q, k):
    """Arguments of the oracle for one text of vectors of length 1."""
    q, k = np.asarray(q, float), np.asarray(k, float)
    return q[None, None, None, :, None], k[None, None, :, None], np.arange(len(q))[None], np.arange(len(k))[None]


def test_antidiagonal_scores_by_hand():
    """Groups of two: the query at the odd place meets the key at the even one.  Logits k / 2 of 0, 2 ln 2, 2 ln 5."""
    k = [0, 9, 2 * math.log(2), 9, 2 * math.log(5), 9]  # the 9s meet queries of 0
    ((first, scores),) = xattention.block_scores(*one_head([0, 1] * 3, k), 2, 2)
    assert first == 0
    np.testing.assert_allclose(scores[0, 0], [[1, 0, 0], [1 / 3, 2 / 3, 0], [1 / 8, 2 / 8, 5 / 8]], atol=1e-15)


def test_a_partial_group_by_hand():
    """Five tokens: the last query stands at the even place and meets keys at odd ones, of which the last is missing."""
    k = [9, 0, 9, 2 * math.log(3), 9]
    ((_, scores),) = xattention.block_scores(*one_head([0, 0, 0, 0, 1], k), 2, 2)
    np.testing.assert_allclose(scores[0, 0], [[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 5, 3 / 5, 1 / 5]], atol=1e-15)


def test_blocks_of_two_groups_add_their_rows():
    """Blocks of four, groups of two: the rows 1; 1/3 2/3; 1/8 2/8 5/8 of the first example, two by two."""
    k = [0, 9, 2 * math.log(2), 9, 2 * math.log(5), 9]
    ((_, scores),) = xattention.block_scores(*one_head([0, 1] * 3, k), 2, 4)
    np.testing.assert_allclose(scores[0, 0], [[2, 0], [3 / 8, 5 / 8]], atol=1e-15)


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        # block 0 and the own block, 5, hold .35 of 1
        (0.3, [0, 5]),
        (0.6, [0, 1, 5]),
        (0.8, [0, 1, 3, 5]),
        (0.9, [0, 1, 2, 3, 5]),
        (1.0, [0, 1, 2, 3, 5]),  # block 4 has no mass
    ],
)
def test_choice_by_hand(tau, expected):
    chosen = xattention.choose_row(np.array([0.05, 0.3, 0.15, 0.2, 0, 0.3, 0]), 5, tau)
    assert np.flatnonzero(chosen).tolist() == expected


def test_choice_stops_where_tau_is_reached_exactly():
    # 1/8 + 5/8 = 0.75 is not below 0.75
    row = np.array([1 / 8, 2 / 8, 5 / 8])
    assert xattention.choose_row(row, 2, 0.75).tolist() == [True, False, True]
    assert xattention.choose_row(row, 2, 0.76).tolist() == [True, True, True]
    assert xattention.choose_row(8 * row, 2, 0.75).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        # block 0, the own block and the largest other, 1, are always taken; 3 because .3 is below .32; then .6 is not
        (0.1, [0, 1, 5]),
        (0.32, [0, 1, 3, 5]),
        # .6 is below .7, .8 is not
        (0.7, [0, 1, 2, 3, 5]),
        (0.9, [0, 1, 2, 3, 5]),
        (1.0, [0, 1, 2, 3, 4, 5]),  # .95 is below 1 when block 4, without mass, has its turn
    ],
)
def test_choice_in_the_authors_first_chunk_by_hand(tau, expected):
    row = np.array([0.05, 0.3, 0.15, 0.2, 0, 0.3, 0])
    assert np.flatnonzero(xattention.choose_row_of_first_chunk(row, 5, tau)).tolist() == expected


def test_first_chunk_changes_its_own_rows_alone(batch):
    q, k, _, pos = batch
    rows = [xattention.chosen_blocks(q, k, pos, pos, 4, 8, 0.5, first_chunk=n) for n in (0, 16)]
    for (_, ours), (_, theirs) in zip(*rows, strict=True):
        assert (ours[:, :, 1, 0] & theirs[:, :, 1, 0]).all()
        np.testing.assert_array_equal(ours[:, :, 2:], theirs[:, :, 2:])


def test_no_smaller_set_reaches_tau():
    rng = np.random.default_rng(0)
    for own, tau in itertools.product((1, 4, 7), (0.5, 0.8, 0.95)):
        mass = np.where(np.arange(8) <= own, rng.gamma(0.3, size=8), 0)
        chosen = xattention.choose_row(mass, own, tau)
        assert mass[chosen].sum() >= tau * mass.sum() * (1 - 1e-12)
        assert chosen[0]
        assert chosen[own]
        assert not chosen[own + 1 :].any()
        rest = [i for i in range(1, own)]
        for others in itertools.combinations(rest, max(0, chosen.sum() - 3)) if chosen.sum() > 2 else ():
            assert mass[[0, own, *others]].sum() < tau * mass.sum()


def test_stride_one_is_the_exact_block_sum_of_attention(batch):
    q, k, _, pos = batch
    for b, (_, scores) in enumerate(xattention.block_scores(q, k, pos, pos, 1, 8)):
        T = LENGTHS[b]
        logits = np.einsum("kgtd,ksd->kgts", q[b, :, :, :T], k[b, :, :T]) / math.sqrt(D)
        weight = np.exp(logits) * np.tri(T)
        weight /= weight.sum(-1, keepdims=True)
        for i, j in itertools.product(range(-(-T // 8)), repeat=2):
            expected = weight[:, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].sum((2, 3))
            np.testing.assert_allclose(scores[:, :, i, j], expected, atol=1e-12)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_scores_are_the_sums_along_antidiagonals(batch, stride):
    """Token by token: the pairs of a tile whose places add up to S - 1, and no others."""
    q, k, _, pos = batch
    rows = xattention.block_scores(q, k, pos, pos, stride, 8)
    for b, (_, scores) in enumerate(rows):
        T, num_groups = LENGTHS[b], -(-LENGTHS[b] // stride)
        expected = np.zeros(scores.shape)
        for i in range(num_groups):
            logits = np.zeros((*scores.shape[:2], i + 1))
            for j, s in itertools.product(range(i + 1), range(stride)):
                t, u = i * stride + stride - 1 - s, j * stride + s
                if t < T and u < T:
                    logits[:, :, j] += (q[b, :, :, t] * k[b, :, None, u]).sum(-1)
            weight = np.exp(logits / math.sqrt(D) / stride)
            weight /= weight.sum(-1, keepdims=True)
            for j in range(i + 1):
                expected[:, :, i * stride // 8, j * stride // 8] += weight[:, :, j]
        np.testing.assert_allclose(scores, expected, atol=1e-12)
        # a row of blocks adds up to its groups that have a token
        per_block = [len(range(i, min(i + 8, T), stride)) for i in range(0, T, 8)]
        np.testing.assert_allclose(scores.sum(-1), np.broadcast_to(per_block, scores.shape[:3]), rtol=1e-12)


def test_xattention_reads_each_text_alone(batch):
    q, k, _, pos = batch
    both = xattention.chosen_blocks(q, k, pos, pos, 4, 8, 0.7)
    for b in range(2):
        q_alone, k_alone, pos_alone = alone(b, q, k, pos)
        ((first, chosen),) = xattention.chosen_blocks(q_alone, k_alone, pos_alone, pos_alone, 4, 8, 0.7)
        assert first == both[b][0]
        np.testing.assert_array_equal(chosen, both[b][1])


def test_chunks_choose_what_one_step_chooses(batch):
    q, k, _, pos = batch
    whole = xattention.chosen_blocks(q, k, pos, pos, 4, 8, 0.7)
    for start, stop in ((0, 16), (16, 32), (32, T)):
        for b, (first, chosen) in enumerate(
            xattention.chosen_blocks(q[..., start:stop, :], k, pos[:, start:stop], pos, 4, 8, 0.7)
        ):
            if (pos[b, start:stop] == EMPTY).all():
                assert chosen.size == 0
                continue
            M = chosen.shape[-1]
            np.testing.assert_array_equal(chosen, whole[b][1][:, :, first:M, :M])


def test_tau_one_is_dense_and_a_head_has_its_own_tau(batch):
    q, k, v, pos = batch
    K, G = q.shape[1:3]
    dense = xattention.chosen_blocks(q, k, pos, pos, 4, 8, 1.0)
    for b, (first, chosen) in enumerate(dense):
        assert xattention.density(first, chosen) == 1
        out = xattention.attend(q, k, v, pos, pos, 8, dense)[b, :, :, : LENGTHS[b]]
        logits = np.einsum("kgtd,ksd->kgts", q[b, :, :, : LENGTHS[b]], k[b, :, : LENGTHS[b]]) / math.sqrt(D)
        weight = np.exp(logits) * np.tri(LENGTHS[b])
        expected = weight @ v[b, :, None, : LENGTHS[b]] / weight.sum(-1, keepdims=True)
        np.testing.assert_allclose(out, expected, atol=1e-12)
    tau = np.full((K, G), 0.2)
    tau[1] = 1
    for (first, mixed), (_, low) in zip(
        xattention.chosen_blocks(q, k, pos, pos, 4, 8, tau),
        xattention.chosen_blocks(q, k, pos, pos, 4, 8, 0.2),
        strict=True,
    ):
        assert xattention.density(first, mixed[1:]) == 1
        np.testing.assert_array_equal(mixed[0], low[0])
        assert xattention.density(first, low) < 1


def test_queries_that_do_not_begin_a_block_are_refused(batch):
    q, k, _, pos = batch
    with pytest.raises(ValueError, match="begin at position 4, which is not a multiple of block=8"):
        xattention.block_scores(q[..., 4:, :], k, pos[:, 4:], pos, 4, 8)
    with pytest.raises(ValueError, match="block=8 is not a multiple of stride=3"):
        xattention.block_scores(q, k, pos, pos, 3, 8)
