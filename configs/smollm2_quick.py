"""The first table: eight recipes on SmolLM2-135M within minutes on a laptop, two texts, budgets of a quarter of the prompt."""

from lcx.experiment import Sweep

NAMES = ("dense", "sink_window", "snapkv", "h2o", "quest", "int4", "kivi2", "duo_int4")


def get_config():
    configs = tuple(f"configs/{name}.py" for name in NAMES)
    return Sweep(configs, lengths=(512, 1_024), continuation=128, keep_ratio=0.25)
