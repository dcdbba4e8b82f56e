"""Texts that come with lcx are whole, and unchanged."""

import hashlib
import re
from pathlib import Path

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


@pytest.mark.parametrize("name", texts.TEXTS)
def test_texts_are_whole(name):
    text = texts.read(name)
    assert len(text) == texts.TEXTS[name].characters and "\r" not in text
    assert texts.load(name) == (text, texts.TEXTS[name].sha256)


def test_the_ledger_is_what_its_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    import make_ledger

    assert make_ledger.ledger() == texts.read("ledger")


def test_the_ledger_repeats_vouchers_near_and_far():
    lines = [line for line in texts.read("ledger").splitlines() if line.startswith("No. ")]
    first, back = {}, []
    for number, line in enumerate(lines, 1):
        (voucher,) = re.findall(r"[Vv]oucher (\w{6})", line)
        if voucher in first:
            back.append(number - first[voucher])
        first.setdefault(voucher, number)
    assert 0.6 < len(back) / len(lines) < 0.72
    # spread over the logarithm: as many within 10 entries as beyond
    assert 0.3 < sum(n <= 10 for n in back) / len(back) < 0.6 and 100 < max(back) < 250


def test_a_file_is_a_text_with_its_digest(tmp_path):
    file = tmp_path / "own.txt"
    file.write_bytes("\ufeffa b\r\n".encode())
    assert texts.load(str(file)) == ("a b\n", hashlib.sha256(file.read_bytes()).hexdigest())
    assert texts.short_name(str(file)) == "own.txt"
    with pytest.raises(UserError, match="text_file='.*gone': no such file; allowed are files, and pride_and"):
        texts.load(str(tmp_path / "gone"), "text_file")
    file.write_text(" \n")
    with pytest.raises(UserError, match="own.txt' is empty"):
        texts.load(str(file))


def test_an_unknown_text_names_the_nearest():
    with pytest.raises(
        UserError, match=r"allowed are pride_and_prejudice, ledger, code ; did you mean 'pride_and_prejudice'\?"
    ):
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
