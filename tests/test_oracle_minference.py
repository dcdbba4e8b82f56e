"""The oracle of MInference on examples worked by hand, and on what the paper's rules imply."""

import itertools
import math

import numpy as np
import pytest
from oracles import EMPTY, minference, positions

# the shorter one is long enough for the rule to leave keys out
LENGTHS, T, D = (333, 253), 333, 4
GROUPS = (1, 3, 8)


@pytest.fixture(params=GROUPS, ids=lambda group: f"group{group}", scope="module")
def batch(request):
    """(q, k, v, pos): two texts, 2 KV heads (one where the group is large), padding full of nan; some keys stand out."""
    rng = np.random.default_rng(request.param)
    pos = positions(LENGTHS, T)
    K = 1 if request.param == 8 else 2
    q, k, v = (rng.normal(size=(2, K, *shape, T, D)) for shape in ((request.param,), (), ()))
    q, k = 2 * q, k * np.exp(rng.normal(size=(T, 1)) / 2)
    for x in (q, k, v):
        np.moveaxis(x, -2, 1)[pos == EMPTY] = np.nan
    return q, k, v, pos


# ---- by hand


def test_estimate_by_hand():
    """Keys of weight 1, 2, 3; all three queries are the probe: 1; 1/3 2/3; 1/6 2/6 3/6."""
    columns, distances = minference.estimate(np.ones((3, 1)), np.log([1.0, 2, 3])[:, None])
    np.testing.assert_allclose(columns, [1 + 1 / 3 + 1 / 6, 2 / 3 + 2 / 6, 3 / 6])
    np.testing.assert_allclose(distances, [1 + 2 / 3 + 3 / 6, 1 / 3 + 2 / 6, 1 / 6])


def test_the_probe_is_the_last_64_queries():
    """Equal keys: of 66 queries the last 64 count, and query i gives 1 / (i + 1) to each key up to its own."""
    columns, distances = minference.estimate(np.zeros((66, 1)), np.zeros((66, 1)))
    tail = sum(1 / (i + 1) for i in range(2, 66))
    np.testing.assert_allclose(columns[[0, 2, 64, 65]], [tail, tail, 1 / 65 + 1 / 66, 1 / 66])
    np.testing.assert_allclose(distances[[0, 2, 3, 65]], [tail, tail, tail - 1 / 3, 1 / 66])


def test_forced_places_count_and_the_nearer_of_equals_is_taken():
    assert minference.choose(np.array([0, 0, 5, 1, 5, 7.0]), 2, 4).tolist() == [0, 1, 2, 5]
    assert minference.choose(np.array([0, 0, 5, 1, 5, 7.0]), 2, 2).tolist() == [0, 1]


def test_ranges_by_hand():
    """A block that ends at 256.  Distances 0 and 10: 192 ... 255 and 182 ... 245; 200: 0 ... 63, as -8 ... 55 is clipped."""
    exact = [(0, 64), (182, 246), (192, 256)]
    assert minference.ranges([0, 10, 200, 256, 300], 256, authors=False) == exact
    # theirs: 182 ... 245 is lengthened by 64, to 309
    assert minference.ranges([0, 10, 200, 256, 300], 256, authors=True) == [(0, 64), (182, 310)]
    # ranges that touch are joined to the same; the third lies within
    assert minference.ranges([0, 64, 20], 256, authors=True) == [(128, 256)]
    # a gap of one key ends the chain
    assert minference.ranges([0, 65], 256, authors=True) == [(127, 191), (192, 256)]


def test_block_keys_by_hand():
    keys = lambda authors: np.flatnonzero(
        minference.block_keys([3, 70, 255, 256], [0, 100], 300, 256, authors)
    ).tolist()
    assert keys(False) == [3, 70, *range(92, 156), *range(192, 256)]
    assert keys(True) == keys(False)
    # distance 40 reads 152 ... 215, which their kernel lengthens by 64; distance 70: 122 ... 185, lengthened twice
    exact, theirs = (
        np.flatnonzero(minference.block_keys([3], [20, 70, 100], 300, 256, authors)).tolist()
        for authors in (False, True)
    )
    assert exact == [3, *range(92, 156), *range(156, 186), *range(186, 236)]
    assert theirs == [3, *range(92, 256)]


def test_the_first_block_reads_everything_before_it(batch):
    q, k, _, pos = batch
    for reads in minference.read_keys(q, k, pos, 1, 1):
        assert reads[:, :, 0, :64].all()


# ---- properties


@pytest.mark.parametrize("authors", [False, True])
def test_each_chosen_column_and_each_chosen_diagonal_is_read_whole(batch, authors):
    q, k, _, pos = batch
    for b, reads in enumerate(minference.read_keys(q, k, pos, 45, 115, authors)):
        n = LENGTHS[b]
        seen = minference.visible(reads)
        for h, g in np.ndindex(*reads.shape[:2]):
            columns, distances = minference.chosen(q[b, h, g, :n], k[b, h, :n], 45, 115)
            assert len(columns) == 45
            assert columns[:30].tolist() == list(range(30))
            assert len(distances) == 115
            assert distances[:100].tolist() == list(range(100))
            for c in columns:
                assert seen[h, g, c:, c].all()
            for d in distances:
                assert seen[h, g].diagonal(-d).all()


