"""Only the most recent tokens, no sinks: the baseline that StreamingLLM (arXiv:2309.17453, figure 1b) shows to break."""

from lcx.experiment import Experiment
from lcx.policies.sink_window import SinkWindow
from lcx.recipe import Recipe, Segment


def get_config():
    return Experiment(recipe=Recipe((Segment(policy=SinkWindow(sink=0, window=1_024)),)), verified=("oracle",))
