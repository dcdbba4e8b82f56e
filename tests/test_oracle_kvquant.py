"""The oracle of KVQuant on examples worked by hand, and on what the paper's rules imply."""

import itertools

import numpy as np
import pytest
from oracles import EMPTY, kvquant, positions

LENGTHS, S, D = (37, 22), 37, 6
FOUR = np.array([-1, -0.25, 0.5, 1])


@pytest.fixture(params=(1, 2, 3), ids=lambda heads: f"heads{heads}")
def batch(request):
    """(k, v, pos): two texts of odd and even length, padding full of nan; channels differ in mean and spread."""
    rng = np.random.default_rng(request.param)
    pos = positions(LENGTHS, S)
    k, v = (rng.standard_t(3, size=(2, request.param, S, D)) for _ in range(2))
    k = k * rng.gamma(2, size=(request.param, 1, D)) + 3 * rng.normal(size=(request.param, 1, D))
    for x in (k, v):
        np.moveaxis(x, 2, 1)[pos == EMPTY] = np.nan
    return k, v, pos


def one_head(x):
    """[1,1,S,D] and its positions from [S,D]."""
    return np.asarray(x, float)[None, None], np.arange(len(x))[None]


# ---- by hand


def test_keys_by_hand():
    """Ranges 0 ... 8 (zero 4, radius 4) and -1 ... 1; levels read 0, 3, 6, 8 and -1, -.25, .5, 1."""
    k, pos = one_head([(100, 100), (0.9, 0.2), (1.6, -0.7), (8, -3), (12, 1.5), (-5, -9)])
    low, high = np.array([0, -1]), np.array([8, 1])
    read = kvquant.read_keys(k, pos, low, high, FOUR, 1)
    np.testing.assert_allclose(
        read.x[0, 0],
        # the sink; two inliers a token; one outlier; two on one side, of which 12 is 2 radii from its zero and 1.5 is 1.5;
        # two on the low side, of which -5 is 2.25 radii away and -9 is 9
        [(100, 100), (0, 0.5), (3, -1), (8, -3), (12, 1), (0, -9)],
    )
    assert read.codes[0].tolist() == [[-1, -1], [0, 2], [1, 0], [3, 0], [3, 3], [0, 0]]
    assert read.outlier[0].tolist() == [
        [False] * 2,
        [False] * 2,
        [False] * 2,
        [False, True],
        [True, False],
        [False, True],
    ]


def test_a_number_between_two_levels_takes_the_lower():
    assert kvquant.nearest(np.array([-0.625, -0.62, 0.75, 7, -np.inf]), FOUR).tolist() == [0, 1, 2, 3, 0]
    with pytest.raises(ValueError, match="must ascend"):
        kvquant.nearest(np.zeros(1), FOUR[::-1])


def test_values_by_hand():
    """9 and -7 leave; the rest reaches from 0 to 4: zero 2, radius 2, levels 0, 1.5, 3, 4.  Both heads share the range."""
    v = np.array([[0, 9, 1], [4, -7, 3.2]])[None, :, None]
    pos = np.array([[5]])
    read = kvquant.read_values(v, pos, FOUR, 1)
    np.testing.assert_allclose(read.x[0, :, 0], [[0, 9, 1.5], [4, -7, 3]])
    assert read.outlier[0, 0].tolist() == [False, True, False, False, True, False]
    # without outliers: -7 ... 9, zero 1, radius 8, levels -7, -1, 5, 9
    np.testing.assert_allclose(kvquant.read_values(v, pos, FOUR, 0).x[0, :, 0], [[-1, 9, -1], [5, -7, 5]])


def test_equal_values_leave_by_rank_and_not_by_threshold():
    """A constant token loses one outlier a side, not all of its channels, and comes back exactly."""
    v = np.full((1, 2, 1, 3), 2.5)
    read = kvquant.read_values(v, np.array([[4]]), FOUR, 1)
    np.testing.assert_array_equal(read.x, v)
    assert np.flatnonzero(read.outlier).tolist() == [0]
    # two of the highest and two of the lowest: the lower channels
    row = np.array([[[5.0, 1, 5, 1, 5, 1]]])
    assert np.flatnonzero(kvquant.extremes(row, 2)).tolist() == [0, 1, 2, 3]


