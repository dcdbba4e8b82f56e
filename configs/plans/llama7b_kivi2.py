"""KIVI's 2 bits, arXiv:2402.02750, where KVQuant, arXiv:2401.18079, claims 1M tokens of LLaMA-7B on one A100-80GB.

Groups of 32 make 3.0 bits a value: a float16 scale and minimum for 32 codes of 2 bits.
"""

from lcx.codecs.kivi import chain
from lcx.experiment import Experiment
from lcx.recipe import Recipe
from lcx.schedules.chunked import Chunked

PAPER = {"longest context, tokens, a100-80gb": 1e6, "longest context, tokens, 8xa100-80gb": 1e7}


def get_config():
    recipe = Recipe((chain(bits=2, group_size=32, residual=128),))
    return Experiment(recipe=recipe, schedule=Chunked(2_048), model="llama-7b", paper=PAPER)
