"""Which tokens were kept, by layer and head: positions as an independent rule gives them, the table, the map, the command."""

import numpy as np
import pytest
from command_line import run_command
from pretrained_support import hf_weights, small_config, write_gguf
from tiny import TINY, layers
from tiny import quick_compilation as quick_compilation

import lcx
from lcx.artefacts.head_split import split_by_score
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.measure.kept import Kept, held_positions
from lcx.models.loading import Pretrained
from lcx.patterns.quest import Quest
from lcx.policies.duo import duo
from lcx.policies.sink_window import SinkWindow
from lcx.recipe import Recipe, Segment
from lcx.schedules.chunked import Chunked

IDS = np.random.default_rng(0).integers(0, TINY.vocab_size, 40)


class Letters:
    """A tokenizer of the tiny model: a token a character."""

    def text_ids(self, text):
        return [ord(c) % 97 for c in text]

    def decode(self, ids):
        return "".join(chr(i + 97) for i in ids)


@pytest.fixture(scope="module")
def model():
    return Pretrained(layers(), Letters(), "tiny", "0" * 64, "none")


@pytest.mark.parametrize("new_tokens", [0, 5])
def test_sinks_and_window_are_what_is_kept(model, new_tokens):
    method = Experiment(Recipe((Segment(policy=SinkWindow(3, 8)),)), schedule=Chunked(16))
    kept = lcx.look(model, method, IDS, new_tokens=new_tokens)
    want = np.zeros(40, bool)
    want[[0, 1, 2, *range(32, 40)]] = True
    assert kept.held.shape == (3, 2, 40) and (kept.held == want).all()
    assert kept.spans(2, 1) == [(0, 2), (32, 39)]
    np.testing.assert_allclose(kept.share, 11 / 40)
    np.testing.assert_array_equal(kept.by_position, np.broadcast_to(want, (3, 40)))
    lines = list(kept.text(2, 1))
    assert lines[0] == "layer 2, KV head 1: 11 of 40 tokens in 2 spans"
    words = "".join(chr(i + 97) for i in IDS[32:])
    assert len(lines) == 3 and lines[2].split()[0] == "32-39" and repr(words) in lines[2]


def test_heads_of_different_segments_stand_at_their_own_place():
    """A retrieval head keeps all, a streaming head sink + window; layer 1 has them the other way round."""
    aux = split_by_score([[1, 0], [0, 1], [1, 0]], 0.5)
    session = lcx.Session(layers(), Recipe(duo(2, 6)), 40, batch=2, aux=aux, schedule=Chunked(16))
    session.prefill(np.stack([IDS, IDS]), [40, 21])
    held = held_positions(session, 40)
    for b, length in enumerate((40, 21)):
        for layer, retrieval in enumerate((0, 1, 0)):
            assert np.flatnonzero(held[b, layer, retrieval]).tolist() == list(range(length))
            assert np.flatnonzero(held[b, layer, 1 - retrieval]).tolist() == [0, 1, *range(length - 6, length)]


def test_a_pattern_that_only_reads_less_is_named(model):
    kept = lcx.look(model, Recipe(pattern=Quest(budget=12, page=4)), IDS)
    text = str(kept)
    assert kept.held.all() and "every token is kept" in text and "Quest chooses at each step" in text


def test_the_table_has_a_line_a_layer():
    held = np.zeros((2, 2, 96), bool)
    held[0, :, :48] = True
    held[1, 0, 95] = True
    lines = str(Kept(held, np.arange(96))).splitlines()
    assert lines[0] == "0.253 of 96 tokens are kept on average over 2 layers x 2 KV heads"
    assert "2 of them a character" in lines[1]
    assert lines[2].split() == ["0", "0.500", "0.500", "to", "0.500", "|" + "█" * 24, "|"]
    assert lines[3].endswith("|" + " " * 47 + "▂|") and "0.000 to 0.010" in lines[3]


def test_many_spans_are_cut_in_the_middle():
    held = np.zeros((1, 1, 100), bool)
    held[0, 0, ::2] = True
    lines = list(Kept(held, np.arange(100)).text(0, 0, most=5))
    assert [line.split()[0] for line in lines[1:]] == ["0", "2", "4", "...", "96", "98"]
    assert "45 spans more" in lines[4]


def test_the_map_is_written(model, tmp_path):
    kept = lcx.look(model, Recipe((Segment(policy=SinkWindow(3, 8)),)), IDS)
    kept.save(tmp_path / "a.png", "a title")
    kept.save(tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "a.svg").read_text()[:500]
    with pytest.raises(UserError, match="allowed are names that end in"):
        kept.save(tmp_path / "a.gif")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"new_tokens": 40}, "new_tokens=40: the text has 40 tokens"),
        ({"method": "snapkv"}, "method='snapkv' is a str; allowed is a Experiment or Recipe"),
        ({"text": np.zeros(513, int)}, "beyond the context of tiny, 512"),
    ],
)
def test_wrong_arguments_are_refused(model, settings, words):
    with pytest.raises(UserError, match=words):
        lcx.look(**{"model": model, "method": Recipe(), "text": IDS} | settings)


@pytest.mark.parametrize(("layer", "head"), [(3, 0), (0, 2), (-1, 0)])
def test_no_such_head_is_refused(layer, head):
    with pytest.raises(UserError, match="must be an integer"):
        Kept(np.ones((3, 2, 4), bool), np.arange(4)).spans(layer, head)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("look")
    config = small_config("llama", tied=False)
    (folder / "text.txt").write_text("ABCDEFGHIJKLMNOPQRSTUVWXYZabc" * 2)
    return str(write_gguf(folder / "tiny.gguf", "llama", config, hf_weights(config))), folder


def test_the_command_prints_the_table_and_writes_the_map(files, monkeypatch, capsys):
    path, folder = files
    words = ("--config=sink_window", "--budget=12", "--config.recipe.segments.0.policy.sink=2", "--num_tokens=24")
    asked = (f"--model={path}", f"--text_file={folder / 'text.txt'}", f"--out={folder / 'kept.png'}", "--new_tokens=4")
    code, out, err = run_command(monkeypatch, capsys, "look", *words, *asked)
    assert code == 0, err
    assert "0.500 of 24 tokens are kept" in out and "12 of 24 tokens in 2 spans" in out
    assert "14-23" in out and (folder / "kept.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "config: missing"),
        (("--config=snapkv",), "text_file: missing"),
        (("--config=snapkv", "--text_file=README.md", "--out=a.gif"), "out='a.gif': allowed is a file ending in"),
        (("--config=sink_window", "--layer=99"), "layer=99 must be an integer of at most"),
        (("--config=sink_window", "--head=99"), "head=99 must be an integer of at most"),
        (("--config=sink_window", "--num_tokens=9999"), "num_tokens=9999: the text has"),
    ],
)
def test_wrong_input_of_the_command_is_one_line(files, words, message, monkeypatch, capsys):
    path, folder = files
    text = () if len(words) < 2 or "README" in words[1] else (f"--text_file={folder / 'text.txt'}",)
    out = () if "--out=a.gif" in words else (f"--out={folder / 'no.png'}",)
    code, printed, err = run_command(monkeypatch, capsys, "look", f"--model={path}", *words, *text, *out)
    (line,) = err.strip().splitlines()
    assert code == 2 and printed == "" and line.startswith("look: ") and message in line
    assert not (folder / "no.png").exists()