def test_a_block_reads_nothing_that_no_rule_names(batch):
    """From the pairs: a key is read by a block if it is a chosen column or within 64 before some end - d."""
    q, k, _, pos = batch
    for b, reads in enumerate(minference.read_keys(q, k, pos, 45, 115)):
        n = LENGTHS[b]
        for h, g, i in np.ndindex(reads.shape[:3]):
            columns, distances = minference.chosen(q[b, h, g, :n], k[b, h, :n], 45, 115)
            end = 64 * (i + 1)
            stops = np.maximum(end - distances[distances < end], 64)
            near = [bool(((key >= stops - 64) & (key < stops)).any()) for key in range(n)]
            assert (reads[h, g, i] == (np.arange(n) < end) & (near | np.isin(np.arange(n), columns))).all()


def test_the_authors_read_the_union_and_less_than_a_block_more_behind_each_chain(batch):
    q, k, _, pos = batch
    exact, theirs = (minference.read_keys(q, k, pos, 30, 103, authors) for authors in (False, True))
    more = 0
    for ours, others in zip(exact, theirs, strict=True):
        assert (others | ~ours).all()
        extra = np.diff(np.pad(others & ~ours, [(0, 0)] * 3 + [(1, 1)]).astype(int))
        for row in extra.reshape(-1, extra.shape[-1]):
            starts, stops = np.flatnonzero(row == 1), np.flatnonzero(row == -1)
            assert (stops - starts < 64).all()
        more += (others & ~ours).sum()
    assert more > 0


def test_chosen_lines_hold_the_most_mass_of_all_sets_with_the_forced_ones(monkeypatch):
    monkeypatch.setattr(minference, "COLUMNS", 2)
    scores = np.random.default_rng(3).gamma(0.3, size=9)
    for num in range(2, 9):
        best = max(scores[[0, 1, *rest]].sum() for rest in itertools.combinations(range(2, 9), num - 2))
        assert scores[minference.choose(scores, 2, num)].sum() == pytest.approx(best)


@pytest.mark.parametrize("sizes", [(T, 1), (1, T), (1_000, 6_096)])
def test_sizes_that_cover_the_text_are_dense(batch, sizes):
    q, k, v, pos = batch
    rows = minference.read_keys(q, k, pos, *sizes)
    out = minference.attend(q, k, v, pos, rows)
    for b, n in enumerate(LENGTHS):
        assert minference.visible(rows[b])[..., np.tri(n, dtype=bool)].all()
        logits = np.einsum("kgtd,ksd->kgts", q[b, :, :, :n], k[b, :, :n]) / math.sqrt(D)
        weight = np.exp(logits) * np.tri(n)
        want = weight @ v[b, :, None, :n] / weight.sum(-1, keepdims=True)
        np.testing.assert_allclose(out[b, :, :, :n], want, atol=1e-10)
        assert (out[b, :, :, n:] == 0).all()


@pytest.mark.parametrize("authors", [False, True])
def test_each_text_and_head_is_read_alone_and_may_have_sizes_of_its_own(batch, authors):
    q, k, v, pos = batch
    K, G = q.shape[1:3]
    rng = np.random.default_rng(0)
    vertical, slash = rng.integers(1, 80, (K, G)), rng.integers(100, 130, (K, G))
    both = minference.read_keys(q, k, pos, vertical, slash, authors)
    for b, h, g in np.ndindex(2, K, G):
        n = LENGTHS[b]
        part = q[b : b + 1, h : h + 1, g : g + 1, :n], k[b : b + 1, h : h + 1, :n], pos[b : b + 1, :n]
        (alone,) = minference.read_keys(*part, vertical[h, g], slash[h, g], authors)
        np.testing.assert_array_equal(alone[0, 0], both[b][h, g])


def test_more_columns_and_distances_keep_what_was_read(batch):
    q, k, _, pos = batch
    small, large = (minference.read_keys(q, k, pos, *sizes) for sizes in ((32, 100), (60, 120)))
    for few, many in zip(small, large, strict=True):
        assert (many | ~few).all()
        assert few.sum() < many.sum()


def test_what_the_authors_leave_open_is_refused(batch):
    q, k, _, pos = batch
    with pytest.raises(ValueError, match="slash=60 is below 100"):
        minference.read_keys(q, k, pos, 30, 60, authors=True)


def test_fewer_than_a_hundred_distances_are_the_nearest(batch):
    q, k, _, pos = batch
    fewest, fifty, hundred = (minference.read_keys(q, k, pos, 30, slash) for slash in (1, 50, 100))
    for a, b, c in zip(fewest, fifty, hundred, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (c | ~b).all() and b.sum() < c.sum()
    columns, distances = minference.chosen(q[0, 0, 0], k[0, 0], 30, 50)
    assert distances.tolist() == list(range(50)) and columns.tolist() == list(range(30))


def test_texts_of_no_token_read_nothing():
    rows = minference.read_keys(np.zeros((1, 1, 2, 3, 4)), np.zeros((1, 1, 3, 4)), np.full((1, 3), EMPTY), 30, 100)
    assert [r.shape for r in rows] == [(1, 2, 0, 0)]
