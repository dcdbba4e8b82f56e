"""The first table: five recipes on SmolLM2-135M within minutes on a laptop, two texts, budgets of a quarter of the prompt."""

from lcx.experiment import Sweep

NAMES = ("dense", "snapkv", "h2o", "quest", "int4")


def get_config():
    configs = tuple(f"configs/{name}.py" for name in NAMES)
    return Sweep(configs, lengths=(384, 768), continuation=64, keep_ratio=0.25)
