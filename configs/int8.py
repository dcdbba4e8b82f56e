"""8 bits a value, symmetric, one float16 scale per token and KV head: the cache of serving systems."""

from lcx.codecs.int_token import Int
from lcx.experiment import Experiment
from lcx.recipe import Recipe, Segment


def get_config():
    return Experiment(recipe=Recipe((Segment(codec=Int(bits=8)),)), verified=("oracle",))
