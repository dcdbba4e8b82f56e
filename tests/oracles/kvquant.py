"""KVQuant (Hooper et al., arXiv:2401.18079): raw keys per channel, values per token, one codebook a layer, outliers apart.

From the paper and the authors' code (SqueezeAILab/KVQuant).  A channel is one number of one KV head, c = head x D + place in
the head, C = K x D of them; a codebook ("table") holds 2^bits levels within [-1, 1], ascending, for keys and for values each.

- A number is stored as the code of the level nearest to (x - zero) / radius, zero = (high + low) / 2, radius = (high - low)
  / 2; of two equally near levels the lower.  A range of width 0 reads back as its zero (the authors' code gives 0 there).
- Keys, before RoPE: low and high of each channel are measured once (section 3.1).  Values: those of each token, taken over
  all C channels after its outliers have left (section 3.3).
- Outliers, `a_side` of the largest and of the smallest in each token, are read back exactly (the authors' kernels: 21 of
  4,096 a side).  Keys rank by (x - zero) / radius, and only those beyond [-1, 1] count, so a token may have fewer; further
  ones become the end level.  Values rank as they are, and always `a_side` a side leave.  Of equal ones the lower channel is
  taken first; torch leaves that open.  A value that both sides would take is taken once.
- The first `sinks` positions are exact.  Keys are rotated after they are read back, at the token's own position.

`stored`: the float type in which zeros, radii and exact numbers are kept; float64 rounds nothing.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from oracles import EMPTY


@dataclass(frozen=True)
class Read:
    """What is read back.

    Attributes:
      x: float64 [B,K,S,D]; 0 for padding.
      codes: int [B,S,C]; -1 where a sink or padding has none.  An outlier has one too, which is not read.
      outlier: bool [B,S,C].
    """

    x: np.ndarray
    codes: np.ndarray
    outlier: np.ndarray


def channels(x):
    """Return float64 [B,S,C] from [B,K,S,D]."""
    x = np.asarray(x, np.float64)
    return np.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)


def heads(flat, K):
    """Return [B,K,S,D] from [B,S,C]."""
    return np.moveaxis(flat.reshape(*flat.shape[:2], K, -1), 2, 1)


def outliers_a_side(num_channels, share):
    """Return ceil(share x C / 2): 21 for one percent of 4,096."""
    return math.ceil(Fraction(str(share)) * num_channels / 2)


def key_ranges(k_raw, pos, share, sinks=1):
    """Return (low, high), float64 [C] each: the percentiles that leave share / 2 on either side, over all texts' tokens."""
    tokens = channels(k_raw)[(pos != EMPTY) & (pos >= sinks)]
    return tuple(np.percentile(tokens, [50 * share, 100 - 50 * share], axis=0))


