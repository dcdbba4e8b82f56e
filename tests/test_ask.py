"""Questions about a context that is read once: every answer is that of a fresh session, whatever was asked before."""

import numpy as np
import pytest
from bad_inputs import CONFIG
from command_line import run_command
from pretrained_support import hf_weights, write_gguf
from tiny import quick_compilation as quick_compilation

import lcx
from lcx.codecs.int_token import Int
from lcx.codecs.kivi import chain
from lcx.errors import UserError
from lcx.measure.quality import make_session
from lcx.policies.h2o import H2O
from lcx.policies.snapkv import SnapKV
from lcx.recipe import Recipe, Segment

CONTEXT = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUESTIONS = ("ABC", "XYZXYZ", "A")
TEMPLATE = "{question}"
RECIPES = {
    "dense": Recipe(),
    "snapkv": Recipe((Segment(compress=SnapKV(12, window=4)),)),
    "h2o": Recipe((Segment(policy=H2O(12)),)),
    "int4": Recipe((Segment(codec=Int(4)),)),
    "kivi": Recipe((chain(4, 8, 8),)),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_gguf(tmp_path_factory.mktemp("ask") / "tiny.gguf", "llama", CONFIG, hf_weights(CONFIG)))


@pytest.fixture(scope="module")
def model(path):
    return lcx.load(path)


def alone(model, recipe, question, count):
    """The greedy tokens of a session that reads the context and this question alone."""
    ids = model.tokenizer.text_ids(CONTEXT)
    session = make_session(model.layers, lcx.Experiment(recipe), len(ids), 30)
    session.prefill(ids)
    logits, result = session.step([model.tokenizer.encode(question)]), []
    while len(result) < count:
        result.append(int(np.asarray(model.choose(logits))[0]))
        logits = session.step([result[-1:]])
    return result


@pytest.mark.parametrize("name", RECIPES)
def test_every_answer_is_that_of_a_fresh_session(model, name):
    asked = lcx.ask(model, RECIPES[name], CONTEXT, QUESTIONS, max_tokens=5, template=TEMPLATE)
    assert [a.question for a in asked.answers] == list(QUESTIONS)
    for answer in asked.answers:
        assert 1 <= len(answer.ids) <= 5
        assert list(answer.ids) == alone(model, RECIPES[name], answer.question, len(answer.ids))
    again = lcx.ask(model, RECIPES[name], CONTEXT, QUESTIONS[::-1], max_tokens=5, template=TEMPLATE)
    assert [a.ids for a in again.answers][::-1] == [a.ids for a in asked.answers]
    assert asked.tokens == len(model.tokenizer.text_ids(CONTEXT)) and asked.read_seconds > 0
    assert asked.cache_bytes == RECIPES[name].bytes(model.config, asked.tokens, 6 + 4, dtype=model.layers.dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": []}, "questions=[]: give at least one"),
        ({"questions": ["A", " "]}, "questions=' ' is empty"),
        ({"questions": "A"}, "questions='A' is a str; allowed is a list"),
        ({"context": ""}, "context='' is empty"),
        ({"template": "Q"}, "template='Q' has no {question}"),
        ({"max_tokens": 0}, "max_tokens=0 must be an integer of at least 1"),
        ({"context": "A" * 4_000}, "beyond the context"),
        ({"method": "snapkv"}, "method='snapkv' is a str"),
    ],
)
def test_wrong_input_is_refused_in_one_line(model, change, message):
    given = {"method": Recipe(), "context": CONTEXT, "questions": ["A"], "template": TEMPLATE} | change
    with pytest.raises(UserError) as error:
        lcx.ask(model, given.pop("method"), given.pop("context"), given.pop("questions"), **given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_command_asks_every_method_beside_dense(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "t.txt").write_text(CONTEXT)
    args = (
        f"--model={path}",
        f"--context_file={tmp_path / 't.txt'}",
        "--question=ABC",
        "--question=XYZ",
        "--num_tokens=3",
        "--template={question}",
    )
    code, out, err = run_command(monkeypatch, capsys, "ask", "--config=tova,int8", "--keep_ratio=0.5", *args)
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines if ": read " in line] == [
        "configs/dense.py",
        "configs/tova.py",
        "configs/int8.py",
    ]
    assert sum(line.startswith("  ") and "->" in line for line in lines) == 6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--question=A"], "context_file and question"),
        (["--context_file=gone.txt", "--question=A"], "gone.txt"),
        (["--config=smollm2_quick"], "is a sweep"),
    ],
)
def test_the_command_refuses_in_one_line(path, tmp_path, monkeypatch, capsys, args, message):
    (tmp_path / "t.txt").write_text(CONTEXT)
    if not any("_file" in a for a in args) and "--question=A" not in args:
        args = [*args, f"--context_file={tmp_path / 't.txt'}", "--question=A"]
    code, out, err = run_command(monkeypatch, capsys, "ask", f"--model={path}", *args)
    assert code == 2 and not out and err.startswith("ask: ") and message in err and err.count("\n") == 1
