"""MInference 1.0, Jiang et al. 2024, arXiv:2407.02490: vertical-slash prefill with the authors' default of 1,000 and 6,096."""

from lcx.experiment import Experiment
from lcx.patterns.minference import MInference
from lcx.recipe import Recipe


def get_config():
    return Experiment(recipe=Recipe(pattern=MInference(vertical=1_000, slash=6_096)), verified=("oracle",))
