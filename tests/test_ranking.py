"""Methods are ranked only as far as the errors of their losses carry it."""

import pytest

from lcx.report.ranking import grouped, joint, rankings
from lcx.sweep.schema import COLUMNS

EMPTY = dict.fromkeys(c.name for c in COLUMNS)


def row(method, loss, error, **columns):
    known = {"status": "ok", "model": "m", "text": "ledger", "length": 512, "batch": 1, "dtype": "float32", "seed": 0}
    return EMPTY | known | {"method": method, "nll_minus_dense": loss, "nll_minus_dense_se": error} | columns


def test_a_step_needs_two_joint_errors_to_all_on_the_other_side():
    # a and b: 0.05 apart, joint error 0.028; b and c: 0.3 apart; d is near c but far from the rest, its error is large
    losses = {"c": (0.35, 0.02), "a": (0.0, 0.02), "d": (0.5, 0.2), "b": (0.05, 0.02)}
    assert grouped(losses) == [["a", "b"], ["c", "d"]]


def test_an_unknown_error_ranks_nothing():
    assert grouped({"a": (0.0, None), "b": (9.0, 0.001)}) == [["a", "b"]]
    # c could stand anywhere, so that nothing before it is told from all after
    assert grouped({"a": (0.0, 0.001), "b": (9.0, 0.001), "c": (20.0, None)}) == [["a", "b", "c"]]


def test_seeds_are_taken_together():
    assert joint([(1.0, 0.3), (2.0, 0.4)]) == pytest.approx((1.5, 0.25))
    assert joint([(1.0, 0.3), (2.0, None)]) == (1.5, None)


def test_a_line_for_each_text_and_length():
    rows = [
        row("dense", 0.0, 0.0),
        row("int4", 0.02, 0.03),
        row("h2o", 1.0, 0.1, keep_ratio=0.25),
        row("h2o", 0.2, 0.02, keep_ratio=0.5),
    ]
    rows += [row("dense", 0.0, 0.0, length=1_024), row("quest", 0.4, 0.1, length=1_024, status="oom")]
    assert rankings(rows) == [("ledger at 512 tokens", "dense, int4 < h2o 0.5 < h2o 0.25")]
