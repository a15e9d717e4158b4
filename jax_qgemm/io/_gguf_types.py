"""The GGUF container's constants, metadata types and tensor types.

Numbers are those of the GGUF specification (ggml repository, docs/gguf.md) and of `enum ggml_type` in ggml.h.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import ml_dtypes
import numpy as np

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_KEY_BYTES = 65535
MAX_DIMS = 4
# ggml keeps a name in 64 bytes, the last of which ends it.
MAX_NAME_BYTES = 63


class GGUFValueType(enum.IntEnum):
    """Type of a metadata value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# Little endian, as the file has them; also the dtypes of numeric arrays in memory.
VALUE_DTYPES: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}
VALUE_TYPE_OF_DTYPE = {dtype: value_type for value_type, dtype in VALUE_DTYPES.items()}


class GGUFInt(int):
    """An int that remembers the GGUF type it was stored as.

    `load_gguf` returns one where `save_gguf` would otherwise choose another type for that value (a 3 stored
    as INT32 or UINT64, say), so that metadata survive a round trip to the byte. Arithmetic gives plain ints.

    Attributes:
      value_type: the stored integer type.
    """

    value_type: GGUFValueType

    def __new__(cls, value: int, value_type: GGUFValueType) -> GGUFInt:
        limits = np.iinfo(VALUE_DTYPES[GGUFValueType(value_type)])
        if not limits.min <= value <= limits.max:
            raise ValueError(f"value: got {value}, expected {limits.min} to {limits.max} for {value_type.name}")
        self = super().__new__(cls, value)
        self.value_type = GGUFValueType(value_type)
        return self

    def __getnewargs__(self) -> tuple[int, GGUFValueType]:
        return int(self), self.value_type


def default_int_type(low: int, high: int) -> GGUFValueType:
    """The type of ints from `low` to `high`: the first of UINT32, INT32, UINT64, INT64 that holds them."""
    for value_type in (GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.UINT64, GGUFValueType.INT64):
        limits = np.iinfo(VALUE_DTYPES[value_type])
        if limits.min <= low and high <= limits.max:
            return value_type
    raise ValueError(f"integers from {low} to {high} fit no GGUF type")


@dataclasses.dataclass(frozen=True)
class TensorType:
    """How a tensor type stores its elements.

    Attributes:
      name: the ggml name in lower case; for block types also the name of the jax_qgemm format, if there is
        one.
      number: its number in the file.
      block: elements of one block.
      block_bytes: bytes of one block.
      dtype: the element's dtype, None for block types.
    """

    name: str
    number: int
    block: int
    block_bytes: int
    dtype: np.dtype[Any] | None = None


_PLAIN = {
    "f32": (0, np.dtype("<f4")),
    "f16": (1, np.dtype("<f2")),
    "i8": (24, np.dtype("i1")),
    "i16": (25, np.dtype("<i2")),
    "i32": (26, np.dtype("<i4")),
    "i64": (27, np.dtype("<i8")),
    "f64": (28, np.dtype("<f8")),
    "bf16": (30, np.dtype(ml_dtypes.bfloat16)),
}

# Name: number, block, block_bytes. Types without a format are listed so that the rest of their file loads.
_BLOCKS = {
    "q4_0": (2, 32, 18),
    "q4_1": (3, 32, 20),
    "q5_0": (6, 32, 22),
    "q5_1": (7, 32, 24),
    "q8_0": (8, 32, 34),
    "q8_1": (9, 32, 36),
    "q2_k": (10, 256, 84),
    "q3_k": (11, 256, 110),
    "q4_k": (12, 256, 144),
    "q5_k": (13, 256, 176),
    "q6_k": (14, 256, 210),
    "q8_k": (15, 256, 292),
    "iq2_xxs": (16, 256, 66),
    "iq2_xs": (17, 256, 74),
    "iq3_xxs": (18, 256, 98),
    "iq1_s": (19, 256, 50),
    "iq4_nl": (20, 32, 18),
    "iq3_s": (21, 256, 110),
    "iq2_s": (22, 256, 82),
    "iq4_xs": (23, 256, 136),
    "iq1_m": (29, 256, 56),
    "tq1_0": (34, 256, 54),
    "tq2_0": (35, 256, 66),
    "mxfp4": (39, 32, 17),
    "nvfp4": (40, 64, 36),
    "q1_0": (41, 128, 18),
}

_ALL_TYPES = (
    *(TensorType(name, number, 1, dtype.itemsize, dtype) for name, (number, dtype) in _PLAIN.items()),
    *(TensorType(name, *numbers) for name, numbers in _BLOCKS.items()),
)
TENSOR_TYPES = {t.number: t for t in _ALL_TYPES}
TENSOR_TYPE_OF_NAME = {t.name: t for t in _ALL_TYPES}
TENSOR_TYPE_OF_DTYPE = {t.dtype: t for t in _ALL_TYPES if t.dtype is not None}
