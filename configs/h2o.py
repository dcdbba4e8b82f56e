"""H2O, Zhang et al. 2023, arXiv:2306.14048: heavy hitters and recent tokens, half of the budget each."""

from lcx.experiment import Experiment
from lcx.policies.h2o import H2O
from lcx.recipe import Recipe, Segment


def get_config():
    return Experiment(recipe=Recipe((Segment(policy=H2O(budget=1_024)),)), verified=("oracle",))
