"""Tasks from files of one's own, and prompts whose question comes after compression."""

import json

import numpy as np
import pytest
from test_tokenizer import fields
from tiny import quick_compilation as quick_compilation

from lcx import tasks
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.greedy import generate
from lcx.measure import task_scores
from lcx.measure.quality import make_session
from lcx.model_config import ModelConfig
from lcx.models.decoder import Layers, Model, random_weights
from lcx.models.loading import Pretrained
from lcx.policies.h2o import H2O
from lcx.policies.snapkv import SnapKV
from lcx.pretrained import Tokenizer
from lcx.recipe import Recipe, Segment
from lcx.report.scores import flat
from lcx.schedules.chunked import Chunked
from lcx.sweep.settings import Settings

GOOD = {"context": "The sky is blue.", "question": "What colour is the sky?", "answers": ["blue"]}


@pytest.fixture(scope="module")
def tiny():
    """A random model over bytes."""
    config = ModelConfig("tiny", 2, 32, 4, 2, 8, 48, 258, 400)
    layers = Layers.of(Model(config, random_weights(config, seed=3)))
    return Pretrained(layers, Tokenizer.from_gguf(fields(), "tiny"), "tiny", "", "")


def written(tmp_path, *lines):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_lines_become_records(tmp_path):
    path = written(tmp_path, GOOD, "", {**GOOD, "answers": "blue", "task": "sky", "match": "f1", "answer_tokens": 7})
    first, second = tasks.load(path)
    assert (first.task, first.match, first.answers, first.answer_tokens) == ("mine", "any", ("blue",), 32)
    assert (second.task, second.match, second.answers, second.answer_tokens) == ("sky", "f1", ("blue",), 7)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": "a', "line 2 is not JSON"),
        ("[1]", "line 2 is a list"),
        ({"context": "a", "question": "b"}, "line 2 has no 'answers'"),
        ({**GOOD, "answer": "x"}, "line 2 has 'answer'; allowed are context, question, answers"),
        ({**GOOD, "context": " "}, "line 2: context must be a text"),
        ({**GOOD, "question": 3}, "line 2: question must be a text"),
        ({**GOOD, "answers": []}, "line 2: answers must be texts"),
        ({**GOOD, "answers": ["a", 1]}, "line 2: answers must be texts"),
        ({**GOOD, "match": "bleu"}, "line 2: match='bleu'; allowed are any, all, f1, rouge_l"),
        ({**GOOD, "answer_tokens": 0}, "line 2: answer_tokens=0"),
        ({**GOOD, "answer_tokens": True}, "line 2: answer_tokens=True"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    with pytest.raises(UserError) as caught:
        tasks.load(written(tmp_path, GOOD, line, GOOD))
    assert message in str(caught.value) and "mine.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_without_lines_or_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="has no line"):
        tasks.load(written(tmp_path, ""))
    with pytest.raises(UserError, match="No such file"):
        tasks.load(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        tasks.load(tmp_path / "bytes.jsonl")
    with pytest.raises(UserError, match="files that end in .jsonl"):
        Settings(tasks=("mine.json",))


# worked by hand: SQuAD's words without articles and punctuation; the longest common subsequence of words
@pytest.mark.parametrize(
    ("match", "output", "references", "score"),
    [
        ("f1", "The blue sky.", ("blue sky",), 100.0),
        ("f1", "blue", ("a blue sky",), 200 / 3),
        ("f1", "sky sky sky", ("sky is blue",), 100 / 3),
        ("f1", "green", ("blue", "Green!"), 100.0),
        ("f1", "", ("blue",), 0.0),
        ("rouge_l", "the cat sat on the mat", ("the cat lay on a mat",), 100 * 2 * 4 / 12),
        ("rouge_l", "mat the on sat cat the", ("the cat sat on the mat",), 100 * 2 * 3 / 12),
        ("rouge_l", "c a b", ("a b c",), 100 * 2 * 2 / 6),
        ("rouge_l", "!", ("a",), 0.0),
    ],
)
def test_scores_by_words(match, output, references, score):
    sample = tasks.Sample("t", "p", references, 9, match, 10, 1)
    assert tasks.score(sample, output) == pytest.approx(score)


def test_a_context_that_is_too_long_loses_its_middle(tmp_path):
    long = {**GOOD, "context": "A" * 100 + "B" * 300 + "C" * 100, "answer_tokens": 8}
    records = tasks.load(written(tmp_path, GOOD, long))
    samples, cut = tasks.local_samples(records, len, 200)
    assert cut == 1 and samples[0].prompt.startswith(GOOD["context"] + "\n\nQuestion: What colour is the sky?\nAnswer:")
    (_, sample) = samples
    assert sample.prompt_tokens == len(sample.prompt) == 192 and sample.prompt_tokens + 8 == sample.budget
    context = sample.prompt[: sample.question_at]
    head, tail = context.split("\n...\n")
    assert set(head) <= set("AB") and set(tail) <= set("BC") and abs(len(head) - len(tail)) <= 1
    assert sample.prompt[sample.question_at :] == "\n\nQuestion: What colour is the sky?\nAnswer:"
    with pytest.raises(UserError, match="a question and its answer take"):
        tasks.local_samples(records, len, 60)


@pytest.mark.parametrize("task", tasks.RULER)
def test_every_task_says_where_its_question_begins(task):
    (sample,) = tasks.generate(task, lambda text: len(text.split()), 600, 1)
    context, question = sample.prompt[: sample.question_at], sample.prompt[sample.question_at :]
    assert question.count("?") == 1 and len(question) < 0.5 * len(context)
    # nothing of the question's sentence stays in the context
    assert context[-1].isspace() and question[0].isupper()


METHODS = {
    "dense": Experiment(Recipe()),
    "snapkv": Experiment(Recipe((Segment(compress=SnapKV(budget=24, window=8)),))),
    "h2o": Experiment(Recipe((Segment(policy=H2O(budget=24)),)), schedule=Chunked(16)),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_an_unseen_question_follows_the_compressed_context(tiny, method, batch):
    records = [
        tasks.Record("some words and more of them " * n, f"which {'x' * 5 * n}", ("x",), "t", answer_tokens=6)
        for n in (2, 3)
    ]
    samples, _ = tasks.local_samples(records, task_scores.encoder(tiny), 180)
    results = task_scores.run_samples(tiny, METHODS[method], samples, batch=batch, question="unseen")
    for sample, result in zip(samples, results, strict=True):
        context = tiny.tokenizer.text_ids(sample.prompt[: sample.question_at])
        question = tiny.tokenizer.encode(sample.prompt[sample.question_at :])
        session = make_session(tiny.layers, METHODS[method], 174, 100)
        session.prefill([context])
        want, logits = [], session.step([question])
        while len(want) < 6 and (not want or want[-1] not in tiny.tokenizer.stop_ids):
            want.append(int(np.argmax(logits[0])))
            logits = session.step([want[-1:]])
        assert list(result.ids) == want


def test_a_seen_question_is_part_of_the_prompt(tiny):
    samples, _ = tasks.local_samples(
        [tasks.Record("a b c d " * 8, "what", ("x",), "t", answer_tokens=5)], task_scores.encoder(tiny), 120
    )
    (result,) = task_scores.run_samples(tiny, METHODS["snapkv"], samples)
    session = make_session(tiny.layers, METHODS["snapkv"], 115, 5)
    want = list(generate(session, tiny.tokenizer.text_ids(samples[0].prompt), 5, stop=tiny.tokenizer.stop_ids))
    assert list(result.ids) == want


def test_a_keep_ratio_is_of_the_prompt_that_is_read(tiny, monkeypatch):
    kept = []
    make = task_scores.make_session

    def watched(layers, experiment, *args):
        kept.append(experiment.recipe.budget)
        return make(layers, experiment, *args)

    monkeypatch.setattr(task_scores, "make_session", watched)
    samples, _ = tasks.local_samples(
        [tasks.Record("word " * n, "what", ("x",), "t", answer_tokens=3) for n in (12, 25)],
        task_scores.encoder(tiny),
        200,
    )
    task_scores.run_samples(tiny, METHODS["h2o"], samples, batch=2, keep_ratio=0.5)
    assert kept == [int(0.5 * sample.prompt_tokens) for sample in samples]
    kept.clear()
    task_scores.run_samples(tiny, METHODS["h2o"], samples, keep_ratio=0.5, question="unseen")
    assert kept == [int(0.5 * len(tiny.tokenizer.text_ids(s.prompt[: s.question_at]))) for s in samples]
    kept.clear()
    task_scores.run_samples(tiny, METHODS["dense"], samples, keep_ratio=0.5)
    assert kept == [None, None]


def test_unseen_needs_a_place(tiny):
    sample = tasks.Sample("t", "a prompt", ("x",), 3, "any", 60, 8)
    with pytest.raises(UserError, match="where their question begins"):
        task_scores.run_samples(tiny, METHODS["dense"], [sample], question="unseen")
    with pytest.raises(UserError, match="question='asked'"):
        task_scores.run_samples(tiny, METHODS["dense"], [sample], question="asked")


def test_counts_are_no_scores():
    assert flat({"mine": {"samples": 20, "cut": 3, "mean": 50.0, "t": 25.0}}) == {"mine mean": 50.0, "mine t": 25.0}
