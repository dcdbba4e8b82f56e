"""KVQuant, Hooper et al. 2024, arXiv:2401.18079: 1M tokens of LLaMA-7B on one A100-80GB, 10M on eight, with 2 bits.

lcx has no KVQuant yet.  This is 2 bits per token with a float16 scale and minimum: 2.25 bits a value where the paper's estimate has 2.0.
"""

from lcx.codecs.int_token import Int
from lcx.experiment import Experiment
from lcx.recipe import Recipe, Segment
from lcx.schedules.chunked import Chunked

PAPER = {"longest context, tokens, a100-80gb": 1e6, "longest context, tokens, 8xa100-80gb": 1e7}


def get_config():
    recipe = Recipe((Segment(codec=Int(bits=2)),))
    return Experiment(recipe=recipe, schedule=Chunked(2_048), model="llama-7b", paper=PAPER)
