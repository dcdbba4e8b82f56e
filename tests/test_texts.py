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
