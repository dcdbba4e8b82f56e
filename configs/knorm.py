"""Key norm, Devoto et al. 2024, arXiv:2406.11430: the tokens with the smallest keys stay, in all layers but the first two."""

from lcx.experiment import Experiment
from lcx.policies.knorm import KNorm
from lcx.recipe import Recipe, Segment


def get_config():
    return Experiment(
        recipe=Recipe((Segment(compress=KNorm(budget=1_024, skip_layers=(0, 1))),)),
        verified=("oracle", "kvpress (`skip_layers=()`)"),
    )
