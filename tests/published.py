"""Sizes that the configs state, each with its source: the paper (arXiv number), the authors' code, or a choice of lcx.

A key is "axis of segment: Class.field" as `Recipe.describe` names it, "schedule.field" or "aux.field".  A config has exactly the keys that
are here, so that a field that is added needs a line and a source.
"""

from lcx.patterns.minference import MInference
from lcx.patterns.quest import Quest

COMMON = "lcx: the same budget for all methods that have one"
OWN = "lcx"

STREAMING = "2309.17453, table 1"
SNAPKV = "authors' experiments/LongBench, ablation_c1024_w32_k7_maxpool"
PYRAMID = "2406.02069, the authors' runs"
QUEST = "2406.10774, and the authors' evaluation"
MINFERENCE = "authors' code: heads that the search left out"
XATTENTION = "2503.16428"
KIVI = "2402.02750, and the defaults of the authors' code"
KVQUANT = "2401.18079, nuq4-1%"
DUO = "2410.10819, and the authors' code"
KNORM = "2406.11430, authors' README and quick evaluation"


def _kivi(bits):
    sizes = {"bits": (bits, KIVI), "group_size": (32, KIVI)}
    policies = {
        "policy of tail: Remainder.page": (128, KIVI),
        "policy of tail: Remainder.keep": (0, KIVI),
        "policy of recent: Recent.page": (128, KIVI),
        "policy of recent: Recent.keep": (128, KIVI),
    }
    places = ("policy of recent: Recent", "codec of recent: KiviKeys", "codec of pages: Kivi")
    return policies | {f"{place}.{name}": value for place in places for name, value in sizes.items()}


PUBLISHED = {
    "dense": {},
    "window": {"policy: SinkWindow.sink": (0, STREAMING), "policy: SinkWindow.window": (1_024, STREAMING)},
    "sink_window": {"policy: SinkWindow.sink": (4, STREAMING), "policy: SinkWindow.window": (1_020, STREAMING)},
    "streaming_llm": {"policy: SinkWindow.sink": (4, STREAMING), "policy: SinkWindow.window": (1_020, STREAMING)},
    "h2o": {
        "policy: H2O.budget": (1_024, COMMON),
        "policy: H2O.sums": ("prompt", "2306.14048: over all queries"),
    },
    "tova": {
        "policy: TOVA.budget": (1_024, COMMON),
        "policy: TOVA.keep_last": (False, "2401.06104: the newest token competes"),
        "policy: TOVA.per_head": (False, "2401.06104: one set for the layer"),
    },
    "keydiff": {"policy: KeyDiff.budget": (1_024, COMMON)},
    "knorm": {"compress: KNorm.budget": (1_024, COMMON), "compress: KNorm.skip_layers": ((0, 1), KNORM)},
    "snapkv": {
        "compress: SnapKV.budget": (1_024, SNAPKV),
        "compress: SnapKV.window": (32, SNAPKV),
        "compress: SnapKV.kernel": (7, SNAPKV),
        "compress: SnapKV.pooling": ("max", SNAPKV),
    },
    "pyramidkv": {
        "compress: PyramidKV.budget": (2_048, PYRAMID),
        "compress: PyramidKV.window": (32, PYRAMID),
        "compress: PyramidKV.kernel": (5, PYRAMID),
        "compress: PyramidKV.pooling": ("avg", PYRAMID),
        "compress: PyramidKV.beta": (20, PYRAMID),
        "compress: PyramidKV.rule": ("authors", PYRAMID),
        "compress: PyramidKV.layer": (0, "filled in by layer"),
        "compress: PyramidKV.num_layers": (1, "filled in by layer"),
    },
    "quest": {
        "pattern: Quest.budget": (1_024, COMMON),
        "pattern: Quest.page": (16, QUEST),
        "pattern: Quest.dense_layers": (2, QUEST),
        "pattern: Quest.group_reduce": (None, QUEST),
        "pattern: Quest.force_last": (True, "the authors' kernels; the paper leaves it open"),
    },
    "minference": {
        "pattern: MInference.vertical": (1_000, MINFERENCE),
        "pattern: MInference.slash": (6_096, MINFERENCE),
    },
    "xattention": {
        "pattern: XAttention.tau": (0.9, XATTENTION),
        "pattern: XAttention.stride": (8, XATTENTION),
        "pattern: XAttention.block": (128, XATTENTION),
        "schedule.size": (4_096, OWN),
    },
    "int8": {"codec: Int.bits": (8, OWN), "codec: Int.group_size": (None, OWN)},
    "int4": {"codec: Int.bits": (4, OWN), "codec: Int.group_size": (None, OWN)},
    "int4_pages": {
        "policy of tail: Flush.page": (64, OWN),
        "policy of tail: Flush.keep": (64, OWN),
        "codec of pages: Paged.kind": ("int4", OWN),
        "codec of pages: Paged.by": ("channel", OWN),
    },
    "kivi2": _kivi(2),
    "kivi4": _kivi(4),
    "kvquant": {
        "policy of first: First.count": (1, KVQUANT),
        "codec of codes: KVQuant.bits": (4, KVQUANT),
        "codec of codes: KVQuant.outliers": (0.01, KVQUANT),
        "codec of codes: KVQuant.spare": (3, OWN),
        "aux.q_norm": ((2,), KVQUANT),
        "aux.file": (None, OWN),
    },
    "duo_int4": {
        "policy of streaming: SinkWindow.sink": (64, DUO),
        "policy of streaming: SinkWindow.window": (256, DUO),
        "codec of retrieval: Int.bits": (4, "2410.10819: a cache of 4 bits"),
        "codec of retrieval: Int.group_size": (None, OWN),
        "codec of streaming: Int.bits": (4, "2410.10819: a cache of 4 bits"),
        "codec of streaming: Int.group_size": (None, OWN),
        "aux.streaming": (0.5, "2410.10819: half of the heads with GQA"),
        "aux.file": (None, OWN),
        "schedule.size": (512, OWN),
    },
    "plans/llama7b_kivi2": _kivi(2) | {"schedule.size": (2_048, OWN)},
    "plans/llama7b_int2": {
        "codec: Int.bits": (2, "2401.18079, the 2 bits of its claim"),
        "codec: Int.group_size": (None, OWN),
        "schedule.size": (2_048, OWN),
    },
    "plans/duo_w8_kv4": {
        "policy of streaming: SinkWindow.sink": (64, DUO),
        "policy of streaming: SinkWindow.window": (256, DUO),
        "codec of retrieval: Int.bits": (4, "2410.10819: a cache of 4 bits"),
        "codec of retrieval: Int.group_size": (None, OWN),
        "codec of streaming: Int.bits": (4, "2410.10819: a cache of 4 bits"),
        "codec of streaming: Int.group_size": (None, OWN),
        "aux.streaming": (0.5, "2410.10819: half of the heads with GQA"),
        "aux.file": (None, OWN),
        "schedule.size": (32_000, "2410.10819, the claim of the longest context"),
    },
}

# two methods as one: each at its own sizes
PUBLISHED |= {
    "snapkv_h2o": PUBLISHED["snapkv"] | PUBLISHED["h2o"] | {"policy: H2O.sums": ("votes", "a composition")},
    "minference_quest": {
        "pattern: ByPhase.prefill": (MInference(vertical=1_000, slash=6_096), MINFERENCE),
        "pattern: ByPhase.decode": (Quest(budget=1_024, page=16, dense_layers=2), QUEST),
    },
}