def test_a_channel_without_a_range_reads_back_as_its_value():
    k, pos = one_head([(0, 0), (3, 0.5), (3.5, 0.5)])
    read = kvquant.read_keys(k, pos, np.array([3, -1]), np.array([3, 1]), FOUR, 1)
    np.testing.assert_array_equal(read.x[0, 0, 1:], [(3, 0.5), (3.5, 0.5)])
    assert read.outlier[0].tolist() == [[False] * 2, [False] * 2, [True, False]]


def test_outliers_a_side_are_those_of_the_authors_kernels():
    assert [kvquant.outliers_a_side(c, 0.01) for c in (4_096, 1_024, 192, 200)] == [21, 6, 1, 1]
    assert kvquant.outliers_a_side(4_096, 0) == 0


def test_key_ranges_by_hand():
    """Two texts: 0 ... 99 without the sink and 100 alone; the 0.5 and 99.5 percentiles of 1 ... 100."""
    k = np.stack([np.arange(101.0), np.full(101, 7.0)])[:, None, :, None]
    k[1, 0, 1] = 100
    k[0, 0, 100] = np.nan
    low, high = kvquant.key_ranges(k, positions((100, 2), 101), 0.01)
    np.testing.assert_allclose([low[0], high[0]], [1 + 0.005 * 99, 1 + 0.995 * 99])


