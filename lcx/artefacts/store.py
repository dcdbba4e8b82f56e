"""Calibrated arrays on disk: one safetensors file, with a JSON record in its header of what made them.

Nothing in a file can execute: the safetensors library reads numbers, the record is JSON, and both are checked before they are used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from lcx import texts
from lcx.errors import UserError, nearest
from lcx.model_config import ModelConfig

KEY = "lcx"  # of the record in the safetensors metadata
FORMAT = 1
MAX_BYTES = 64 << 20
MAX_RECORD = 64 << 10
PACKAGES = ("jax", "numpy", "safetensors")
# what every record must have, and the type of its value
FIELDS = {
    "format": int,
    "method": str,
    "model": str,
    "config_name": str,
    "config_sha256": str,
    "model_sha256": str,
    "text": str,
    "text_sha256": str,
    "settings": dict,
    "seed": int,
    "versions": dict,
    "command": str,
}


@dataclass(frozen=True)
class Artefact:
    """Calibrated arrays and where they come from; `file` is where they were read."""

    arrays: Mapping[str, np.ndarray]
    record: Mapping[str, Any]
    file: str


def config_sha256(config: ModelConfig) -> str:
    """Return the sha256 of a model's sizes and rotary positions, its name left out: the same weights go by several names."""
    sizes = ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "vocab_size")
    fields = {name: getattr(config, name) for name in sizes} | {"rope": dataclasses.asdict(config.rope)}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def make_record(
    method: str, model, text: str, settings: Mapping[str, Any], seed: int, command: str, **more
) -> dict[str, Any]:
    """Return the record of arrays that were calibrated just now.

    Args:
      method: name of the method, by which its loader knows the file.
      model: a `Pretrained`.
      text: a name of `lcx.texts`, or several with commas between.
      settings, seed, command: what the calibration depends on, and how to run it again.
      more: figures worth keeping.
    """
    return {
        "format": FORMAT,
        "method": method,
        "model": model.name,
        "config_name": model.config.name,
        "config_sha256": config_sha256(model.config),
        "model_sha256": model.sha256,
        "text": text,
        "text_sha256": _digests(text),
        "settings": dict(settings),
        "seed": seed,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "command": command,
        **more,
    }


def _digests(names: str) -> str:
    """Return the sha256 of each shipped text, with commas between; empty for one that lcx does not ship."""
    return ",".join(texts.TEXTS[name].sha256 if name in texts.TEXTS else "" for name in names.split(","))


def write(path: str | Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> int:
    """Write arrays and record; return the bytes of the file.

    Raises:
      UserError: the file cannot be written.
    """
    raw = save_safetensors(
        {n: np.ascontiguousarray(a) for n, a in sorted(arrays.items())}, {KEY: json.dumps(record, sort_keys=True)}
    )
    try:
        Path(path).write_bytes(raw)
    except OSError as error:
        raise UserError(f"out={str(path)!r} cannot be written: {error.strerror}") from None
    return len(raw)


def read(path: str | Path, method: str, again: str) -> Artefact:
    """Read a file of a method.

    Args:
      path: of the file.
      method: its record must name it.
      again: the command that makes such a file, for the remedy of an error.

    Raises:
      UserError: the file is missing, too large, not a safetensors file of this method, or damaged; one line.
    """
    where = f"{method}: file={str(path)!r}"
    remedy = f"; make it again: {again}"
    try:
        size = Path(path).stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{where} has {size:,} bytes; allowed are {MAX_BYTES:,}{remedy}")
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}{remedy}") from None
    try:
        arrays = load_safetensors(raw)
        length = int.from_bytes(raw[:8], "little")
        text = json.loads(raw[8 : 8 + length]).get("__metadata__", {}).get(KEY, "")
        record = json.loads(text) if len(text) <= MAX_RECORD else None
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(
            f"{where} is not a safetensors file with a JSON record {KEY!r} in its metadata{remedy}"
        ) from None
    record = _checked_record(record, method, where, remedy)
    for name, array in arrays.items():
        if not (array.dtype.kind in "iu" or (array.dtype.kind == "f" and np.isfinite(array).all())):
            raise UserError(f"{where}: array {name[:40]!r} is not finite numbers{remedy}")
    return Artefact(arrays, record, str(path))


def _checked_record(record: Any, method: str, where: str, remedy: str) -> dict[str, Any]:
    """Return the record; raise UserError for one that is incomplete, of another format or method, or of a text that has changed."""
    if not isinstance(record, dict):
        raise UserError(f"{where} has no JSON record of at most {MAX_RECORD:,} characters{remedy}")
    for name, kind in FIELDS.items():
        if not isinstance(record.get(name), kind) or isinstance(record[name], bool):
            raise UserError(f"{where}: its record has no {name!r} of type {kind.__name__}{remedy}")
    if record["format"] != FORMAT or record["method"] != method:
        kind = f"format {record['format']} of method {record['method'][:40]!r}"
        raise UserError(f"{where} has {kind}; allowed is format {FORMAT} of {method!r}{remedy}")
    if _digests(record["text"]) != record["text_sha256"]:
        raise UserError(
            f"{where} was calibrated on text {record['text'][:40]!r} with sha256 {record['text_sha256'][:64]}, which lcx "
            f"does not ship{remedy}"
        )
    return record


def check_model(artefact: Artefact, config: ModelConfig, sha256: str | None = None) -> None:
    """Raise UserError where an artefact was calibrated on another model.

    Args:
      artefact: as it was read.
      config: of the model that is to use it.
      sha256: of that model's weights, where they are at hand.
    """
    record = artefact.record
    where = f"{record['method']}: file={artefact.file!r} is for model {record['config_name'][:40]!r}"
    if record["config_sha256"] != config_sha256(config):
        raise UserError(f"{where}, whose sizes and settings are not those of {config.name!r}; calibrate that one")
    if sha256 is not None and record["model_sha256"] != sha256:
        raise UserError(
            f"{where} with sha256 {record['model_sha256'][:64]}; the weights have {sha256}; calibrate these"
        )


def shipped(folder: Path, method: str, config: ModelConfig, again: str) -> Path:
    """Return the file in `folder` that was calibrated on a model of this name.

    Raises:
      UserError: there is none.
    """
    names = {read(path, method, again).record["config_name"]: path for path in sorted(folder.glob("*.safetensors"))}
    if config.name not in names:
        raise UserError(
            f"{method}: model={config.name!r} has no calibrated file; there are {', '.join(map(repr, names)) or 'none'}"
            f"{nearest(config.name, names)} ; make one: {again}"
        )
    return names[config.name]
