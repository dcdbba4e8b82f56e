"""KVQuant, Hooper et al. 2024, arXiv:2401.18079: nuq4-1%, the first token exact, and three spare places a token at each end for keys.

1% is the share on the texts of the calibration (a novel, a ledger, code).  Of SmolLM2's keys on other texts 1.1% take a place, 0.6% without
the spare ones; exactly the places of 1%:
--config.recipe.segments.0.1.codec.spare=0.  3 or 2 bits: --config.recipe.segments.0.1.codec.bits=3.
"""

from lcx.artefacts.kvquant import KVQuantTables
from lcx.codecs.kvquant import chain
from lcx.experiment import Experiment
from lcx.recipe import Recipe

# WikiText-2, Llama-3-8B, 8K of context, all tokens quantised ("write"); the cache of LLaMA-7B at 128K
PAPER = {
    "perplexity, float16": 5.54,
    "perplexity, nuq4-1%": 5.56,
    "perplexity, nuq3-1%": 5.64,
    "perplexity, nuq2-1%": 6.04,
    "GB at 128K, float16": 64.0,
    "GB at 128K, nuq4-1%": 17.3,
}


def get_config():
    recipe = Recipe((chain(bits=4, outliers=0.01, spare=3, first=1),))
    return Experiment(recipe=recipe, aux=KVQuantTables(), paper=PAPER, verified=("oracle",))
