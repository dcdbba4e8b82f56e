"""Quest, Tang et al. 2024, arXiv:2406.10774: pages of 16, two dense layers, 1,024 tokens read at decode; all stay in memory."""

from lcx.experiment import Experiment
from lcx.patterns.quest import Quest
from lcx.recipe import Recipe


def get_config():
    return Experiment(recipe=Recipe(pattern=Quest(budget=1_024, page=16, dense_layers=2)), verified=("oracle",))
