"""Writing a GGUF file (version 3, little endian)."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import jax
import numpy as np

from jax_qgemm.io import _gguf_types as types
from jax_qgemm.io._gguf_types import GGUFInt, GGUFValueType, TensorType


class PlannedTensor(NamedTuple):
    """A tensor to write.

    Attributes:
      type: its tensor type.
      shape: elements in NumPy order.
      load: returns its bytes, C-contiguous uint8; called when it is its turn.
    """

    type: TensorType
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.block * self.type.block_bytes


def write(path: str | os.PathLike[str], tensors: Mapping[str, PlannedTensor], metadata: Mapping[str, Any]) -> None:
    alignment = _alignment(metadata)
    header = bytearray(types.MAGIC)
    header += struct.pack("<IQQ", types.VERSION, len(tensors), len(metadata))
    for key, value in metadata.items():
        header += _encode_entry(key, value)
    offset = 0
    for name, tensor in tensors.items():
        header += _encode_string(name)
        header += struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        header += struct.pack("<IQ", tensor.type.number, offset)
        offset = _align(offset + tensor.nbytes, alignment)

    with atomic_file(path) as file:
        file.write(header)
        for tensor in tensors.values():
            file.seek(_align(file.tell(), alignment))  # what is skipped reads as zeros
            file.write(tensor.load().data)
        # The last tensor too is padded, as llama.cpp's own reader expects.
        file.truncate(_align(file.tell(), alignment))


def check_name(name: str, argument: str, max_bytes: int) -> None:
    """Raises unless a GGUF file can hold this key or tensor name."""
    if not isinstance(name, str):
        raise TypeError(f"{argument}: names must be str, got {name!r}")
    try:
        nbytes = len(name.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument}: the name {name!r} is not valid Unicode: {error.reason}") from None
    if not 1 <= nbytes <= max_bytes:
        raise ValueError(f"{argument}: the name {name!r} has {nbytes} bytes of UTF-8, expected 1 to {max_bytes}")
    if "\0" in name:
        raise ValueError(f"{argument}: the name {name!r} contains a NUL")


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _alignment(metadata: Mapping[str, Any]) -> int:
    value = metadata.get(types.ALIGNMENT_KEY, types.DEFAULT_ALIGNMENT)
    value_type, payload = _encode_value(value)
    alignment = int.from_bytes(payload, "little")
    if value_type != GGUFValueType.UINT32 or alignment == 0 or alignment & (alignment - 1):
        raise ValueError(f"metadata[{types.ALIGNMENT_KEY!r}]: got {value!r}, expected a power of two, UINT32")
    return alignment


def _encode_string(text: str) -> bytes:
    # The reader's error handler: bytes of a string that are not UTF-8 go back as they came.
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _encode_entry(key: str, value: Any) -> bytes:
    check_name(key, "metadata", types.MAX_KEY_BYTES)
    try:
        value_type, payload = _encode_value(value)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"metadata[{key!r}]: {error}") from None
    return _encode_string(key) + struct.pack("<I", value_type) + payload


def _encode_value(value: Any) -> tuple[GGUFValueType, bytes]:
    if isinstance(value, str):
        return GGUFValueType.STRING, _encode_string(value)
    if isinstance(value, (list, tuple)):
        return GGUFValueType.ARRAY, _encode_array(value)
    if isinstance(value, (np.ndarray, jax.Array)) and value.ndim:
        return GGUFValueType.ARRAY, _encode_array(np.asarray(value))
    numbers, value_type = _numbers([value])
    return value_type, numbers.tobytes()


def _encode_array(values: Sequence[Any] | np.ndarray) -> bytes:
    if isinstance(values, np.ndarray) and values.ndim != 1:
        raise ValueError(f"an array of shape {values.shape}, but GGUF metadata hold one dimension only")
    if isinstance(values, np.ndarray) and values.dtype.kind == "U":
        values = values.tolist()
    if not isinstance(values, np.ndarray) and all(isinstance(v, str) for v in values):
        value_type, payload = GGUFValueType.STRING, b"".join(map(_encode_string, values))
    else:
        numbers, value_type = _numbers(values)
        payload = numbers.tobytes()
    return struct.pack("<IQ", value_type, len(values)) + payload


def _numbers(values: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, GGUFValueType]:
    """The values in the dtype of the type that stores them."""
    if not isinstance(values, np.ndarray):
        values = _common_array(values)
    dtype = values.dtype.newbyteorder("<")
    if dtype not in types.VALUE_TYPE_OF_DTYPE:
        raise TypeError(f"dtype {values.dtype} has no GGUF metadata type")
    return values.astype(dtype, copy=False), types.VALUE_TYPE_OF_DTYPE[dtype]


def _common_array(values: Sequence[Any]) -> np.ndarray:
    """Python scalars, all of one kind, as an array of the dtype that `save_gguf` documents for them."""
    first = values[0]
    if isinstance(first, GGUFInt) and len(values) == 1:
        return np.array([int(first)], types.VALUE_DTYPES[first.value_type])
    if isinstance(first, (np.generic, np.ndarray, jax.Array)):
        arrays = [np.asarray(v) for v in values]
        if any(a.dtype != arrays[0].dtype or a.ndim for a in arrays):
            raise TypeError("NumPy values in a list must be scalars of one dtype")
        return np.stack(arrays)
    if all(isinstance(v, bool) for v in values):
        return np.array(values, bool)
    if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        return np.array(values, types.VALUE_DTYPES[types.default_int_type(min(values), max(values))])
    if all(isinstance(v, float) for v in values):
        wide = np.array(values, np.float64)
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float32)
        if np.any(np.isinf(narrow) & ~np.isinf(wide)):
            raise ValueError("a float beyond FLOAT32's range; pass np.float64 to store FLOAT64")
        return narrow
    kinds = sorted({type(v).__name__ for v in values})
    raise TypeError(f"got {', '.join(kinds)}, expected str, bool, int, float, NumPy scalars or arrays of one kind")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` once complete, and leaves no trace if it never is."""
    target = os.path.realpath(path)
    temporary = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
