"""Texts that come with lcx are whole, and unchanged."""

import pytest

from lcx import texts
from lcx.errors import UserError


def test_the_novel_starts_and_ends_at_chapters():
    text = texts.read("pride_and_prejudice")
    assert text.startswith(
        "It is a truth universally acknowledged, that a single man in possession\nof a good fortune,"
    )
    assert text.endswith("two\nfull courses.\n")
    assert len(text) == texts.TEXTS["pride_and_prejudice"].characters
    assert 200_000 <= texts.path("pride_and_prejudice").stat().st_size <= 300_000
    assert "\r" not in text


def test_an_unknown_text_names_the_nearest():
    with pytest.raises(UserError, match=r"allowed are pride_and_prejudice ; did you mean 'pride_and_prejudice'\?"):
        texts.read("pride_prejudice")


def test_a_changed_text_is_refused(tmp_path, monkeypatch):
    changed = tmp_path / "pride_and_prejudice.txt"
    changed.write_bytes(texts.path("pride_and_prejudice").read_bytes() + b"\n")
    monkeypatch.setattr(texts, "path", lambda name: changed)
    with pytest.raises(UserError, match="has sha256"):
        texts.read("pride_and_prejudice")


def test_a_missing_text_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "path", lambda name: tmp_path / "gone.txt")
    with pytest.raises(UserError, match="cannot be read") as caught:
        texts.read("pride_and_prejudice")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"a b\n", "a b\n"),
        (b"\xef\xbb\xbfa b\n", "a b\n"),
        (b"\xef\xbb\xbf", ""),
        # the first mark is the file's, a second one is text
        (b"\xef\xbb\xbf\xef\xbb\xbfa", "\ufeffa"),
        (b"a\xef\xbb\xbfb", "a\ufeffb"),
        (b"a\r\nb\r\n", "a\nb\n"),
        (b"a\rb\n\rc", "a\nb\n\nc"),
        (b"\xef\xbb\xbfa\r\n\r\nb", "a\n\nb"),
        ("naïve 日本".encode(), "naïve 日本"),
    ],
)
def test_a_file_gives_its_text_without_mark_and_carriage_returns(tmp_path, raw, text):
    (tmp_path / "t.txt").write_bytes(raw)
    assert texts.read_file(tmp_path / "t.txt") == text


@pytest.mark.parametrize("raw", [b"\xff\xfea\0", b"\xfe\xff\0a", b"a\xe9", b"\xef\xbb", b"\xff"])
def test_a_file_of_another_encoding_is_refused(tmp_path, raw):
    (tmp_path / "t.txt").write_bytes(raw)
    with pytest.raises(UserError, match=r"text_file='.*t.txt' is not UTF-8 at byte \d"):
        texts.read_file(tmp_path / "t.txt")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="prompt_file='.*gone' cannot be read: No such file"):
        texts.read_file(tmp_path / "gone", "prompt_file")
