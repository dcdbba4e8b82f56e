"""Where a text begins and ends is one rule in every command, row and task: bos in front, stop tokens behind, padding never."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import run_command
from test_tokenizer import fields

from experiments import cli
from lcx import generate, texts
from lcx.artefacts import head_mass
from lcx.experiment import Experiment
from lcx.measure import task_scores
from lcx.model_config import ModelConfig
from lcx.models.decoder import Layers, Model, random_weights
from lcx.models.loading import Pretrained
from lcx.pretrained import Tokenizer
from lcx.recipe import Recipe
from lcx.session import Session
from lcx.sweep.bench import Bench
from lcx.sweep.points import Point
from lcx.sweep.settings import Settings
from lcx.sweep.task_rows import _ids
from lcx.tasks import Sample

CONFIG = ModelConfig("tiny", 1, 32, 4, 2, 8, 48, 261, 4_096)
BOS = 257


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
    """Nothing here is timed."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def pretrained(padding=0, **keys):
    """A random model over bytes; the last `padding` ids of its vocabulary stand for no text, and 3 rows of its embedding lie beyond it."""
    tokens = [*fields()["tokenizer.ggml.tokens"], *(f"[PAD{258 + i}]" for i in range(padding))]
    kinds = np.array([1] * 257 + [3] + [5] * padding)
    tokenizer = Tokenizer.from_gguf(fields(tokens=tokens, token_type=kinds, **keys), "tiny")
    config = replace(CONFIG, vocab_size=len(tokens) + 3)
    return Pretrained(Layers.of(Model(config, random_weights(config, seed=3))), tokenizer, "tiny", "0" * 64, "none")


@pytest.fixture(params=[True, False], ids=["bos", "no bos"])
def model(request):
    return pretrained(add_bos_token=request.param)


def point(**settings):
    return Point(
        "dense",
        Experiment(Recipe()),
        "tiny",
        "0" * 64,
        64,
        Settings(continuation=16, decode_steps=2, **settings),
        batch=3,
    )


def test_every_reader_of_a_text_puts_the_same_in_front(model):
    want = model.tokenizer.text_ids(texts.read("pride_and_prejudice"))
    assert (want[0] == BOS) == model.tokenizer.add_bos
    passages = Bench(model).passages(point())
    assert passages.shape == (2, 3, point().text_tokens)
    passages = passages.reshape(6, -1)
    np.testing.assert_array_equal(passages[0], want[: point().text_tokens])
    front = len(model.tokenizer.front)
    assert (passages[:, :front] == BOS).all() and not (passages[:, front:] == BOS).any()
    np.testing.assert_array_equal(_ids(model, point(), 50), want[:50])
    assert task_scores.encoder(model)("It is") == model.tokenizer.text_ids("It is")


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_passages_of_every_seed_begin_with_bos(seed):
    passages = Bench(pretrained(add_bos_token=True)).passages(replace(point(), seed=seed)).reshape(6, -1)
    assert (passages[:, 0] == BOS).all() and not (passages[:, 1:] == BOS).any()


def test_calibration_reads_bos(model, monkeypatch):
    seen = []
    far_mass = lambda layers, ids, *_, first: seen.append((ids, first)) or np.zeros((1, 2))
    monkeypatch.setattr(head_mass, "far_mass", far_mass)
    ids, front = model.tokenizer.encode(texts.read("pride_and_prejudice")), model.tokenizer.front
    head_mass.calibrate(model, "pride_and_prejudice", 100, 4, 16, copies=1)
    head_mass.calibrate(model, "pride_and_prejudice", 100, 4, 16, start=50, copies=3)
    passage = ids[50 : 150 - len(front)]
    # the second copy begins at position 100
    assert seen == [([*front, *ids][:100], None), ([*front, *passage, *passage, *passage], 100)]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_score_reads_bos_and_no_byte_order_mark(model, monkeypatch, capsys, tmp_path, mark):
    (tmp_path / "t.txt").write_bytes(mark + b"It is a truth\r\nuniversally")
    out = str(tmp_path / "o.npz")
    monkeypatch.setattr(cli, "load", lambda found: model)
    args = ("--config=configs/dense.py", f"--text_file={tmp_path / 't.txt'}", "--num_tokens=20", f"--out={out}")
    code, line, err = run_command(monkeypatch, capsys, "score", *args)
    assert code == 0, err
    want = model.tokenizer.text_ids("It is a truth\nuniversally")[:20]
    np.testing.assert_array_equal(np.load(out)["ids"], want)
    assert json.loads(line)["tokens"] == 19


class Fixed(Session):
    """A session that gives these tokens the largest logits, one a step; it has no model."""

    def __init__(self, *tokens, vocab=261):
        self.batch, self.prompt, self.new_tokens, self.order = 1, 1, len(tokens), "attend"
        self.config = SimpleNamespace(vocab_size=vocab)
        self.rows = [np.eye(vocab)[token][None] for token in tokens]

    def prefill(self, prompt):
        return jnp.asarray(self.rows[0])

    def step(self, tokens):
        self.rows.pop(0)
        return jnp.asarray(self.rows[0])


@pytest.mark.parametrize(
    ("keys", "end"),
    [
        ({"eos_token_id": 257}, 5),
        ({"eos_token_id": 257, "eot_token_id": 66}, 3),
        ({"eos_token_id": 66, "eot_token_id": 257}, 3),
        ({"eos_token_id": 257, "eom_token_id": 65}, 2),
        ({"eos_token_id": None}, 6),
    ],
)
def test_any_stop_token_ends_a_text(keys, end):
    model, tokens = pretrained(**keys), [64, 65, 66, 67, 257, 68]
    assert list(generate(Fixed(*tokens), [1], 6, stop=model.stop_ids, choose=model.choose)) == tokens[:end]
    answer = task_scores._Answer(model, 6, False)
    for token in tokens:
        answer.add(token)
    assert answer.ids == tokens[:end]


@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize("beyond", [1, 3])
def test_padding_is_never_chosen(padding, beyond):
    model = pretrained(padding)
    vocab = model.config.vocab_size
    logits = np.full((2, vocab), -5.0, np.float32)
    logits[:, 40], logits[:, vocab - beyond] = 1.0, 9.0
    logits[1, 258 : 258 + padding] = 20.0
    np.testing.assert_array_equal(model.choose(jnp.asarray(logits)), [40, 40])


def test_a_generated_text_has_no_padding():
    model = pretrained(5)
    # the padding's rows are those that any hidden state likes best
    embed = np.array(model.layers.embed)
    embed[258:] = 40 * embed[:1] * np.array([1, -1] * 4)[:, None]
    layers = replace(model.layers, embed=jnp.asarray(embed), head=jnp.asarray(embed))
    model = replace(model, layers=layers)
    ids = model.tokenizer.text_ids("It is a truth")
    plain = list(generate(Session(layers, Recipe(), len(ids), 20), ids, 20))
    chosen = list(generate(Session(layers, Recipe(), len(ids), 20), ids, 20, choose=model.choose))
    assert max(plain) >= 258 > max(chosen)
    assert isinstance(model.tokenizer.decode(chosen), str)
    sample = Sample("t", "It is a truth", ("x",), 20, "all", 40, 13)
    (result,) = task_scores.run_samples(model, Experiment(Recipe()), [sample])
    assert max(result.ids) < 258