def normalised(x, zero, radius):
    """Return (x - zero) / radius; without a range 0 at its zero, and infinite elsewhere."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = (x - zero) / radius
    return np.where(x == zero, 0.0, scaled)


def nearest(x, table):
    """Return the place of the nearest level of `table`, the lower of two."""
    table = np.asarray(table, np.float64)
    if (np.diff(table) < 0).any():
        raise ValueError("the levels must ascend")
    # clipped: an infinite number is as far from all levels
    return np.abs(np.clip(x, table[0], table[-1])[..., None] - table).argmin(-1)


def highest(rank, num):
    """Return bool [...,C], the `num` highest of each row, the lower channel first among equals."""
    chosen = np.zeros(rank.shape, bool)
    np.put_along_axis(chosen, np.argsort(-rank, -1, kind="stable")[..., :num], True, -1)
    return chosen


def extremes(rank, a_side):
    """Return bool [...,C], the `a_side` highest and the `a_side` lowest of each row."""
    return highest(rank, a_side) | highest(-rank, a_side)


def read_back(x, pos, low, high, outlier, table, levels, sinks, stored):
    """Return `Read`; x [B,S,C] in groups whose ranges low and high broadcast to it."""
    kept = lambda a: np.asarray(a).astype(stored).astype(np.float64)
    zero, radius = kept((high + low) / 2), kept((high - low) / 2)
    codes = nearest(normalised(x, zero, radius), table)
    levels = np.asarray(table if levels is None else levels, np.float64)
    real, first = (pos != EMPTY)[..., None], (pos < sinks)[..., None]
    outlier = outlier & real & ~first
    out = np.where(outlier | first, kept(x), levels[codes] * radius + zero)
    return np.where(real, out, 0.0), np.where(real & ~first, codes, -1), outlier


def read_keys(k_raw, pos, low, high, table, a_side, *, levels=None, sinks=1, stored=np.float64):
    """Return the raw keys as they are read back, `Read`.

    Args:
      k_raw: [B,K,S,D], keys before RoPE.
      pos: int [B,S], EMPTY for padding.
      low, high: [C], ranges of the channels.
      table: [2^bits], ascending, by which codes are chosen.
      a_side: outliers of one token on either side, at most.
      levels: [2^bits], what a code is read back as: `q_norm` of the table; None: the table.
      sinks: first positions that are exact.
      stored: type of zeros, radii and exact numbers.
    """
    x = np.where((pos != EMPTY)[..., None], channels(k_raw), 0.0)
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    rank = normalised(x, (high + low) / 2, (high - low) / 2)
    outlier = (highest(rank, a_side) & (rank > 1)) | (highest(-rank, a_side) & (rank < -1))
    flat, *rest = read_back(x, pos, low, high, outlier, table, levels, sinks, stored)
    return Read(heads(flat, np.shape(k_raw)[1]), *rest)


def value_ranges(x, a_side):
    """Return (low, high, outlier) of values x [...,C]: the range of each token without its outliers, [...,1] each."""
    if 2 * a_side >= x.shape[-1]:
        raise ValueError(f"a_side={a_side} leaves none of {x.shape[-1]} channels")
    outlier = extremes(x, a_side)
    rest = lambda fill: np.where(outlier, fill, x)
    return rest(np.inf).min(-1, keepdims=True), rest(-np.inf).max(-1, keepdims=True), outlier


def read_values(v, pos, table, a_side, *, levels=None, sinks=1, stored=np.float64):
    """Return the values as they are read back, `Read`.  v: [B,K,S,D]; the rest as in `read_keys`."""
    x = np.where((pos != EMPTY)[..., None], channels(v), 0.0)
    flat, *rest = read_back(x, pos, *value_ranges(x, a_side), table, levels, sinks, stored)
    return Read(heads(flat, np.shape(v)[1]), *rest)


def rotate(x, pos, frequencies):
    """Return x [B,K,S,D] after RoPE, halves of a head paired; frequencies [D/2], radians a position; 0 for padding."""
    angle = np.where(pos == EMPTY, 0, pos)[:, None, :, None] * np.asarray(frequencies, np.float64)
    first, second = np.split(np.asarray(x, np.float64), 2, -1)
    turned = [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    return np.where((pos != EMPTY)[:, None, :, None], np.concatenate(turned, -1), 0.0)


# ---- calibration


def fisher_weights(fisher, radius):
    """Return the weight of each sample: F x radius^2, the paper's objective.  The authors' code passes F alone."""
    return np.asarray(fisher, np.float64) * np.asarray(radius, np.float64) ** 2


def key_samples(k_raw, pos, low, high, fisher, sinks=1):
    """Return (samples, weights), [n] each: the keys of one layer that lie within their channel's range, scaled to [-1, 1]."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    x = np.where((pos != EMPTY)[..., None], channels(k_raw), 0.0)
    scaled = normalised(x, (high + low) / 2, (high - low) / 2)
    inside = (np.abs(scaled) <= 1) & (pos >= sinks)[..., None]
    return scaled[inside], fisher_weights(channels(fisher), (high - low) / 2)[inside]


