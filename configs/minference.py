"""MInference 1.0, Jiang et al. 2024, arXiv:2407.02490: vertical-slash prefill with the authors' default of 1,000 and 6,096.

A prompt of up to 6,096 tokens is read densely, and a sweep's row says that nothing happened.  The sizes stay the authors', since smaller
ones would be no published method; to see it act on short prompts: --config.recipe.pattern.vertical=30 --config.recipe.pattern.slash=50.
"""

from lcx.experiment import Experiment
from lcx.patterns.minference import MInference
from lcx.recipe import Recipe


def get_config():
    return Experiment(recipe=Recipe(pattern=MInference(vertical=1_000, slash=6_096)), verified=("oracle",))
