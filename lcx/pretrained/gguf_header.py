"""A bounded parser of the GGUF header over mmap; values come from `gguf.dequantize`.

Written because `gguf.GGUFReader` builds a Python object per token (3.8 s on SmolLM2) and neither bounds nor explains a
broken header.  A header is hostile until read: every count, length, offset and product is checked before it is used.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from lcx.pretrained.errors import CheckpointFormatError

MAX_KEYS = 4_096
MAX_TENSORS = 65_536
MAX_ITEMS = 2_000_000  # array items of the whole header
MAX_DIMS = 4
MAX_NAME_BYTES = 65_535  # keys; tensor names are shorter still
MAX_STRING_BYTES = 1 << 20  # values: a chat template is about 10 kB
MAX_ALIGNMENT = 1 << 20

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
# types that gguf.dequantize 0.19.0 reads
READABLE = frozenset(
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 MXFP4 NVFP4 "
    "IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M IQ4_NL IQ4_XS".split()
)


@dataclass(frozen=True)
class TensorInfo:
    """Place of a tensor in the file.  `shape` is numpy's order (out, in); `offset` is from the start of the file, in bytes."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A checked header and the bytes behind it.

    `fields` maps keys to int, float, bool, str, list[str] or a numpy array; `tensors` maps names to `TensorInfo`.
    """

    path: str
    version: int
    fields: dict[str, object]
    tensors: dict[str, TensorInfo]
    buffer: mmap.mmap | bytes

    def values(self, name: str) -> np.ndarray:
        """Return dequantised float32 values of one tensor, in numpy's order (out, in).

        Raises:
          CheckpointFormatError: the tensor's type has no dequantiser.
        """
        info = self.tensors[name]
        if info.type.name not in READABLE:
            raise CheckpointFormatError(
                f"{self.path}: tensor {name[:80]!r} has type {info.type.name}, which gguf does not dequantise"
            )
        block, block_bytes = gguf.GGML_QUANT_SIZES[info.type]
        raw = np.frombuffer(self.buffer, np.uint8, count=info.nbytes, offset=info.offset)
        rows = raw.reshape(*info.shape[:-1], info.shape[-1] // block * block_bytes)
        return gguf.dequantize(rows, info.type).reshape(info.shape)


def open_gguf(path: str | Path) -> GGUFFile:
    """Map a GGUF file and read its header.

    Raises:
      CheckpointFormatError: no such file, or a header that breaks a rule or a limit.
    """
    try:
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # mmap: ValueError for an empty file
        raise CheckpointFormatError(f"{path}: cannot be mapped: {error}") from None
    return parse(buffer, str(path))


def parse(buffer: mmap.mmap | bytes, path: str = "<bytes>") -> GGUFFile:
    """Parse the header of a GGUF file that lies in memory.  Raises as `open_gguf` does."""
    return _Parser(buffer, path).file()


class _Parser:
    """A cursor over the header; every read is bounded by the file and by the limits above."""

    def __init__(self, buffer: mmap.mmap | bytes, path: str):
        self.buffer, self.path, self.size = buffer, path, len(buffer)
        self.at = 0
        self.items = 0
        self.field = "header"

    def fail(self, problem: str, at: int | None = None) -> CheckpointFormatError:
        where = self.at if at is None else at
        return CheckpointFormatError(f"{self.path}: {self.field} at byte {where:,}: {problem}")

    def unpack(self, form: struct.Struct) -> int:
        if self.at + form.size > self.size:
            raise self.fail(f"needs {form.size} bytes, the file ends at byte {self.size:,}")
        (value,) = form.unpack_from(self.buffer, self.at)
        self.at += form.size
        return value

    def count(self, form: struct.Struct, name: str, most: int) -> int:
        start = self.at
        value = self.unpack(form)
        if value > most:
            raise self.fail(f"{name}={value:,}, allowed are at most {most:,}", start)
        return value

    def text(self, most: int) -> str:
        start = self.at
        length = self.count(_U64, "string length in bytes", most)
        if self.at + length > self.size:
            raise self.fail(f"string of {length:,} bytes passes the end of the file at byte {self.size:,}", start)
        raw = self.buffer[self.at : self.at + length]
        try:
            value = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"string is not UTF-8 at byte {self.at + error.start:,}", start) from None
        self.at += length
        return value

    def texts(self, length: int) -> list[str]:
        # the same checks as in text(), without a call per string: Gemma has 262,144 tokens
        buffer, at, size, unpack, values = self.buffer, self.at, self.size, _U64.unpack_from, []
        for _ in range(length):
            end = at + 8
            if end <= size:
                (nbytes,) = unpack(buffer, at)
                end += nbytes
            if end > size or end - at - 8 > MAX_STRING_BYTES:
                raise self.fail("string passes the end of the file, or its limit of 1 MiB", at)
            try:
                values.append(buffer[at + 8 : end].decode("utf-8"))
            except UnicodeDecodeError:
                raise self.fail("string is not UTF-8", at) from None
            at = end
        self.at = at
        return values

    def numbers(self, kind: int, length: int) -> np.ndarray:
        dtype = SCALARS[kind]
        nbytes = length * dtype.itemsize
        if self.at + nbytes > self.size:
            raise self.fail(f"{length:,} values of {dtype.name} pass the end of the file at byte {self.size:,}")
        values = np.frombuffer(self.buffer, dtype, count=length, offset=self.at).copy()
        if kind == BOOL:
            if length and values.max() > 1:
                raise self.fail(f"boolean {int(values.max())}, allowed are 0 and 1")
            values = values.astype(bool)
        self.at += nbytes
        return values

    def value(self, kind: int) -> object:
        start = self.at - 4
        if kind == STRING:
            return self.text(MAX_STRING_BYTES)
        if kind in SCALARS:
            return self.numbers(kind, 1)[0].item()
        if kind != ARRAY:
            raise self.fail(f"value type {kind}, allowed are 0 to 12", start)
        inner = self.unpack(_U32)
        length = self.count(_U64, "array length", MAX_ITEMS)
        self.items += length
        if self.items > MAX_ITEMS:
            raise self.fail(f"{self.items:,} array items in the header, allowed are at most {MAX_ITEMS:,}", start)
        if inner == STRING:
            return self.texts(length)
        if inner in SCALARS:
            return self.numbers(inner, length)
        what = "nested array" if inner == ARRAY else f"array of type {inner}"
        raise self.fail(f"{what}, allowed are arrays of numbers, booleans or strings", start)

    def named(self, kind: str, seen: Mapping[str, object], most: int) -> str:
        start = self.at
        name = self.text(most)
        if name in seen:
            raise self.fail(f"{kind} {name[:80]!r} appears twice", start)
        self.field = f"{kind} {name[:80]!r}"
        return name

    def file(self) -> GGUFFile:
        if self.buffer[:4] != b"GGUF":
            raise self.fail(f"magic {bytes(self.buffer[:4])!r}, allowed is b'GGUF'")
        self.at = 4
        version = self.unpack(_U32)
        if version not in (2, 3):
            raise self.fail(f"version={version:,}, allowed are 2 and 3, little-endian", 4)
        num_tensors = self.count(_U64, "number of tensors", MAX_TENSORS)
        num_keys = self.count(_U64, "number of keys", MAX_KEYS)
        fields: dict[str, object] = {}
        for index in range(num_keys):
            self.field = f"key number {index}"
            name = self.named("key", fields, MAX_NAME_BYTES)
            fields[name] = self.value(self.unpack(_U32))
        alignment = fields.get("general.alignment", 32)
        self.field = "key 'general.alignment'"
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.fail(f"alignment={alignment!r}, allowed are powers of 2 up to {MAX_ALIGNMENT:,}")
        infos: dict[str, TensorInfo] = {}
        for index in range(num_tensors):
            self.field = f"tensor number {index}"
            name = self.named("tensor", infos, MAX_NAME_BYTES)
            infos[name] = self.tensor(name, alignment)
        return GGUFFile(self.path, version, fields, self.place(infos, alignment), self.buffer)

    def tensor(self, name: str, alignment: int) -> TensorInfo:
        """Read one row of the tensor table; the offset is still relative to the data section."""
        start = self.at
        num_dims = self.unpack(_U32)
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.fail(f"{num_dims:,} dimensions, allowed are 1 to {MAX_DIMS}", start)
        dims = [self.unpack(_U64) for _ in range(num_dims)]
        if 0 in dims:
            raise self.fail(f"shape {dims} has a 0, allowed are sizes of at least 1", start)
        start = self.at
        number = self.unpack(_U32)
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise self.fail(f"tensor type {number:,} is unknown to gguf", start) from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if dims[0] % block:
            raise self.fail(f"rows of {dims[0]:,} values are not a multiple of the {kind.name} block {block}", start)
        start = self.at
        offset = self.unpack(_U64)
        if offset % alignment:
            raise self.fail(f"offset {offset:,} is not a multiple of the alignment {alignment}", start)
        nbytes = block_bytes * (dims[0] // block)
        for size in dims[1:]:
            nbytes *= size
        if offset + nbytes > self.size:
            raise self.fail(f"{nbytes:,} bytes at offset {offset:,} pass the end of the file", start)
        return TensorInfo(name, tuple(reversed(dims)), kind, offset, nbytes)

    def place(self, infos: dict[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """Make offsets absolute; refuse tensors outside the file or on top of one another."""
        base = -(-self.at // alignment) * alignment
        end = base
        for info in sorted(infos.values(), key=lambda info: info.offset):
            self.field = f"tensor {info.name[:80]!r}"
            offset = base + info.offset
            if offset < end:
                raise self.fail(f"overlaps the tensor before it, which ends at byte {end:,}", offset)
            end = offset + info.nbytes
            if end > self.size:
                raise self.fail(f"{info.nbytes:,} bytes pass the end of the file at byte {self.size:,}", offset)
        return {
            name: TensorInfo(name, info.shape, info.type, base + info.offset, info.nbytes)
            for name, info in infos.items()
        }


_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
