"""Products of codes with codes: a weight decoded to the type in which its codes are exact, then XLA's dot.

    out = x_scale * sum over the groups of k of  w_scale * sum over the group of x_code * (qvalue - zero_point)

The inner sums are int32 for int8 activations, and exact; for fp8 activations the products are exact and summed in
float32. No matrix of decoded weights is larger than a slab.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_qgemm.formats.integer import IntFormat
from jax_qgemm.formats.layout import TILE_N
from jax_qgemm.ops.dense import SCRATCH_BYTES
from jax_qgemm.ops.lowering import weight_shape

ROWS_UNKNOWN = 4096
"""Rows of x that the size of a slab is for where their number is not known, in an exported function."""


def largest_k(format: IntFormat) -> int:
    """Elements of k whose products with int8 codes an int32 is sure to hold."""
    return (1 << 31) // (127 * (1 << format.bits)) - 1


def sums(
    codes: jax.Array, *planes: jax.Array, format: IntFormat, padding: tuple[int, int], batch_ndim: int
) -> jax.Array:
    """float32 sums over k of codes times decoded weights, without the scales of x.

    Args:
      codes: int8 or float8_e4m3fn (*batch, ..., k).
      planes: of one weight, (*batch, n/16, k/k_block, payload).

    Returns:
      (*batch, ..., n).
    """
    k, n = weight_shape(planes, format, padding)
    # Padded codes of x are zeros: those of w may then stay.
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding[0])])
    k += padding[0]
    if k == 0 or n == 0:
        return jnp.zeros((*codes.shape[:-1], n), jnp.float32)
    groups = k // format.group if format.group else 1
    codes = codes.reshape(*codes.shape[:-1], groups, k // groups)
    tiles = planes[0].shape[batch_ndim]
    slab = min(tiles, _slab_tiles(codes, batch_ndim))

    def multiply(first: Any) -> jax.Array:
        parts = tuple(lax.dynamic_slice_in_dim(plane, first, slab, axis=batch_ndim) for plane in planes)
        return _slab(codes, format, format.from_planes(parts, slab * TILE_N, k), batch_ndim)

    def step(i: Any, out: jax.Array) -> jax.Array:
        # The last slab begins where it ends with w: some of its columns are computed twice.
        first = jnp.minimum(i * slab, tiles - slab)
        return lax.dynamic_update_slice_in_dim(out, multiply(first), first * TILE_N, axis=out.ndim - 1)

    out = multiply(0)
    if slab < tiles:
        # Padded, not put into zeros: it lies on the devices as x does.
        out = jnp.pad(out, [(0, 0)] * (out.ndim - 1) + [(0, (tiles - slab) * TILE_N)])
        out = lax.fori_loop(1, -(-tiles // slab), step, out)
    return lax.slice_in_dim(out, 0, n, axis=out.ndim - 1)


def _slab_tiles(codes: jax.Array, batch_ndim: int) -> int:
    """Tile rows of w whose decoded codes and whose sums of groups fit into the scratch memory."""
    *rows, groups, size = codes.shape
    weights, count = math.prod(rows[:batch_ndim]), math.prod(rows)
    if not (isinstance(weights, int) and isinstance(count, int)):
        weights, count = 1, ROWS_UNKNOWN
    level_bytes = 1 if codes.dtype == jnp.int8 else 2
    column_bytes = groups * (size * level_bytes * weights + 4 * count)
    return max(1, SCRATCH_BYTES // max(column_bytes * TILE_N, 1))


def _slab(codes: jax.Array, format: IntFormat, fields: dict[str, jax.Array], batch_ndim: int) -> jax.Array:
    """Sums of grouped codes (*batch, ..., groups, size) with the columns that the fields (*batch, n, ...) hold."""
    groups, size = codes.shape[-2:]
    is_int8 = codes.dtype == jnp.int8
    scale, zero_point = format.scale(fields), format.zero_point(fields)
    levels = format.qvalue(fields["codes"])
    levels = levels.reshape(*levels.shape[:-1], groups, size)
    if zero_point is not None and format.bits == 4:
        levels, zero_point = levels - zero_point[..., None], None  # at most 15 in magnitude
    # Every float8_e4m3fn is a bfloat16, and so is every level of 4 bits.
    levels, codes = (v.astype(jnp.int8 if is_int8 else jnp.bfloat16) for v in (levels, codes))
    batch = tuple(range(batch_ndim))
    exact = lax.dot_general(
        codes,
        levels,
        (((codes.ndim - 1,), (batch_ndim + 2,)), ((*batch, codes.ndim - 2), (*batch, batch_ndim + 1))),
        preferred_element_type=jnp.int32 if is_int8 else jnp.float32,
    )  # (*batch, groups, ..., n)

    def per_column(values: jax.Array) -> jax.Array:
        """(*batch, n, groups) -> (*batch, groups, 1..., n)."""
        values = jnp.swapaxes(values, -1, -2)
        ones = (1,) * (exact.ndim - values.ndim)
        return values.reshape(*values.shape[:-1], *ones, values.shape[-1])

    if zero_point is not None:
        code_sums = jnp.sum(codes, axis=-1, dtype=jnp.int32)  # (*batch, ..., groups)
        exact = exact - jnp.moveaxis(code_sums, -1, batch_ndim)[..., None] * per_column(zero_point)
    return jnp.sum(exact.astype(jnp.float32) * per_column(scale), axis=batch_ndim)
