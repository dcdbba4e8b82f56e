"""Safetensors files as read-only numpy views over mmap: nothing is copied until it is used."""

from __future__ import annotations

import json
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lcx.pretrained.errors import CheckpointFormatError

DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class SafetensorsFile:
    """`entries` maps a name to (type, shape, offset in bytes from the start of the file)."""

    path: str
    metadata: dict[str, str]
    entries: dict[str, tuple[str, tuple[int, ...], int]]
    buffer: mmap.mmap

    def values(self, name: str) -> np.ndarray:
        """Return a read-only view in the stored type, which is one of F32, F16 and BF16."""
        kind, shape, offset = self.entries[name]
        count = 1
        for size in shape:
            count *= size
        return np.frombuffer(self.buffer, DTYPES[kind], count=count, offset=offset).reshape(shape)


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Map a file.

    Raises:
      CheckpointFormatError: no such file, or one that the safetensors library refuses.
    """
    try:
        # the library checks the header: lengths, overlaps, holes, and that the ranges are those of shape and type
        with safe_open(path, framework="np") as checked:
            metadata = checked.metadata() or {}
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointFormatError(f"{path}: not a readable safetensors file: {error}") from None
    (length,) = struct.unpack_from("<Q", buffer, 0)
    header = json.loads(buffer[8 : 8 + length])
    header.pop("__metadata__", None)
    entries = {
        name: (entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return SafetensorsFile(str(path), metadata, entries, buffer)