def value_samples(v, pos, a_side, fisher, sinks=1):
    """Return (samples, weights), [n] each, of values, scaled by the rule of `read_values`; outliers are left out.

    The authors' calibration takes each token's percentiles themselves as its range.
    """
    x = np.where((pos != EMPTY)[..., None], channels(v), 0.0)
    low, high, outlier = value_ranges(x, a_side)
    zero, radius = (high + low) / 2, (high - low) / 2
    inside = ~outlier & (pos >= sinks)[..., None]
    return normalised(x, zero, radius)[inside], fisher_weights(channels(fisher), radius)[inside]


def quantile_start(samples, weights, num):
    """Return [num] first centroids: the samples at shares (i + 1/2) / num of the weight, in ascending order.

    The initialisation of these oracles.  The authors use scikit-learn's k-means++ with seed 0, which no other library draws.
    """
    order = np.argsort(samples, kind="stable")
    total = np.cumsum(np.asarray(weights, np.float64)[order])
    return np.asarray(samples, np.float64)[order][np.searchsorted(total, (np.arange(num) + 0.5) / num * total[-1])]


def weighted_error(samples, weights, table):
    """Return the sum over the samples of weight x squared distance from the nearest level."""
    return float(weights @ (samples - np.asarray(table)[nearest(samples, table)]) ** 2)


def kmeans(samples, weights, start, max_iter=50):
    """Return the ascending centroids [num] of weighted k-means by Lloyd's steps from `start`, which must ascend.

    A step gives each sample to its nearest centroid (the lower of two) and moves each centroid to the weighted mean of its
    samples; one without weight stays where it is (scikit-learn moves it to the farthest sample).  Ends when a step moves
    nothing, or after `max_iter` steps, the authors' 50.
    """
    samples, weights = np.asarray(samples, np.float64), np.asarray(weights, np.float64)
    table = np.asarray(start, np.float64)
    for _ in range(max_iter):
        group = nearest(samples, table)
        mass, total = (np.bincount(group, w, len(table)) for w in (weights, weights * samples))
        moved = np.where(mass > 0, total / np.where(mass > 0, mass, 1), table)
        if (moved == table).all():
            break
        table = moved
    return table


def q_norm(samples, table):
    """Return the levels [2^bits] that give the samples their mean and spread back after rounding; the authors' 2 bits.

    Level x s1 / s2 + (m1 - m2 x s1 / s2), m and s the mean and standard deviation of the samples before and after rounding.
    """
    rounded = np.asarray(table, np.float64)[nearest(samples, table)]
    scale = np.std(samples) / np.std(rounded)
    return np.asarray(table) * scale + np.mean(samples) - np.mean(rounded) * scale


# ---- what it takes


def bits_a_value(kind, bits, num_channels, num_tokens, a_side, *, sinks=1, index_bits=16, float_bits=16):
    """Return the bits that one layer's keys or values take, divided by the numbers that they hold.

    Per token: the codes, `a_side` outliers on either side with their channel, whether in use or not, and for values zero and
    radius; a sink its numbers alone.  Once: the table, and for keys zero and radius of each channel.

    Args:
      kind: "keys" or "values".
      num_channels, num_tokens: C, and the tokens of one text, sinks included.
      index_bits, float_bits: of an outlier's channel, and of every number that is not a code.
    """
    if kind not in ("keys", "values"):
        raise ValueError(f"kind={kind!r}: allowed are keys, values")
    sinks = min(sinks, num_tokens)
    token = bits * num_channels + 2 * a_side * (index_bits + float_bits) + 2 * float_bits * (kind == "values")
    once = float_bits * (2**bits + (2 * num_channels if kind == "keys" else 0))
    total = (num_tokens - sinks) * token + sinks * num_channels * float_bits + once
    return total / (num_tokens * num_channels)
