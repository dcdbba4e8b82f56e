"""DuoAttention, Xiao et al. 2024, arXiv:2410.10819: 3.3M tokens of Llama-3-8B on one A100-80GB, half of the KV heads streaming.

8-bit weights and a 4-bit KV cache; 64 sinks and 256 recent tokens, prefill in chunks of 32,000.  Plan it with --weight_bits=8.
"""

from lcx.artefacts.head_split import HeadSplit
from lcx.codecs.int_token import Int
from lcx.experiment import Experiment
from lcx.policies.duo import duo
from lcx.recipe import Recipe
from lcx.schedules.chunked import Chunked

PAPER = {"longest context, tokens, a100-80gb": 3_300_000.0}


def get_config():
    recipe = Recipe(duo(sink=64, window=256, codec=Int(bits=4)))
    aux = HeadSplit(streaming=0.5)
    return Experiment(recipe=recipe, aux=aux, schedule=Chunked(32_000), model="llama3-8b", paper=PAPER)
