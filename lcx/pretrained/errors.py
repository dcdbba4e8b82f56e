"""Errors of the loaders.  Their texts come from files of strangers, so each is one printable line of at most 300 characters."""

from __future__ import annotations

from lcx.errors import UserError

MOST = 300  # characters of an error's text
PATH = 80  # characters of a path that are kept where the text is longer


def one_line(text: str) -> str:
    """Return `text` on one line of at most MOST characters: the path before the first ": " loses its beginning, then the text its end."""
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if len(text) > MOST:
        path, colon, problem = text.partition(": ")
        if colon and len(path) > PATH:
            text = f"...{path[3 - PATH :]}: {problem}"
    return text if len(text) <= MOST else f"{text[: MOST - 4]} ..."


class LoadError(UserError):
    """A model that cannot be loaded: one line of at most 300 characters."""

    def __init__(self, text: str):
        super().__init__(one_line(text))


class CheckpointFormatError(LoadError):
    """A file of a checkpoint that cannot be read.  The message names file, field and byte offset where it has them."""


class CheckpointMismatch(LoadError):
    """Mismatch of stored weights and their config.  `problems` lists all of them, the message as many as have room."""

    def __init__(self, path: str, problems: list[str]):
        listed, room = [], MOST - min(len(path), PATH) - 60
        for problem in problems:
            room -= len(problem) + 2
            if listed and room < 0:
                break
            listed.append(problem)
        rest = f"; and {len(problems) - len(listed)} more" if len(listed) < len(problems) else ""
        super().__init__(f"{path}: {len(problems)} problem(s) with its weights: {'; '.join(listed)}{rest}")
        self.problems = tuple(problems)
