"""DuoAttention, Xiao et al. 2024, arXiv:2410.10819: half of the KV heads keep 64 sinks + 256 recent tokens, all in 4 bits."""

from lcx.artefacts.head_split import HeadSplit
from lcx.codecs.int_token import Int
from lcx.experiment import Experiment
from lcx.policies.duo import duo
from lcx.recipe import Recipe
from lcx.schedules.chunked import Chunked

PAPER = {"memory saving, GQA, at most": 1.67, "decode speed-up, GQA, at most": 1.50}


def get_config():
    recipe = Recipe(duo(sink=64, window=256, codec=Int(bits=4)))
    return Experiment(
        recipe=recipe, aux=HeadSplit(streaming=0.5), schedule=Chunked(512), paper=PAPER, verified=("oracle",)
    )
