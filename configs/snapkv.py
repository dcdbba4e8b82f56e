"""SnapKV, Li et al. 2024, arXiv:2404.14469: budget 1,024 of the LongBench runs, observation window 64, kernel 5."""

from lcx.experiment import Experiment
from lcx.policies.snapkv import SnapKV
from lcx.recipe import Recipe, Segment


def get_config():
    method = SnapKV(budget=1_024, window=64, kernel=5, pooling="avg")
    return Experiment(recipe=Recipe((Segment(compress=method),)), verified=("oracle", "kvpress"))
