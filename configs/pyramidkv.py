"""PyramidKV, Cai et al. 2024, arXiv:2406.02069: SnapKV's votes, budget 2,048 on average, falling from the first layer to the last."""

from lcx.experiment import Experiment
from lcx.policies.pyramidkv import PyramidKV
from lcx.recipe import Recipe, Segment

# LongBench average, Mistral-7B-Instruct-v0.2, as the Ada-KV paper (arXiv:2407.11550) measured it
PAPER = {"LongBench, budget 128": 34.69, "LongBench, budget 1,024": 41.01}


def get_config():
    method = PyramidKV(budget=2_048, window=32, kernel=5, pooling="avg", beta=20)
    # layers whose budgets differ by less share a program, at the price of at most 31 empty slots a layer
    return Experiment(recipe=Recipe((Segment(compress=method),), rounding=32), paper=PAPER)
