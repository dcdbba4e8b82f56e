"""KIVI with 2 bits, Liu et al. 2024, arXiv:2402.02750: groups of 32, residual 128."""

from lcx.codecs.kivi import chain
from lcx.experiment import Experiment
from lcx.recipe import Recipe

PAPER = {"peak memory saving, Llama-2-7B, weights included": 2.6, "batch size, at most": 4.0}


def get_config():
    return Experiment(recipe=Recipe((chain(bits=2, group_size=32, residual=128),)), paper=PAPER, verified=("oracle",))
