"""A folder of converted weights, so that a GGUF file is dequantised once.

A file is named after the sha256 of its source, the format version and the type; it is written under a temporary name
in the same folder, synced and renamed, so a reader sees a whole file or none.  Headers, names, shapes and the model's
config are checked at each load; the values themselves are not hashed: a flipped bit in them goes unseen.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import logging
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lcx.model_config import ModelConfig, param_shapes
from lcx.pretrained.errors import CheckpointFormatError
from lcx.pretrained.safetensors_map import open_safetensors

# raise it when the native layout or its names change
FORMAT = 2
NUMPY_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def folder() -> Path:
    """Return the cache folder: $LCX_CACHE, else $XDG_CACHE_HOME/lcx, else ~/.cache/lcx.  It need not exist yet."""
    if os.environ.get("LCX_CACHE"):
        return Path(os.environ["LCX_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "lcx"
    return Path.home() / ".cache" / "lcx"


def file_of(sha256: str, dtype: str) -> Path:
    """Return the path of the converted weights of a source file, whether the file exists or not."""
    return folder() / f"{sha256}-v{FORMAT}-{dtype}.safetensors"


@contextmanager
def new_file(target: Path):
    """Yield a temporary path beside `target`, and rename it to `target` when the block ends without an error.

    The folder is made with mode 0700, the file has mode 0600.

    Raises:
      OSError: the folder cannot be written.
    """
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name[:32]}-", dir=target.parent)
    os.close(handle)
    try:
        yield Path(name)
        # safetensors may have put a file of its own in the place of the empty one
        os.chmod(name, 0o600)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


def load(sha256: str, dtype: str, config: ModelConfig) -> dict[str, np.ndarray] | None:
    """Return the cached arrays as read-only views over mmap, or None where there is no sound file."""
    path = file_of(sha256, dtype)
    if not path.exists():
        return None
    try:
        file = open_safetensors(path)
    except CheckpointFormatError as error:
        logging.warning("damaged cache file is rebuilt: %s", error)
        return None
    kind = "F32" if dtype == "float32" else "BF16"
    wanted = {name: (kind, shape) for name, shape in param_shapes(config).items()}
    stored = {name: entry[:2] for name, entry in file.entries.items()}
    if stored != wanted or file.metadata.get("config") != _config_json(config):
        logging.warning("cache file of another model is rebuilt: %s", path)
        return None
    return {name: file.values(name) for name in wanted}


def store(sha256: str, dtype: str, config: ModelConfig, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays; a folder that cannot be written costs a warning, never the load."""
    path = file_of(sha256, dtype)
    try:
        with new_file(path) as temporary:
            save_file(arrays, temporary, metadata={"config": _config_json(config)})
    except (OSError, SafetensorError) as error:
        logging.warning(
            "weights are not cached: %s cannot be written: %s; set LCX_CACHE to a folder that can", path, error
        )


def _config_json(config: ModelConfig) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)
