"""KIVI with 4 bits, Liu et al. 2024, arXiv:2402.02750: groups of 32, residual 128."""

from lcx.codecs.kivi import chain
from lcx.experiment import Experiment
from lcx.recipe import Recipe


def get_config():
    return Experiment(recipe=Recipe((chain(bits=4, group_size=32, residual=128),)), verified=("oracle",))
