"""4 bits in pages of 64 tokens, laid out for the decode kernel: keys per channel, values per token, the newest 64 tokens exact."""

from lcx.codecs.paged import chain
from lcx.experiment import Experiment
from lcx.recipe import Recipe


def get_config():
    return Experiment(recipe=Recipe((chain("int4", by="channel", residual=64),)), verified=("oracle",))
