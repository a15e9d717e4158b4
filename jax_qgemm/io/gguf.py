"""GGUF files: weights go in and out as packed bytes, nothing is dequantized."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jax_qgemm.formats import GGUF_FORMATS, GGUFFormat, QTensor
from jax_qgemm.io import _gguf_types as types
from jax_qgemm.io import _gguf_writer as writer
from jax_qgemm.io._gguf_file import GGUFFile
from jax_qgemm.io._gguf_reader import GGUFHeader, GGUFTensorInfo, read_header, read_tensor
from jax_qgemm.io._selection import progress_bar, select, to_array
from jax_qgemm.io.errors import FormatError, shorten


def load_gguf(
    path: str | os.PathLike[str],
    *,
    tensors: Iterable[str] | Callable[[str], bool] | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, QTensor | jax.Array | np.ndarray], dict[str, Any]]:
    """Loads a GGUF file, version 2 or 3, little endian.

    Metadata come as plain Python values: bool, str, list[str], int for every integer type, float for FLOAT32,
    with the float's exact value. So that `save_gguf` writes each back in its type, an int that it would store
    differently is a `GGUFInt`, a FLOAT64 is an np.float64 (which is a float), and arrays of numbers or bools
    are NumPy arrays of the stored dtype. Bytes of a string that are not UTF-8 (tokens that hold part of a
    character) come as lone surrogates U+DC80 to U+DCFF, Python's "surrogateescape"; in keys and names they
    are an error.

    Args:
      path: the file. It is read by position, not mapped, so it may be replaced once this returns.
      tensors: which tensors to load: their names, a predicate of the name, or None for all.
      progress: whether to show a progress bar on stderr; None shows it on a terminal, from 256 MiB on.

    Returns:
      (tensors, metadata), both in the order of the file. A quantized matrix that the file stores as n rows of
      k elements is a QTensor of shape (*batch, k, n). A tensor of plain numbers is an array of its stored
      dtype in its stored shape: a matrix of n rows is (n, k). It is a jax.Array, or a NumPy array where JAX
      would truncate it (float64 and int64 unless jax_enable_x64 is set).

    Raises:
      FormatError: the file is damaged, or a selected tensor is quantized and of one dimension or of a type
        that jax_qgemm has no format for.
      ValueError: `tensors` names a tensor that the file does not have.
      TypeError: `tensors` is a single string.
      OSError: the file can't be opened or read.
    """
    with GGUFFile(path) as file:
        header = read_header(file)
        selected = [header.tensors[name] for name in select(header.tensors, tensors)]
        for info in selected:
            _check_loadable(path, info)
        total = sum(info.nbytes for info in selected)
        loaded: dict[str, QTensor | jax.Array | np.ndarray] = {}
        with progress_bar(path, total, progress) as advance:
            for info in selected:
                loaded[info.name] = _to_value(read_tensor(file, info, advance), info)
    return loaded, header.metadata


def read_gguf_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Reads metadata and the table of tensors, but no data.

    Raises:
      FormatError: the file is damaged.
      OSError: the file can't be opened or read.
    """
    with GGUFFile(path) as file:
        return read_header(file)


def save_gguf(
    path: str | os.PathLike[str],
    tensors: Mapping[str, QTensor | jax.Array | np.ndarray],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a GGUF file, version 3, little endian, that gguf-py and llama.cpp read.

    The file appears under `path` only once it is complete. Saving what `load_gguf` returned gives the same
    metadata, types included, and the same data; general.alignment in `metadata` is the alignment.

    | metadata value | GGUF type |
    | --- | --- |
    | bool, str | BOOL, STRING |
    | int | the first of UINT32, INT32, UINT64, INT64 that holds it; a `GGUFInt`: its own |
    | float | FLOAT32, rounded |
    | NumPy scalar or 0-d array | the type of its dtype: np.uint8 UINT8 … np.float64 FLOAT64 |
    | list or tuple of one of these | ARRAY of that type, ints sharing one that holds all; empty: of STRING |
    | 1-d array | ARRAY of the type of its dtype |

    llama.cpp needs at least general.architecture, and the keys of that architecture.

    Args:
      path: where to write; a file that is there is replaced.
      tensors: by name, at most 63 bytes of UTF-8 (ggml's limit). A QTensor of shape (*batch, k, n) in a GGUF
        format is stored as n rows of k elements; an array of float16, bfloat16, float32, float64, int8,
        int16, int32 or int64 in its own shape, of 1 to 4 axes.
      metadata: by key, at most 65535 bytes of UTF-8.

    Raises:
      TypeError, ValueError: a tensor or a value that GGUF can't hold, by name.
      OSError: the file can't be written.
    """
    writer.write(path, {name: _plan(name, value) for name, value in tensors.items()}, metadata or {})


def _check_loadable(path: str | os.PathLike[str], info: GGUFTensorInfo) -> None:
    if types.TENSOR_TYPE_OF_NAME[info.type].dtype is not None:
        return
    if info.type not in GGUF_FORMATS:
        problem = f"type {info.type} has no format in jax_qgemm"
    elif len(info.shape) == 1:
        problem = f"a vector of type {info.type}, but only matrices can be quantized"
    else:
        return
    raise FormatError(path, f"tensor {shorten(info.name)}", info.offset, f"{problem}; see `tensors`")


def _to_value(raw: np.ndarray, info: GGUFTensorInfo) -> QTensor | jax.Array | np.ndarray:
    dtype = types.TENSOR_TYPE_OF_NAME[info.type].dtype
    if dtype is None:
        return QTensor.from_gguf_bytes(raw, info.type)
    return to_array(raw.view(dtype))


def _plan(name: str, value: Any) -> writer.PlannedTensor:
    writer.check_name(name, "tensors", types.MAX_NAME_BYTES)
    argument = f"tensors[{name!r}]"
    if isinstance(value, QTensor):
        if not isinstance(value.format, GGUFFormat):
            raise ValueError(
                f"{argument}: format {value.format} has no GGUF type; those that have: {', '.join(GGUF_FORMATS)}"
            )
        *batch, k, n = value.shape
        tensor_type = types.TENSOR_TYPE_OF_NAME[value.format.name]
        shape = (*batch, n, k)
        load = functools.partial(_quantized_bytes, argument, value)
    elif isinstance(value, (jax.Array, np.ndarray)):
        dtype = np.dtype(value.dtype).newbyteorder("<")
        if dtype not in types.TENSOR_TYPE_OF_DTYPE:
            names = ", ".join(str(d) for d in types.TENSOR_TYPE_OF_DTYPE)
            raise TypeError(f"{argument}: got an array of {value.dtype}, expected one of {names}")
        tensor_type = types.TENSOR_TYPE_OF_DTYPE[dtype]
        shape = tuple(value.shape)
        load = functools.partial(_array_bytes, value, dtype)
    else:
        raise TypeError(f"{argument}: got {type(value).__name__}, expected a QTensor or an array")
    if not 1 <= len(shape) <= types.MAX_DIMS or math.prod(shape) == 0:
        raise ValueError(
            f"{argument}: got shape {tuple(value.shape)}, expected 1 to {types.MAX_DIMS} axes, none of size 0"
        )
    return writer.PlannedTensor(tensor_type, shape, load)


def _quantized_bytes(argument: str, value: QTensor) -> np.ndarray:
    try:
        return np.ascontiguousarray(value.to_gguf_bytes())
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


def _array_bytes(value: jax.Array | np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    # As bytes: bfloat16 is no type that memoryview knows.
    return np.ascontiguousarray(np.asarray(value), dtype).reshape(-1).view(np.uint8)