def test_rotation_is_that_of_complex_numbers(batch):
    k, _, pos = batch
    frequencies = 10.0 ** -np.arange(D // 2)
    turned = kvquant.rotate(k, pos, frequencies)
    z = (k[..., : D // 2] + 1j * k[..., D // 2 :]) * np.exp(1j * pos[:, None, :, None] * frequencies)
    real = np.broadcast_to((pos != EMPTY)[:, None], k.shape[:3])
    np.testing.assert_allclose(turned[real], np.concatenate([z.real, z.imag], -1)[real], atol=1e-12)
    assert (turned[~real] == 0).all()


def test_bits_by_hand():
    # 3 x 4,096 and 42 outliers of 32 bits; 32 more for zero and radius of a token; the tables vanish in 10^9 tokens
    assert kvquant.bits_a_value("keys", 3, 4_096, 10**9, 21) == pytest.approx(3 + 42 * 32 / 4_096, abs=1e-6)
    assert kvquant.bits_a_value("values", 3, 4_096, 10**9, 21) == pytest.approx(3 + 43 * 32 / 4_096, abs=1e-6)
    # the paper prints 3.32 to 3.35
    assert 3.32 < kvquant.bits_a_value("keys", 3, 4_096, 128 * 1_024, 21) < 3.35
    # two tokens of 4 channels: a sink of 64 bits; 4 codes of 2 bits, 2 outliers of 8 + 16; table 64; keys 4 ranges of 32
    assert kvquant.bits_a_value("keys", 2, 4, 2, 1, index_bits=8) == (64 + 8 + 48 + 64 + 128) / 8
    assert kvquant.bits_a_value("values", 2, 4, 2, 1, index_bits=8) == (64 + 8 + 48 + 32 + 64) / 8
    with pytest.raises(ValueError, match="kind='k': allowed are keys, values"):
        kvquant.bits_a_value("k", 2, 4, 2, 1)


# ---- k-means


def test_kmeans_by_hand():
    """Start 0 and 10: {0, 1, 4} of weights 1, 1, 2 has mean 9/4, and 10 stays; nothing moves then."""
    samples, weights = np.array([0.0, 1, 4, 10]), np.array([1.0, 1, 2, 1])
    np.testing.assert_allclose(kvquant.kmeans(samples, weights, [0, 10]), [9 / 4, 10])
    # 5 is as near to 0 as to 10 and goes to the lower; a centroid that nobody is near to stays
    np.testing.assert_allclose(kvquant.kmeans(np.array([0.0, 5, 10]), np.ones(3), [0, 10, 90]), [2.5, 10, 90])
    # one step only: 4 is nearer to 3 and moves it to (3 + 4) / 2
    np.testing.assert_allclose(kvquant.kmeans(np.array([0.0, 3, 4, 9]), np.ones(4), [0, 3, 9], 1), [0, 3.5, 9])


def test_start_by_hand():
    """Weights 1, 1, 2 of 4 in the order 0, 1, 4: a half and seven halves of them lie in 0 and in 4."""
    assert kvquant.quantile_start(np.array([4.0, 0, 1]), np.array([2.0, 1, 1]), 4).tolist() == [0, 1, 4, 4]
    assert kvquant.quantile_start(np.array([4.0, 0, 1]), np.array([2.0, 1, 1]), 2).tolist() == [0, 4]


def test_kmeans_ends_where_no_step_helps_and_reaches_the_best_of_all_starts():
    rng = np.random.default_rng(0)
    samples, weights = rng.uniform(-1, 1, 12), rng.gamma(0.5, size=12)
    table = kvquant.kmeans(samples, weights, kvquant.quantile_start(samples, weights, 4))
    assert (np.diff(table) > 0).all()
    np.testing.assert_array_equal(kvquant.kmeans(samples, weights, table), table)
    error = lambda t: kvquant.weighted_error(samples, weights, t)
    assert error(table) < error(kvquant.quantile_start(samples, weights, 4))
    # the best of all partitions of the sorted samples into four neighbourhoods
    order = np.argsort(samples)
    best = min(
        sum(
            (weights[part] * (samples[part] - np.average(samples[part], weights=weights[part])) ** 2).sum()
            for part in np.split(order, cuts)
        )
        for cuts in itertools.combinations(range(1, 12), 3)
    )
    ends = (kvquant.kmeans(samples, weights, samples[order[list(s)]]) for s in itertools.combinations(range(12), 4))
    assert min(map(error, ends)) == pytest.approx(best, rel=1e-9)
    assert error(table) >= best * (1 - 1e-12)


def test_weights_matter_and_follow_the_radius():
    """A sample of weight 1e6 gets a level of its own; the paper's weight of a key is F x radius squared."""
    samples, weights = np.array([-1.0, -0.9, 0.1, 0.3, 1.0]), np.array([1.0, 1, 1e6, 1, 1])
    table = kvquant.kmeans(samples, weights, kvquant.quantile_start(samples, weights, 2))
    assert np.abs(table - 0.1).min() < 1e-5
    np.testing.assert_array_equal(kvquant.fisher_weights([1, 2], [3, 0.5]), [9, 0.5])


def test_samples_of_the_tables(batch):
    k, v, pos = batch
    fisher = np.where(np.isnan(k), np.nan, 2.0)
    low, high = kvquant.key_ranges(k, pos, 0.1)
    samples, weights = kvquant.key_samples(k, pos, low, high, fisher)
    assert np.abs(samples).max() <= 1
    # 57 tokens a channel without the sinks, of which three on either side lie beyond percentiles 5 and 95
    assert len(samples) == len(weights) == len(low) * (57 - 6)
    assert set(np.round(weights, 9)) == set(np.round(2 * ((high - low) / 2) ** 2, 9))
    samples, weights = kvquant.value_samples(v, pos, 1, fisher)
    assert len(samples) == len(weights) == 57 * (len(low) - 2)
    # each token's inliers reach from -1 to 1
    assert np.isclose(samples, 1).sum() == np.isclose(samples, -1).sum() == 57


def test_q_norm_gives_mean_and_spread_back():
    rng = np.random.default_rng(1)
    samples = rng.normal(0.1, 0.4, 500).clip(-1, 1)
    levels = kvquant.q_norm(samples, FOUR)
    read = levels[kvquant.nearest(samples, FOUR)]
    np.testing.assert_allclose([read.mean(), read.std()], [samples.mean(), samples.std()])
    k, pos = one_head([(0, 0), (0.9, -0.2)])
    read = kvquant.read_keys(k, pos, -np.ones(2), np.ones(2), FOUR, 0, levels=levels)
    np.testing.assert_allclose(read.x[0, 0, 1], levels[[3, 1]])


# ---- properties


def tables(num_bits):
    return np.linspace(-1, 1, 2**num_bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_is_at_most_half_the_largest_gap(batch, bits):
    k, v, pos = batch
    a_side = 1
    low, high = kvquant.key_ranges(k, pos, 0.1)
    keys, values = (
        kvquant.read_keys(k, pos, low, high, tables(bits), a_side),
        kvquant.read_values(v, pos, tables(bits), a_side),
    )
    half = 1 / (2**bits - 1)
    real = pos != EMPTY
    for x, read in ((k, keys), (v, values)):
        flat, got = kvquant.channels(x)[real], kvquant.channels(read.x)[real]
        exact = read.outlier[real] | (pos == 0)[real][:, None]
        np.testing.assert_array_equal(got[exact], flat[exact])
        if x is k:
            inside = ~exact & (flat >= low) & (flat <= high)
            bound = np.broadcast_to((high - low) / 2 * half, flat.shape)[inside]
        else:
            inside = ~exact
            lowest, highest, _ = kvquant.value_ranges(flat, a_side)
            bound = np.broadcast_to((highest - lowest) / 2 * half, flat.shape)[inside]
        assert (np.abs(got - flat)[inside] <= bound * (1 + 1e-9)).all()
        assert (kvquant.channels(read.x)[~real] == 0).all()
        assert (read.codes[~real] == -1).all()
        assert not read.outlier[~real].any()
        assert read.outlier.sum(-1).max() == 2 * a_side


def test_each_text_and_token_is_read_alone(batch):
    k, v, pos = batch
    low, high = kvquant.key_ranges(k, pos, 0.1)
    whole = kvquant.read_keys(k, pos, low, high, FOUR, 1), kvquant.read_values(v, pos, FOUR, 1)
    for b, length in enumerate(LENGTHS):
        for start, stop in ((0, length), (7, 8), (5, length)):
            part = np.s_[b : b + 1, :, start:stop]
            at = pos[b : b + 1, start:stop]
            alone = kvquant.read_keys(k[part], at, low, high, FOUR, 1), kvquant.read_values(v[part], at, FOUR, 1)
            for one, both in zip(alone, whole, strict=True):
                np.testing.assert_array_equal(one.x, both.x[part])
                np.testing.assert_array_equal(one.codes, both.codes[b : b + 1, start:stop])


def test_all_outliers_are_exact(batch):
    """Half of the channels a side: everything beyond its range is kept, and what is inside is rounded."""
    k, _, pos = batch
    low, high = kvquant.key_ranges(k, pos, 0.3)
    read = kvquant.read_keys(k, pos, low, high, FOUR, k.shape[1] * D)
    flat, real = kvquant.channels(k), pos > 0
    np.testing.assert_array_equal(read.outlier[real], ((flat < low) | (flat > high))[real])


def test_outliers_and_fixed_ranges_pay(batch):
    """Dropping the outliers, or taking one range for all channels of the keys, makes the error larger."""
    k, v, pos = batch
    real = pos != EMPTY
    error = lambda x, read: np.square(kvquant.channels(x - read.x)[real]).sum()
    low, high = kvquant.key_ranges(k, pos, 0.1)
    everything = [kvquant.key_ranges(k, pos, 0)[i] for i in (0, 1)]
    per_tensor = np.full_like(low, everything[0].min()), np.full_like(high, everything[1].max())
    keys = [error(k, kvquant.read_keys(k, pos, *r, tables(3), n)) for r, n in (((low, high), 1), (per_tensor, 0))]
    values = [error(v, kvquant.read_values(v, pos, tables(3), n)) for n in (1, 0)]
    assert keys[0] < keys[1]
    assert values[0] < values[1]


def test_float16_is_where_numbers_are_kept(batch):
    k, v, pos = batch
    low, high = kvquant.key_ranges(k, pos, 0.1)
    read = kvquant.read_keys(k, pos, low, high, FOUR, 1, stored=np.float16)
    flat = kvquant.channels(k)
    np.testing.assert_array_equal(kvquant.channels(read.x)[read.outlier], flat[read.outlier].astype(np.float16))
    exact = kvquant.read_keys(k, pos, low, high, FOUR, 1)
    assert 0 < np.abs(read.x - exact.x).max()
    same = (read.codes == exact.codes).mean()
    assert same > 0.98
    with pytest.raises(ValueError, match="leaves none of"):
        kvquant.read_values(v, pos, FOUR, v.shape[1] * D // 2)
