"""Parsers of flag values; every error names the flag, its value and the allowed values."""

from __future__ import annotations

from collections.abc import Sequence

from lcx.errors import UserError


def whole_numbers(name: str, text: str, least: int = 1) -> tuple[int, ...]:
    """Return numbers with commas between.  Raises UserError naming the flag."""
    parts = [part.strip().replace("_", "") for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UserError(
            f"{name}={text!r}: allowed are whole numbers of at least {least} with commas between, such as 512,1024"
        )
    return tuple(int(part) for part in parts)


def shares(name: str, text: str) -> tuple[float, ...]:
    """Return fractions above 0 and at most 1, with commas between.  Raises UserError naming the flag."""
    values = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            raise UserError(
                f"{name}={part.strip()!r}: allowed are fractions with commas between, such as 0.1,0.25"
            ) from None
        if not 0 < value <= 1:
            raise UserError(f"{name}={value:g} must be above 0 and at most 1")
        values.append(value)
    return tuple(values)


def words(name: str, text: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Return words with commas between, each of `allowed`."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    for word in parts:
        if word not in allowed:
            raise UserError(f"{name}={word!r}; allowed are {', '.join(allowed)}")
    return parts


def pairs(name: str, text: str) -> dict[str, str | int]:
    """Return NAME=VALUE pairs with commas between; a whole number becomes one."""
    values: dict[str, str | int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"{name}={part!r}: allowed are NAME=VALUE pairs with commas between")
        values[key] = int(value) if value.isdecimal() else value
    return values


def in_bytes(name: str, text: str) -> int:
    """Return the bytes of a size such as 16GiB, 500MB or 1000000."""
    units = {
        "KiB": 2**10,
        "MiB": 2**20,
        "GiB": 2**30,
        "TiB": 2**40,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "": 1,
    }
    for unit, factor in units.items():
        number = text.strip().removesuffix(unit).strip() if text.strip().endswith(unit) else ""
        if number.replace(".", "", 1).isdecimal():
            return int(float(number) * factor)
    raise UserError(f"{name}={text!r}: allowed are sizes such as 16GiB or 500MB")
