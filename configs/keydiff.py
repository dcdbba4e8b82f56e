"""KeyDiff, Park et al. 2025, arXiv:2504.15364: keys unlike the mean direction stay, no attention is asked."""

from lcx.experiment import Experiment
from lcx.policies.keydiff import KeyDiff
from lcx.recipe import Recipe, Segment

# RULER at 4,096 tokens, half removed, query-agnostic, as the Expected Attention paper (arXiv:2510.00636) measured it
PAPER = {"RULER 4K, half removed, Qwen3-8B": 78.6, "RULER 4K, half removed, Llama-3.1-8B": 85.5}


def get_config():
    return Experiment(recipe=Recipe((Segment(policy=KeyDiff(budget=1_024)),)), paper=PAPER)
