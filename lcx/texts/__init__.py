"""Long real texts that come with lcx.  Each is checked against its sha256 when it is read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lcx.errors import UserError, nearest


@dataclass(frozen=True)
class Text:
    """A text file beside this one.  `tokens` counts SmolLM2's."""

    file: str
    sha256: str
    characters: int
    tokens: int
    origin: str
    licence: str


TEXTS = {
    "pride_and_prejudice": Text(
        file="pride_and_prejudice.txt",
        sha256="5c33684c9190dae76cc7bc6ad5c7b4941e01d66e96df58d2d73b98939cc3d6e8",
        characters=211_931,
        tokens=52_527,
        origin="Jane Austen, Pride and Prejudice (1813), chapters 1 to 21 from 'It is a truth universally' on, as in "
        "the R package janeaustenr (Debian r-cran-janeaustenr, lines joined with a line feed)",
        licence="public domain",
    ),
    "ledger": Text(
        file="ledger.txt",
        sha256="070195d4214dde67f72273ca8e1dab936e59f527913f382bfd1021c229e250d6",
        characters=175_061,
        tokens=67_959,
        origin="a harbour's day book whose entries repeat particulars of entries some 1 to 150 lines before, by scripts/make_ledger.py",
        licence="Apache-2.0",
    ),
    "code": Text(
        file="code.txt",
        sha256="129f9927d26387217efa5e0cbe63d9ccd8282c1268f83157e3a934e602a84bb5",
        characters=117_399,
        tokens=35_099,
        origin="Python: ten modules of lcx as they were once",
        licence="Apache-2.0",
    ),
}
# what a sweep scores by default: one that hardly needs its far context, and one that cannot do without
DEFAULT = ("pride_and_prejudice", "ledger")


def path(name: str) -> Path:
    """Return the path of a text.

    Raises:
      UserError: no text of this name.
    """
    if name not in TEXTS:
        raise UserError(f"text={name!r}; allowed are {', '.join(TEXTS)}{nearest(name, TEXTS)}")
    return Path(__file__).parent / TEXTS[name].file


def read(name: str) -> str:
    """Return a text, UTF-8, lines ending in a line feed.

    Raises:
      UserError: no text of this name, or a file that is missing or was changed.
    """
    file = path(name)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(f"text={name!r}: {file} cannot be read: {error.strerror}; install lcx again") from None
    digest = hashlib.sha256(raw).hexdigest()
    if digest != TEXTS[name].sha256:
        raise UserError(f"text={name!r}: {file} has sha256 {digest}, not {TEXTS[name].sha256}; install lcx again")
    return decode(raw)


def load(name: str, flag: str = "text") -> tuple[str, str]:
    """Return a text and the sha256 of its file, by the name of one that lcx ships or by a path.

    Raises:
      UserError: neither a name nor a file, or a file that is not UTF-8 or empty.
    """
    if name in TEXTS:
        return read(name), TEXTS[name].sha256
    if not Path(name).is_file():
        raise UserError(
            f"{flag}={name!r}: no such file; allowed are files, and {', '.join(TEXTS)}{nearest(name, TEXTS)}"
        )
    text = read_file(name, flag)
    if not text.strip():
        raise UserError(f"{flag}={name!r} is empty")
    return text, hashlib.sha256(Path(name).read_bytes()).hexdigest()


def short_name(name: str) -> str:
    """Return the name of a text in rows and figures: that of a shipped text, else the file's without its folder."""
    return name if name in TEXTS else Path(name).name


def read_file(path: str | Path, flag: str = "text_file") -> str:
    """Return a UTF-8 text of a user's, as `decode` gives it.

    Args:
      path: of the file.
      flag: name of the path in errors.

    Raises:
      UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return decode(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{flag}={str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}={str(path)!r} is not UTF-8 at byte {error.start:,}") from None


def decode(raw: bytes) -> str:
    """Decode the text of a file: UTF-8 without its byte order mark, lines ending in a line feed.

    A mark in front is of the file, not of the text, and so are line ends: "\\r\\n" and "\\r" become "\\n", as `open` in text mode does it.
    A text therefore has the same tokens on every system.  U+FEFF further on stays.
    """
    return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
