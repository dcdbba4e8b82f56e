"""TOVA, Oren et al. 2024, arXiv:2401.06104: the tokens that the last query attends to stay, one set per layer."""

from lcx.experiment import Experiment
from lcx.policies.tova import TOVA
from lcx.recipe import Recipe, Segment


def get_config():
    return Experiment(
        recipe=Recipe((Segment(policy=TOVA(budget=1_024)),)), verified=("oracle", "kvpress (`keep_last=True`)")
    )
