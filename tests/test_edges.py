"""The edges of every public entry: wrong input is refused in one line before anything runs, right input gives the right answer.

The wrong calls are the table of tests/bad_inputs.py.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from bad_inputs import BAD, CONFIG, DENSE, H2O6, IDS, NEW, PROMPT, SNAP, VOCAB
from command_line import run_command
from pretrained_support import hf_weights, write_gguf
from tiny import quick_compilation  # noqa: F401, a fixture

import lcx
from lcx import texts
from lcx.errors import NotFinite, UserError
from lcx.greedy import generate
from lcx.ops.attention import EMPTY
from lcx.schedules.lookup import Lookup
from lcx.sweep.settings import Settings

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabc"
MOST = 400  # characters of a line


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """A model from a GGUF file, one whose weights have a nan, a text, and a session that has read one."""
    folder = tmp_path_factory.mktemp("edges")
    weights = hf_weights(CONFIG)
    path = write_gguf(folder / "tiny.gguf", "llama", CONFIG, weights)
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    broken = write_gguf(folder / "broken.gguf", "llama", CONFIG, weights)
    text = folder / "text.txt"
    text.write_text(LETTERS * 3)
    model = lcx.load(str(path))
    session = lcx.Session(model.layers, lcx.Recipe(), PROMPT, NEW, batch=2)
    session.prefill([IDS[:PROMPT], IDS[:PROMPT]], [PROMPT, 5])
    return SimpleNamespace(
        folder=folder,
        path=str(path),
        broken=str(broken),
        text=str(text),
        model=model,
        layers=model.layers,
        session=session,
    )


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    """The shipped text in letters that the small vocabulary has; other names are refused as ever."""
    monkeypatch.setattr(texts, "read", lambda name: texts.path(name) and LETTERS * 40)


def assert_refused(line: str, words) -> None:
    assert "\n" not in line and len(line) <= MOST
    for word in words:
        assert word in line, line


@pytest.fixture
def nothing_runs(monkeypatch):
    """Programs that fail where they are called."""

    def program(*args, **static):
        raise AssertionError("a program ran")

    for name in (
        "block_program",
        "peek_program",
        "commit_program",
        "forget_program",
        "repack_program",
        "embed_program",
    ):
        monkeypatch.setattr(f"lcx.session.{name}", program)


PYTHON = [bad for bad in BAD if bad.call is not None]


@pytest.mark.parametrize("bad", PYTHON, ids=[f"{b.entry}-{i}" for i, b in enumerate(PYTHON)])
def test_wrong_input_is_refused_before_anything_runs(env, nothing_runs, bad):
    with pytest.raises(UserError) as error:
        bad.call(env)
    assert_refused(str(error.value), bad.words)


def filled(env, args):
    return [a.format(path=env.path, text=env.text, folder=env.folder) for a in args]


COMMANDS = [bad for bad in BAD if bad.command is not None]


@pytest.mark.parametrize("bad", COMMANDS, ids=[f"{b.command[0]}-{i}" for i, b in enumerate(COMMANDS)])
def test_wrong_input_of_a_command_is_one_line_and_exit_code_2(env, nothing_runs, monkeypatch, capsys, bad):
    (env.folder / "taken.npz").mkdir(exist_ok=True)
    name, *args = filled(env, bad.command)
    code, out, err = run_command(monkeypatch, capsys, name, *args)
    assert code == 2 and out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith(f"{name}: ")
    assert_refused(line, bad.said or bad.words)
    assert not (env.folder / "out.npz").exists() and not (env.folder / "split.json").exists()


def test_every_entry_has_at_least_five_wrong_inputs():
    counts: dict[str, int] = {}
    for bad in BAD:
        counts[bad.entry.partition(" ")[0].partition(".")[0]] = (
            counts.get(bad.entry.partition(" ")[0].partition(".")[0], 0) + 1
        )
        if bad.command is not None:
            counts[bad.command[0]] = counts.get(bad.command[0], 0) + 1
    entries = (
        "Session",
        "generate",
        "score_text",
        "score_continuation",
        "run_methods",
        "load",
        "score",
        "sweep",
        "calibrate",
        "plan",
    )
    assert {name: n for name in entries if (n := counts.get(name, 0)) < 5} == {}


# ---- right answers


RECIPES = {"dense": lcx.Recipe(), "snapkv": SNAP, "h2o": H2O6}


@pytest.mark.parametrize("name", RECIPES)
def test_a_used_session_gives_what_a_new_one_gives(env, name):
    new = lambda: lcx.Session(env.layers, RECIPES[name], PROMPT, NEW)
    used = new()
    first, second = IDS[:PROMPT], IDS[4 : 4 + PROMPT - 2][::-1].copy()
    want = [list(generate(new(), ids, NEW)) for ids in (first, first, second)]
    assert [list(generate(used, ids, NEW)) for ids in (first, first, second)] == want
    # a peeked step that was never committed, and a half-read text, are forgotten too
    used.prefill(second)
    used.peek([1, 2])
    np.testing.assert_array_equal(used.prefill(first), new().prefill(first))
    used.step([3])
    np.testing.assert_array_equal(used.prefill(second), new().prefill(second))


@pytest.mark.parametrize("name", RECIPES)
def test_a_prompt_of_one_token_and_texts_that_fill_a_session(env, name):
    session = lcx.Session(env.layers, RECIPES[name], PROMPT, NEW)
    assert np.isfinite(session.prefill(IDS[:1])).all()
    session.prefill(IDS[:PROMPT])
    for token in IDS[PROMPT:]:
        assert np.isfinite(session.step([token])).all()
    with pytest.raises(UserError, match="row 0 has 0 left"):
        session.step([1])


def test_padding_beyond_a_text_does_not_matter(env):
    session = lcx.Session(env.layers, lcx.Recipe(), PROMPT, NEW, batch=2)
    rows = np.stack([IDS[:PROMPT], IDS[:PROMPT]])
    want = np.asarray(session.prefill(rows, [5, PROMPT]))
    rows[0, 5:] = VOCAB - 1
    np.testing.assert_array_equal(session.prefill(rows, [5, PROMPT]), want)
    got = session.feed([[1, 2], [0, 0]], [[5, 6], [EMPTY, EMPTY]])
    assert got.shape[:2] == (2, 2) and session.next_pos.tolist() == [7, PROMPT]


def test_ids_of_an_embedding_are_allowed_to_its_last_row(env):
    assert np.isfinite(lcx.Session(env.layers, lcx.Recipe(), 2).prefill([0, VOCAB - 1])).all()


# ---- values that are not finite

LAYER = "layer 1 (of 0 to 1), prefill step 1: output not finite"


def test_nan_in_the_weights_is_named_by_layer_and_step(env):
    model = lcx.load(env.broken)
    calls = {
        "generate": lambda: list(generate(lcx.Session(model.layers, lcx.Recipe(), PROMPT, NEW), IDS[:PROMPT], NEW)),
        "draft": lambda: list(
            generate(lcx.Session(model.layers, lcx.Recipe(), PROMPT, NEW), IDS[:PROMPT], NEW, draft=Lookup())
        ),
        "score_text": lambda: lcx.score_text(model.layers, DENSE, IDS),
        "score_continuation": lambda: lcx.score_continuation(model.layers, DENSE, IDS, 4),
    }
    for name, call in calls.items():
        with pytest.raises(UserError) as error:
            call()
        assert LAYER in str(error.value), name
        assert_refused(str(error.value), ())
    settings = Settings(continuation=8, repeats=1, decode_steps=1)
    asked = {"settings": settings, "texts": ["ledger"], "on_row": lambda row: None}
    (row,) = lcx.run_methods(model, {"dense": lcx.Recipe()}, [20], **asked)
    assert row["status"] == "nonfinite" and LAYER in row["message"]


def test_nan_that_comes_while_decoding_is_named(env):
    weights = hf_weights(CONFIG)
    first = list(generate(lcx.Session(env.layers, lcx.Recipe(), PROMPT, NEW), IDS[:PROMPT], NEW))
    assert first[0] not in IDS[:PROMPT]
    weights["model.embed_tokens.weight"][first[0]] = np.nan
    model = lcx.load(str(write_gguf(env.folder / "late.gguf", "llama", CONFIG, weights)))
    got = []
    with pytest.raises(UserError) as error:
        for token in generate(lcx.Session(model.layers, lcx.Recipe(), PROMPT, NEW), IDS[:PROMPT], NEW):
            got.append(token)
    assert got == first[:1]
    # a session alone: the row and the number of tokens; unchecked where it is told so
    session = lcx.Session(model.layers, lcx.Recipe(), PROMPT, NEW, batch=2)
    session.prefill([IDS[:PROMPT]] * 2)
    with pytest.raises(NotFinite, match=f"row 1 are nan after {PROMPT + 1} tokens"):
        session.step([IDS[:1], first[:1]])
    unchecked = lcx.Session(model.layers, lcx.Recipe(), PROMPT, NEW, check_finite=False)
    assert np.isnan(unchecked.prefill(first[:1])).any()
    assert "after 13 tokens: layer 0 (of 0 to 1), decode step 1" in str(error.value)


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt=ABC", "--num_tokens=3"),
        ("generate", "--prompt=ABCABC", "--num_tokens=3", "--draft=lookup"),
        ("score", "--config=configs/dense.py", "--text_file={text}", "--out={folder}/nan.npz", "--num_tokens=20"),
        (
            "score",
            "--config=configs/dense.py",
            "--text_file={text}",
            "--out={folder}/nan.npz",
            "--prompt_tokens=9",
            "--continuation_tokens=9",
        ),
        ("calibrate", "--out={folder}/nan.json", "--tokens=40", "--sink=2", "--window=8"),
    ],
    ids=["generate", "draft", "score", "continuation", "calibrate"],
)
def test_nan_through_a_command_is_one_line_and_exit_code_2(env, monkeypatch, capsys, command):
    name, *args = filled(env, command)
    code, out, err = run_command(monkeypatch, capsys, name, f"--model={env.broken}", *args)
    assert code == 2 and out.strip() == ""
    (line,) = err.strip().splitlines()
    assert_refused(line, (f"{name}: ", LAYER))
    assert not (env.folder / "nan.npz").exists() and not (env.folder / "nan.json").exists()


def test_commands_answer_in_json_and_text(env, monkeypatch, capsys):
    """The commands as this file runs them do what they do as processes."""
    out = env.folder / "fine.npz"
    args = (
        f"--model={env.path}",
        "--config=configs/dense.py",
        f"--text_file={env.text}",
        "--num_tokens=20",
        f"--out={out}",
    )
    code, printed, err = run_command(monkeypatch, capsys, "score", *args)
    assert (code, err) == (0, "")
    line = json.loads(printed, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    score = lcx.score_text(env.layers, DENSE, env.model.tokenizer.encode(LETTERS * 3)[:20])
    assert line["mean_nll"] == pytest.approx(score.mean, abs=1e-5) and out.exists()
    plain = run_command(
        monkeypatch, capsys, "generate", f"--model={env.path}", f"--prompt={LETTERS}", "--num_tokens=12"
    )
    draft = run_command(
        monkeypatch,
        capsys,
        "generate",
        f"--model={env.path}",
        f"--prompt={LETTERS}",
        "--num_tokens=12",
        "--draft=lookup",
    )
    assert plain[0] == draft[0] == 0 and plain[1] == draft[1]
    assert "drafted tokens accepted" in draft[2] and "that of plain decoding, up to ties" in draft[2]
    h2o = ("--config=configs/h2o.py", "--budget=8", "--draft=lookup", "--num_tokens=4")
    code, _, err = run_command(monkeypatch, capsys, "generate", f"--model={env.path}", f"--prompt={LETTERS}", *h2o)
    assert code == 0 and "fed the same steps: H2O of 'all' decides after every step" in err
