"""Reading a GGUF file: every number is checked against the bytes that are there before it is used."""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_qgemm.io import _gguf_types as types
from jax_qgemm.io._gguf_file import Cursor, GGUFFile
from jax_qgemm.io._gguf_types import GGUFInt, GGUFValueType, TensorType
from jax_qgemm.io.errors import shorten

# Memory that a metadata entry and a tensor's description take beside their strings, rounded up.
_ENTRY_BYTES = 512
_INFO_BYTES = 768
# Bytes of the shortest possible entries, which bound the counts.
_MIN_METADATA_BYTES = 8 + 1 + 4 + 1
_MIN_INFO_BYTES = 8 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True, slots=True)
class GGUFTensorInfo:
    """Where a tensor lies in its file.

    Attributes:
      name: its name.
      type: the ggml type in lower case, such as "f32" or "q4_k".
      shape: elements in NumPy order, GGUF's dimensions reversed: (n, k) for a matrix whose rows are k
        elements.
      offset: of its data, in bytes from the start of the file.
      nbytes: of its data.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """Everything in a GGUF file but the data.

    Attributes:
      version: of the container, 2 or 3.
      alignment: of the tensors' data, in bytes.
      metadata: by key, in the order of the file; see `load_gguf` for the types.
      tensors: by name, in the order of the file.
    """

    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensorInfo]


def read_header(file: GGUFFile) -> GGUFHeader:
    cursor = Cursor(file)
    version = _read_version(cursor)
    cursor.field = "tensor count"
    tensor_count = cursor.count(_MIN_INFO_BYTES)
    cursor.field = "metadata count"
    metadata_count = cursor.count(_MIN_METADATA_BYTES)

    metadata: dict[str, Any] = {}
    alignment = types.DEFAULT_ALIGNMENT
    for i in range(metadata_count):
        cursor.field = f"metadata key {i}"
        start = cursor.offset
        key = cursor.name(types.MAX_KEY_BYTES)
        if not key:
            cursor.fail("empty", start)
        if key in metadata:
            cursor.fail(f"duplicate of {shorten(key)}", start)
        cursor.field = f"metadata {shorten(key)}"
        start = cursor.offset
        metadata[key] = _read_value(cursor)
        cursor.hold(_ENTRY_BYTES)
        if key == types.ALIGNMENT_KEY:
            alignment = _check_alignment(cursor, metadata[key], start)

    tensors = _read_tensor_infos(cursor, tensor_count, alignment)
    return GGUFHeader(version, alignment, metadata, tensors)


def _read_version(cursor: Cursor) -> int:
    magic = cursor.take(4)
    if magic != types.MAGIC:
        cursor.fail(f"not a GGUF file: starts with {magic!r}, expected {types.MAGIC!r}", 0)
    cursor.field = "version"
    version = cursor.u32()
    if version & 0xFFFF == 0 and version:
        cursor.fail("the file is big endian, which is not supported", 4)
    if version not in (2, 3):
        cursor.fail(f"GGUF version {version}, expected 2 or 3", 4)
    return version


def _read_value_type(cursor: Cursor) -> GGUFValueType:
    start = cursor.offset
    number = cursor.u32()
    if number >= len(GGUFValueType):
        cursor.fail(f"unknown value type {number}", start)
    return GGUFValueType(number)


def _read_value(cursor: Cursor) -> Any:
    value_type = _read_value_type(cursor)
    if value_type == GGUFValueType.ARRAY:
        return _read_array(cursor)
    if value_type == GGUFValueType.STRING:
        return cursor.string()
    value = _read_numbers(cursor, value_type, 1)[0]
    if value_type == GGUFValueType.FLOAT64:
        return value
    if value_type in (GGUFValueType.FLOAT32, GGUFValueType.BOOL):
        return value.item()
    number = int(value)
    if types.default_int_type(number, number) == value_type:
        return number
    return GGUFInt(number, value_type)


def _read_array(cursor: Cursor) -> Any:
    start = cursor.offset
    value_type = _read_value_type(cursor)
    if value_type == GGUFValueType.ARRAY:
        cursor.fail("an array of arrays is not supported", start)
    if value_type == GGUFValueType.STRING:
        return [cursor.string() for _ in range(cursor.count(8))]
    numbers = _read_numbers(cursor, value_type, cursor.count(types.VALUE_DTYPES[value_type].itemsize))
    cursor.hold(numbers.nbytes)
    return numbers


def _read_numbers(cursor: Cursor, value_type: GGUFValueType, count: int) -> np.ndarray:
    dtype = types.VALUE_DTYPES[value_type]
    start = cursor.offset
    raw = np.frombuffer(cursor.take(count * dtype.itemsize), np.uint8)
    if value_type == GGUFValueType.BOOL and raw.max(initial=0) > 1:
        at = int(np.argmax(raw > 1))
        cursor.fail(f"a BOOL of {raw[at]}, expected 0 or 1", start + at)
    return raw.view(dtype).copy()


def _check_alignment(cursor: Cursor, value: Any, start: int) -> int:
    if type(value) is not int or not 0 <= value < 1 << 32:  # any other type is read as something else
        cursor.fail(f"{value!r} is not a UINT32", start)
    if value == 0 or value & (value - 1):
        cursor.fail(f"an alignment of {value}, expected a power of two", start)
    return value


def _read_tensor_infos(cursor: Cursor, count: int, alignment: int) -> dict[str, GGUFTensorInfo]:
    tensors: dict[str, GGUFTensorInfo] = {}
    offset_fields: list[int] = []
    for i in range(count):
        cursor.field = f"tensor name {i}"
        start = cursor.offset
        name = cursor.name(types.MAX_KEY_BYTES)
        if name in tensors:
            cursor.fail(f"duplicate of {shorten(name)}", start)
        cursor.hold(_INFO_BYTES)
        quoted = shorten(name)
        cursor.field = f"tensor {quoted}: dimensions"
        dims_field = cursor.offset
        dims = _read_dims(cursor)
        cursor.field = f"tensor {quoted}: type"
        tensor_type = _read_tensor_type(cursor)
        if dims[0] % tensor_type.block:
            problem = f"rows of {dims[0]} elements, expected a multiple of {tensor_type.name}'s {tensor_type.block}"
            cursor.field = f"tensor {quoted}: dimensions"
            cursor.fail(problem, dims_field)
        nbytes = math.prod(dims) // tensor_type.block * tensor_type.block_bytes
        cursor.field = f"tensor {quoted}: offset"
        offset_fields.append(cursor.offset)
        tensors[name] = GGUFTensorInfo(name, tensor_type.name, dims[::-1], cursor.u64(), nbytes)
    data_start = -(-cursor.offset // alignment) * alignment
    return _place_tensors(cursor, tensors, offset_fields, data_start, alignment)


def _read_dims(cursor: Cursor) -> tuple[int, ...]:
    start = cursor.offset
    ndim = cursor.u32()
    if not 1 <= ndim <= types.MAX_DIMS:
        cursor.fail(f"{ndim} dimensions, expected 1 to {types.MAX_DIMS}", start)
    dims = struct.unpack(f"<{ndim}Q", cursor.take(8 * ndim))
    if 0 in dims:
        cursor.fail(f"{dims} has a dimension of zero", start)
    if math.prod(dims) >= 1 << 63:
        cursor.fail(f"{dims} has 2^63 elements or more", start)
    return dims


def _read_tensor_type(cursor: Cursor) -> TensorType:
    start = cursor.offset
    number = cursor.u32()
    if number not in types.TENSOR_TYPES:
        cursor.fail(f"unknown tensor type {number}", start)
    return types.TENSOR_TYPES[number]


def _place_tensors(
    cursor: Cursor, tensors: dict[str, GGUFTensorInfo], fields: list[int], data_start: int, alignment: int
) -> dict[str, GGUFTensorInfo]:
    """Turns offsets into the data section, which starts at `data_start`, into offsets into the file."""
    placed: dict[str, GGUFTensorInfo] = {}
    for field, info in zip(fields, tensors.values(), strict=True):
        cursor.field = f"tensor {shorten(info.name)}: offset"
        if info.offset % alignment:
            cursor.fail(f"{info.offset} is not a multiple of the alignment {alignment}", field)
        start, end = data_start + info.offset, data_start + info.offset + info.nbytes
        if end > cursor.file.size:
            cursor.fail(f"its data, bytes {start} to {end}, leave the file of {cursor.file.size} bytes", field)
        placed[info.name] = dataclasses.replace(info, offset=start)
    order = sorted(zip(placed.values(), fields, strict=True), key=lambda item: item[0].offset)
    for (before, _), (info, field) in itertools.pairwise(order):
        if before.offset + before.nbytes > info.offset:
            cursor.field = f"tensor {shorten(info.name)}: offset"
            cursor.fail(f"its data overlap those of tensor {shorten(before.name)}", field)
    return placed


def read_tensor(file: GGUFFile, info: GGUFTensorInfo, advance: Callable[[int], Any] | None = None) -> np.ndarray:
    """The tensor's bytes: uint8, in its shape but for the last axis, which is the bytes of a row."""
    raw = np.empty(info.nbytes, np.uint8)
    file.read_into(raw.data, info.offset, f"tensor {shorten(info.name)}: data", advance)
    return raw.reshape(*info.shape[:-1], -1)
