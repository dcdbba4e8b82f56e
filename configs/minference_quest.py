"""MInference (arXiv:2407.02490) while the prompt is read, Quest (arXiv:2406.10774) in decode, both at their papers' settings.

A prompt of up to 6,096 tokens is read densely, as under configs/minference.py.
"""

from lcx.experiment import Experiment
from lcx.patterns.by_phase import ByPhase
from lcx.patterns.minference import MInference
from lcx.patterns.quest import Quest
from lcx.recipe import Recipe


def get_config():
    pattern = ByPhase(MInference(vertical=1_000, slash=6_096), Quest(budget=1_024, page=16, dense_layers=2))
    return Experiment(recipe=Recipe(pattern=pattern), verified=("oracle (each phase)",))
