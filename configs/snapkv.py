"""SnapKV, Li et al. 2024, arXiv:2404.14469: the authors' LongBench runs: budget 1,024, observation window 32, maxima of 7."""

from lcx.experiment import Experiment
from lcx.policies.snapkv import SnapKV
from lcx.recipe import Recipe, Segment


def get_config():
    method = SnapKV(budget=1_024, window=32, kernel=7, pooling="max")
    return Experiment(
        recipe=Recipe((Segment(compress=method),)),
        verified=("oracle", "kvpress (window 64, `kernel=5`, `pooling='avg'`)"),
    )
