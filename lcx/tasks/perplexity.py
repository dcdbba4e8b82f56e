"""Tokens that count in windowed perplexity and in LongPPL: plain numpy, no model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcx.errors import UserError


@dataclass(frozen=True)
class Window:
    """Window that reads tokens start..stop-1, of which first..stop-1 count."""

    start: int
    stop: int
    first: int

    @property
    def count(self) -> int:
        return self.stop - self.first


def _check(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise UserError(f"{name}={value!r} must be an integer of at least 1 token")


def sliding_windows(n: int, max_len: int, stride: int) -> list[Window]:
    """Return windows from 0, stride, 2 stride, ... of `max_len` tokens; a token counts in the first window that reads it.

    Their counts sum to n.  The last window is the first that reaches the end, and may be shorter.  Fact sheet, section 5.

    Args:
      n: tokens of the document.
      max_len: tokens of a window.
      stride: 1 to max_len; stride = max_len is the harshest.

    Raises:
      UserError: a number out of range.
    """
    _check(n=n, max_len=max_len, stride=stride)
    if stride > max_len:
        raise UserError(f"stride={stride} must be at most max_len={max_len}, or tokens between windows are never read")
    windows, counted = [], 0
    for start in range(0, n, stride):
        stop = min(start + max_len, n)
        windows.append(Window(start, stop, counted))
        counted = stop
        if stop == n:
            break
    return windows


def longppl_windows(n: int, short: int = 4_096, step: int = 1_024) -> list[Window]:
    """Return the short contexts of LongPPL: windows of `short + step` tokens every `step`, whose last `step` tokens count.

    The first `short` tokens never count, so counts sum to max(0, n - short).  LongPPL, arXiv:2410.23771; fact sheet, section 5.

    Raises:
      UserError: a number out of range.
    """
    _check(n=n, short=short, step=step)
    starts = range(0, n - short, step)
    return [Window(start, min(start + short + step, n), start + short) for start in starts]


def longppl_keys(nll_short, nll_long, alpha: float = 2.0, beta: float = 2.0) -> np.ndarray:
    """Return the key tokens of LongPPL: those that a long context helps with and makes likely, under a strong evaluator.

    Args:
      nll_short, nll_long: float [N], -log p in nats of each token after the short and the long context, both at the token's own
        index; nan where there is none, which is never key.
      alpha: least gain, nll_short - nll_long, exclusive.
      beta: bound on nll_long, exclusive.

    Returns:
      bool [N].

    Source: LongPPL, arXiv:2410.23771, equation 5.  Differs: arrays are indexed by token, so token 0 cannot wrap to the end.
    """
    nll_short, nll_long = np.asarray(nll_short, np.float64), np.asarray(nll_long, np.float64)
    return (nll_short - nll_long > alpha) & (nll_long < beta)


def longppl(nll, keys) -> float:
    """Return exp of the mean NLL over key tokens, of the tested model or method.

    Args:
      nll: float [N], in nats, at the token's own index.
      keys: bool [N].

    Raises:
      UserError: no token is key.
    """
    keys = np.asarray(keys, bool)
    if not keys.any():
        raise UserError(f"keys: none of {len(keys):,} tokens is key; take a longer text, or lower alpha or raise beta")
    return float(np.exp(np.asarray(nll, np.float64)[keys].mean()))
