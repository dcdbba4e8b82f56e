"""A GGUF header is read with limits: broken ones give one clear line, soon."""

import random
import struct
import time

import numpy as np
import pytest
from pretrained_support import hf_weights, small_config, write_gguf

from lcx.errors import UserError
from lcx.model_config import param_shapes
from lcx.pretrained import checkpoints
from lcx.pretrained.gguf_header import CheckpointFormatError, open_gguf, parse
from lcx.pretrained.tokenizer import Tokenizer


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(keys=(), tensors=(), version=3, data=b"") -> bytes:
    """A file from hand-made keys (name, type, bytes) and tensors (name, dims, type, offset)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    for name, kind, value in keys:
        out += text(name) + struct.pack("<I", kind) + value
    for name, dims, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return out + b"\0" * (-len(out) % 32) + data


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    config = small_config("llama", tied=False)
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write_gguf(path, "llama", config, hf_weights(config))


def test_keys_and_values_are_read():
    keys = [
        (b"number", 4, struct.pack("<I", 7)),
        (b"real", 6, struct.pack("<f", 0.5)),
        (b"yes", 7, b"\1"),
        (b"text", 8, text("naïve".encode())),
        (b"list", 9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"")),
        (b"array", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
    ]
    data = np.arange(6, dtype="<f4").tobytes()
    file = parse(header(keys, [(b"w", (3, 2), 0, 0)], data=data))
    assert file.fields | {"array": None} == {
        "number": 7,
        "real": 0.5,
        "yes": True,
        "text": "naïve",
        "list": ["a", ""],
        "array": None,
    }
    assert file.fields["array"].tolist() == [1, -2, 3]
    assert file.tensors["w"].shape == (2, 3)
    assert file.values("w").tolist() == [[0, 1, 2], [3, 4, 5]]


U32 = struct.pack("<I", 32)
BAD = {
    "magic": b"GGML" + bytes(28),
    "no bytes": b"",
    "version": header(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 4_097),
    "tensors": b"GGUF" + struct.pack("<IQQ", 3, 65_537, 0),
    "ends": header([(b"a", 4, b"\0")])[:40],
    "key twice": header([(b"a", 4, U32), (b"a", 4, U32)]),
    "value type": header([(b"a", 13, U32)]),
    "nested array": header([(b"a", 9, struct.pack("<IQ", 9, 1))]),
    "long array": header([(b"a", 9, struct.pack("<IQ", 0, 2_000_001))]),
    "array past the end": header([(b"a", 9, struct.pack("<IQ", 10, 1_000_000))]),
    "list past the end": header([(b"a", 9, struct.pack("<IQ", 8, 1_000_000))]),
    "long string": header([(b"a", 8, struct.pack("<Q", 1 << 62))]),
    "not UTF-8": header([(b"a", 8, text(b"\xff\xfe"))]),
    "boolean": header([(b"a", 7, b"\2")]),
    "alignment": header([(b"general.alignment", 4, struct.pack("<I", 24))]),
    "alignment 0": header([(b"general.alignment", 4, struct.pack("<I", 0))]),
    "alignment text": header([(b"general.alignment", 8, text(b"32"))]),
    "no dims": header(tensors=[(b"w", (), 0, 0)], data=bytes(64)),
    "5 dims": header(tensors=[(b"w", (1,) * 5, 0, 0)], data=bytes(64)),
    "0 dim": header(tensors=[(b"w", (4, 0), 0, 0)], data=bytes(64)),
    "product": header(tensors=[(b"w", (1 << 33, 1 << 33), 0, 0)], data=bytes(64)),
    "tensor type": header(tensors=[(b"w", (4,), 4, 0)], data=bytes(64)),
    "block": header(tensors=[(b"w", (33,), 2, 0)], data=bytes(64)),
    "unaligned": header(tensors=[(b"w", (4,), 0, 4)], data=bytes(64)),
    "outside": header(tensors=[(b"w", (4,), 0, 64)], data=bytes(64)),
    "overlap": header(tensors=[(b"w", (16,), 0, 0), (b"v", (4,), 0, 32)], data=bytes(64)),
    "tensor twice": header(tensors=[(b"w", (4,), 0, 0), (b"w", (4,), 0, 32)], data=bytes(64)),
}


@pytest.mark.parametrize("case", BAD)
def test_a_broken_header_is_one_clear_line(case):
    with pytest.raises(CheckpointFormatError, match="at byte") as caught:
        parse(BAD[case], "some.gguf")
    message = str(caught.value)
    assert message.startswith("some.gguf: ")
    assert "\n" not in message


def test_array_items_are_counted_over_the_whole_header():
    array = struct.pack("<IQ", 0, 1_500_000) + bytes(1_500_000)
    with pytest.raises(CheckpointFormatError, match="array items"):
        parse(header([(b"a", 9, array), (b"b", 9, array)]))


def test_a_type_without_dequantiser_is_refused():
    file = parse(header(tensors=[(b"w", (4,), 26, 0)], data=bytes(32)))
    with pytest.raises(CheckpointFormatError, match="type I32, which gguf does not dequantise"):
        file.values("w")


@pytest.mark.parametrize("name", ["gone.gguf", "."])
def test_a_path_that_is_no_file_is_one_clear_line(tmp_path, name):
    with pytest.raises(CheckpointFormatError, match="cannot be mapped"):
        open_gguf(tmp_path / name)


def test_an_empty_file_is_one_clear_line(tmp_path):
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CheckpointFormatError, match="cannot be mapped"):
        open_gguf(tmp_path / "empty.gguf")


def mutate(raw: bytes, end: int, rng: random.Random) -> bytes:
    """One to four changes to the first `end` bytes, or a cut."""
    out = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(end)
        kind = rng.randrange(6)
        if kind == 0:
            out[at] = rng.randrange(256)
        elif kind == 1:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1]))
        elif kind == 3:
            out[at : at + 4] = struct.pack("<I", rng.choice([0, 8, 9, 1 << 31, (1 << 32) - 1]))
        elif kind == 4:
            del out[at : at + rng.randint(1, 16)]
        else:
            out = out[: rng.randrange(1, len(out))]
            end = min(end, len(out))
    return bytes(out)


def check_mutants(raw: bytes, count: int, seed: int) -> None:
    end = min(info.offset for info in parse(raw).tensors.values())
    rng = random.Random(seed)  # noqa: S311, a test
    accepted = 0
    for number in range(count):
        mutant = mutate(raw, end, rng)
        start = time.perf_counter()
        try:
            file = parse(mutant)
            config, parts = checkpoints.plan_gguf(file)
        except UserError as error:
            assert "\n" not in str(error), number
        else:
            accepted += 1
            assert parts.keys() == param_shapes(config).keys(), number
            for part in (part for group in parts.values() for part in group):
                assert file.values(part.name).shape == part.shape, number
        try:
            Tokenizer.from_gguf(parse(mutant).fields, "mutant")
        except UserError as error:
            assert "\n" not in str(error), number
        # a slow machine and a busy one included; a hang takes for ever
        assert time.perf_counter() - start < 1, number
    assert 0 < accepted < count


def test_2_000_mutated_headers_are_refused_or_read_soon(small_file):
    check_mutants(small_file.read_bytes(), 2_000, seed=1)


@pytest.mark.slow
def test_20_000_mutated_headers_are_refused_or_read_soon(small_file):
    check_mutants(small_file.read_bytes(), 20_000, seed=2)
