"""4 bits a value, asymmetric, float16 scale and minimum per token and KV head."""

from lcx.codecs.int_token import Int
from lcx.experiment import Experiment
from lcx.recipe import Recipe, Segment


def get_config():
    return Experiment(recipe=Recipe((Segment(codec=Int(bits=4)),)), verified=("oracle",))
