"""SnapKV (arXiv:2404.14469) at the end of the prompt, H2O (arXiv:2306.14048) in decode, its sums begun at SnapKV's votes: a composition."""

from lcx.experiment import Experiment
from lcx.policies.h2o import H2O
from lcx.policies.snapkv import SnapKV
from lcx.recipe import Recipe, Segment


def get_config():
    prompt = SnapKV(budget=1_024, window=32, kernel=7, pooling="max")
    return Experiment(
        recipe=Recipe((Segment(compress=prompt, policy=H2O(budget=1_024, sums="votes")),)), verified=("oracle",)
    )
