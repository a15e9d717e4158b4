"""From a checkpoint's packed words to the planes of a QTensor and back, a bounded number of columns at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_qgemm.formats import Format, IntFormat, QTensor, int2, int3, int4, int8
from jax_qgemm.formats.layout import TILE_N, round_up

_INT_FORMATS: dict[int, Any] = {2: int2, 3: int3, 4: int4, 8: int8}
INT_BITS = tuple(_INT_FORMATS)
_STEP_ELEMENTS = 1 << 23  # codes that are unpacked at a time, one byte each


def words_for(count: int, bits: int) -> int:
    """int32 words that `count` codes take."""
    return -(-count * bits // 32)


def unpack_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 (..., count) of int32 (..., words): code i of a row is bits [i * bits, (i + 1) * bits) of its words."""
    stream = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return stream[..., :count]
    if bits == 3:  # eight codes in three bytes
        stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 3)])
        triples = stream.reshape(*stream.shape[:-1], -1, 3).astype(np.uint32)
        wide = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        codes = (wide[..., None] >> np.arange(0, 24, 3, dtype=np.uint32)).astype(np.uint8) & 7
    else:
        codes = (stream[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)) & ((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], -1)[..., :count]


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `unpack_words`: int32 (..., words), the last one filled up with zeros."""
    *batch, count = codes.shape
    codes = np.ascontiguousarray(np.pad(codes, [(0, 0)] * len(batch) + [(0, -count % 32)]))
    if bits == 3:
        octets = codes.reshape(*batch, -1, 8).astype(np.uint32)
        wide = (octets << np.arange(0, 24, 3, dtype=np.uint32)).sum(-1, dtype="<u4")
        stream = wide.view(np.uint8).reshape(*wide.shape, 4)[..., :3]
    else:
        parts = codes.reshape(*batch, -1, 8 // bits)
        stream = (parts << np.arange(0, 8, bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
    stream = np.ascontiguousarray(stream.reshape(*batch, -1))
    return stream.view("<i4")[..., : words_for(count, bits)].astype(np.int32)


@functools.partial(jax.jit, static_argnums=1)
def _to_planes(fields: dict[str, jax.Array], format: Format) -> tuple[jax.Array, ...]:
    return format.to_planes(fields)


@jax.jit
def _to_fields(w: QTensor) -> dict[str, jax.Array]:
    return w.fields()


def _rows_per_step(k: int) -> int:
    return max(TILE_N, _STEP_ELEMENTS // max(k, 1) // TILE_N * TILE_N)


def pack_weight(
    format: Format,
    shape: tuple[int, int],
    codes: Callable[[slice], np.ndarray],
    groups: dict[str, np.ndarray],
    *,
    permutation: np.ndarray | None = None,
    global_scale: float | None = None,
) -> QTensor:
    """A QTensor of logical shape (k, n).

    Args:
      shape: (k, n).
      codes: gives the uint8 (rows, k) codes of a slice of n, in logical order.
      groups: the other fields, unsigned integers (n, groups), in packed order.
      permutation: int32 (k,), as in `QTensor`.
    """
    k, n = shape
    step = _rows_per_step(k)
    parts = []
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        part = codes(rows)
        fields = {"codes": part if permutation is None else part[:, permutation]}
        fields |= {name: values[rows] for name, values in groups.items()}
        parts.append(_to_planes(fields, format))
    planes = parts[0] if len(parts) == 1 else tuple(jnp.concatenate(p) for p in zip(*parts, strict=True))
    padding = (round_up(k, format.k_block) - k, round_up(n, TILE_N) - n)
    return QTensor(
        planes,
        format,
        padding,
        permutation=None if permutation is None else jnp.asarray(permutation, jnp.int32),
        global_scale=None if global_scale is None else jnp.float32(global_scale),
    )


def unpack_weight(w: QTensor) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
    """The fields of a (k, n) weight, some rows of n at a time, the codes in logical order."""
    k, n = w.shape
    inverse = None if w.permutation is None else np.argsort(np.asarray(w.permutation))
    step = _rows_per_step(k)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        tiles = slice(start // TILE_N, -(-rows.stop // TILE_N))
        padding = (w.padding[0], -rows.stop % TILE_N)
        part = QTensor(tuple(plane[tiles] for plane in w.planes), w.format, padding)
        fields = {name: np.asarray(values) for name, values in _to_fields(part).items()}
        if inverse is not None:
            fields["codes"] = fields["codes"][:, inverse]
        yield rows, fields


# Integers. In a checkpoint codes are unsigned, as zero points are; int8 is stored in two's complement (IntFormat).


def int_format(bits: int, group_size: int, symmetric: bool, scales: np.ndarray) -> IntFormat:
    return _INT_FORMATS[bits](group_size, symmetric=symmetric, scale_dtype=scales.dtype.name)


def int_format_of(w: QTensor) -> IntFormat:
    assert isinstance(w.format, IntFormat)
    return w.format


def int_weight(
    format: IntFormat,
    shape: tuple[int, int],
    unsigned_codes: Callable[[slice], np.ndarray],
    scales: np.ndarray,
    zero_points: np.ndarray,
    permutation: np.ndarray | None = None,
) -> QTensor:
    """Like `pack_weight`, of unsigned codes, float scales (n, groups) and uint8 zero points (n, groups)."""
    sign = 0x80 if format.bits == 8 else 0
    groups = {"scales": scales.view(np.uint32 if scales.itemsize == 4 else np.uint16)}
    if not format.symmetric:
        groups["zero_points"] = zero_points
    return pack_weight(format, shape, lambda rows: unsigned_codes(rows) ^ sign, groups, permutation=permutation)


def int_fields(w: QTensor) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
    """Like `unpack_weight`: unsigned codes, float scales, and uint8 zero points in every case."""
    format = int_format_of(w)
    for rows, fields in unpack_weight(w):
        if format.bits == 8:
            fields["codes"] = fields["codes"] ^ 0x80
        fields["scales"] = fields["scales"].view(jnp.dtype(format.scale_dtype))
        if format.symmetric:
            fields["zero_points"] = np.full(fields["scales"].shape, 1 << (format.bits - 1), np.uint8)
        yield rows, fields
