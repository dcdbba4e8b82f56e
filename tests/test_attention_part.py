"""lcx/measure/attention_part.py and its command: density, the search for tau, and what is refused, on a small random model."""

from dataclasses import replace

import numpy as np
import pytest
from bad_inputs import CONFIG
from command_line import run_command
from pretrained_support import hf_weights, write_gguf
from tiny import layers, text
from tiny import quick_compilation as quick_compilation

from lcx import texts
from lcx.axes import CAUSAL
from lcx.errors import UserError
from lcx.measure.attention_part import Prompt, compare, tau_of
from lcx.patterns.xattention import XAttention

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabc"
LENGTH, STEP, BLOCK = 96, 32, 8
PATTERN = XAttention(tau=0.5, stride=2, block=BLOCK)


@pytest.fixture(scope="module")
def prompt():
    return Prompt(layers(), text(LENGTH), 1, STEP)


def test_a_pattern_at_its_exact_limit_reads_every_causal_block(prompt):
    assert prompt.density(replace(PATTERN, tau=1.0), BLOCK) == 1.0


def test_the_least_share_reads_the_first_and_the_own_block(prompt):
    rows = LENGTH // BLOCK
    # block 0 and the own one: one for the first row of blocks, two for the others
    assert prompt.density(replace(PATTERN, tau=1e-6), BLOCK) == pytest.approx((2 * rows - 1) / (rows * (rows + 1) / 2))


def test_tau_is_found_by_its_density(prompt):
    pattern, density = tau_of(prompt, PATTERN, 0.5, 0.7)
    assert 0.5 <= density <= 0.7 and density == prompt.density(pattern, BLOCK)
    with pytest.raises(UserError, match="none of 12"):
        tau_of(prompt, PATTERN, 0.01, 0.02)


def test_both_are_timed_in_turns(prompt):
    part = compare(prompt, PATTERN, 0.5, 2)
    assert {name: len(seconds) for name, seconds in part.seconds.items()} == {"dense": 2, "method": 2}
    assert part.ratio == np.median(part.seconds["method"]) / np.median(part.seconds["dense"])
    assert prompt.density(CAUSAL, BLOCK) == 1.0


def test_a_layer_or_a_length_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="layer=3: allowed are 0 to 2"):
        Prompt(layers(), text(LENGTH), 3, STEP)
    with pytest.raises(UserError, match="length=90 is not a multiple of chunk_size=32"):
        Prompt(layers(), text(90), 1, STEP)


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "read", lambda name: LETTERS * 40)
    return str(write_gguf(tmp_path / "tiny.gguf", "llama", CONFIG, hf_weights(CONFIG)))


def test_the_command_prints_a_line_a_layer(model, monkeypatch, capsys):
    args = [f"--model={model}", "--config=configs/xattention.py", "--length=1024", "--chunk_size=512", "--repeats=1"]
    args += ["--layers=0,1", "--density=0.3,1", "--config.recipe.pattern.stride=16", "--allow_extrapolation"]
    code, out, err = run_command(monkeypatch, capsys, "attention_time", *args)
    assert code == 0, err
    for layer, line in enumerate(out.strip().splitlines()):
        assert (
            line.startswith(f"layer {layer}: 1,024 tokens in steps of 512, tau ")
            and " of the causal blocks; dense " in line
        )
        assert float(line.rpartition("ratio ")[2]) > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=configs/snapkv.py"], "allowed is a config whose pattern lists blocks by a share tau"),
        (["--config=configs/xattention.py", "--density=0.1"], "density='0.1': allowed are two shares"),
        (["--config=configs/xattention.py", "--length=99999"], "length=99999: text 'pride_and_prejudice' has"),
        (["--config=configs/xattention.py", "--layers=-1"], "layers"),
    ],
)
def test_the_command_refuses_in_one_line(model, monkeypatch, capsys, args, message):
    code, out, err = run_command(monkeypatch, capsys, "attention_time", f"--model={model}", *args)
    assert code == 2 and not out
    (line,) = err.strip().splitlines()
    assert line.startswith("attention_time: ") and message in line
