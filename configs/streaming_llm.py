"""StreamingLLM, Xiao et al. 2023, arXiv:2309.17453: 4 sinks + 1,020 recent tokens, positions counted within the cache."""

from lcx.experiment import Experiment
from lcx.patterns.streaming import CachePositions
from lcx.policies.sink_window import SinkWindow
from lcx.recipe import Recipe, Segment


def get_config():
    return Experiment(
        recipe=Recipe((Segment(policy=SinkWindow(sink=4, window=1_020)),), pattern=CachePositions()),
        verified=("oracle",),
    )
