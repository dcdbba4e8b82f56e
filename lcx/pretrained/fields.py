"""Typed reads from the settings of a file: config.json, a GGUF header, tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Mapping

from lcx.pretrained.errors import CheckpointFormatError


class Fields:
    """Typed reads from a mapping of untrusted values; every error names the file, the key and the value."""

    def __init__(self, values: Mapping[str, object], path: str):
        self.values, self.path = values, path

    def fail(self, key: str, allowed: str) -> CheckpointFormatError:
        # an array's repr has line breaks
        value = " ".join(repr(self.values.get(key)).split())[:80]
        got = f"{key}={value}" if key in self.values else f"{key} is missing"
        return CheckpointFormatError(f"{self.path}: {got}; allowed is {allowed}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, most: int = 1 << 31) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= most:
            raise self.fail(key, f"an integer from 1 to {most:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise self.fail(key, "a number above 0")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, "a text")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def section(self, key: str) -> Fields:
        """Return a nested mapping; an empty one where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.fail(key, "a mapping")
        return Fields({f"{key}.{name}": inner for name, inner in value.items()}, self.path)

    def refuse(self, key: str, allowed: tuple[object, ...] = ()) -> None:
        """Raise CheckpointFormatError unless the key is absent, null or one of the allowed values."""
        value = self.values.get(key)
        # numpy arrays have no truth value, so `in` is for plain values only
        if value is not None and not (isinstance(value, (bool, int, float, str)) and value in allowed):
            raise self.fail(key, " or ".join(repr(value) for value in allowed) or "none: lcx does not compute it")

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Return a list of `count` numbers above 0."""
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise self.fail(key, f"a list of {count} numbers")
        if not all(type(x) in (int, float) and 0 < x < 1e30 for x in value):
            raise self.fail(key, f"a list of {count} numbers above 0")
        return tuple(float(x) for x in value)
