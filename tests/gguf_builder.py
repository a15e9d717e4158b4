"""GGUF files put together by hand, byte by byte, so that they can be wrong in one chosen place."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, F16, Q4_0, Q8_0, IQ2_XXS = 0, 1, 2, 8, 16


class Entry(NamedTuple):
    """A metadata key, its type number and the bytes of its value."""

    key: bytes
    type: int
    value: bytes


class Tensor(NamedTuple):
    """A tensor's description, dims in GGUF order, offset into the data section."""

    name: bytes
    dims: Sequence[int]
    type: int
    offset: int
    ndim: int | None = None


class Built(NamedTuple):
    """The file's bytes, and where its fields start: "version", ("key", 0), ("offset", 1) and so on."""

    data: bytes
    marks: dict[object, int]


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: bytes) -> bytes:
    return u64(len(text)) + text


def array(element_type: int, count: int, payload: bytes) -> bytes:
    return u32(element_type) + u64(count) + payload


def build(
    metadata: Sequence[Entry] = (),
    tensors: Sequence[Tensor] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    metadata_count: int | None = None,
    alignment: int = 32,
) -> Built:
    """A file with these entries; the counts say otherwise where they are given."""
    out, marks = bytearray(), {}

    def put(label: object, raw: bytes) -> None:
        marks[label] = len(out)
        out.extend(raw)

    put("magic", magic)
    put("version", u32(version))
    put("count of tensors", u64(len(tensors) if tensor_count is None else tensor_count))
    put("count of metadata", u64(len(metadata) if metadata_count is None else metadata_count))
    for i, entry in enumerate(metadata):
        put(("key", i), string(entry.key))
        put(("value type", i), u32(entry.type))
        put(("value", i), entry.value)
    for i, tensor in enumerate(tensors):
        put(("name", i), string(tensor.name))
        put(("dims", i), u32(len(tensor.dims) if tensor.ndim is None else tensor.ndim))
        out.extend(b"".join(map(u64, tensor.dims)))
        put(("type", i), u32(tensor.type))
        put(("offset", i), u64(tensor.offset))
    marks["end of header"] = len(out)
    out.extend(bytes(-len(out) % alignment))
    put("data", data)
    return Built(bytes(out), marks)


def small() -> Built:
    """A valid file with something of everything, whose last tensor fills its last aligned piece."""
    metadata = [
        Entry(b"general.architecture", STRING, string(b"test")),
        Entry(b"general.alignment", UINT32, u32(32)),
        Entry(b"a.u8", UINT8, b"\xff"),
        Entry(b"a.bool", BOOL, b"\1"),
        Entry(b"a.f64", FLOAT64, struct.pack("<d", 0.1)),
        Entry(b"a.i64", INT64, struct.pack("<q", -(2**63))),
        Entry(b"a.tokens", ARRAY, array(STRING, 3, string(b"a") + string("é".encode()) + string(b"\xff"))),
        Entry(b"a.scores", ARRAY, array(FLOAT32, 2, struct.pack("<2f", 1.5, -2.0))),
        Entry(b"a.flags", ARRAY, array(BOOL, 2, b"\0\1")),
    ]
    tensors = [
        Tensor(b"x", (3,), F32, 0),
        Tensor(b"w", (32, 2), Q8_0, 32),
        Tensor(b"y", (4, 2), F32, 128),
    ]
    data = struct.pack("<3f", 1.0, 2.0, 3.0).ljust(32, b"\0") + bytes(range(68)).ljust(96, b"\0")
    return build(metadata, tensors, data + struct.pack("<8f", *range(8)))
