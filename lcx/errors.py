"""Errors that a user can cause, each one line long: the key, its value, and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input.  The message is one line: key, value, what is allowed.  Command lines print it and exit with 2."""


class NotFinite(UserError):
    """A result that is nan or infinite: the weights or the method have failed."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ` ; did you mean 'x'?` for the allowed name that looks most like `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" ; did you mean {matches[0]!r}?" if matches else ""


def brief(value) -> str:
    """Return a value as an error shows it, in at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
