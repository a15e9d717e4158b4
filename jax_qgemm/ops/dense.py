"""The product by way of a dense matrix: rows of the weight decoded to scratch memory, then XLA's dot.

For so many rows of x that decoding costs little beside the product.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_qgemm._registration import DEQUANTIZE_TARGET
from jax_qgemm.formats.format import Format
from jax_qgemm.formats.layout import TILE_N, round_up
from jax_qgemm.ops.lowering import weight_attributes, weight_shape
from jax_qgemm.ops.stack import select, split

SCRATCH_BYTES = 256 << 20
"""Of one decoded slab: a dense matrix beyond this is decoded and multiplied in several."""

dequantize_p = Primitive("dequantize")
"""Operands: planes and perhaps experts as of `qmatmul_p`. Result: (*batch, rows, k), rows [first, first + rows) of n,
decoded in float32 and rounded once.

Parameters: format, padding, has_experts and batch_ndim as in `qmatmul_p`; first, a multiple of 16; rows; dtype, by
name.
"""


@dequantize_p.def_abstract_eval
def _abstract_eval(*weights, format, padding, has_experts, batch_ndim, first, rows, dtype):
    planes, experts = split(weights, has_experts)
    k, _ = weight_shape(planes, format, padding)
    batch = planes[0].shape[:batch_ndim] if experts is None else experts.shape
    return planes[0].update(shape=(*batch, rows, k), dtype=jnp.dtype(dtype), weak_type=False)


def _reference(*weights, format, padding, has_experts, batch_ndim, first, rows, dtype):
    planes, experts = split(weights, has_experts)
    k, _ = weight_shape(planes, format, padding)
    tiles = first // TILE_N, -(-(first + rows) // TILE_N)
    axis = batch_ndim if experts is None else 1
    slab = select(tuple(lax.slice_in_dim(plane, *tiles, axis=axis) for plane in planes), experts)
    return format.decode(format.from_planes(slab, rows, k)).astype(dtype)


def _lower_cuda(ctx, *weights, format, padding, has_experts, batch_ndim, first, rows, dtype):
    del has_experts, rows, dtype  # of the operands and the result
    return jax.ffi.ffi_lowering(DEQUANTIZE_TARGET)(
        ctx,
        *weights,
        **weight_attributes(format),
        batch_ndim=np.int64(batch_ndim),
        n=np.int64(weight_shape(ctx.avals_in, format, padding)[1]),
        first=np.int64(first),
    )


mlir.register_lowering(dequantize_p, mlir.lower_fun(_reference, multiple_results=False))
mlir.register_lowering(dequantize_p, _lower_cuda, platform="cuda")


def product(x: jax.Array, *weights: jax.Array, format: Format, padding: tuple[int, int], **params: Any) -> jax.Array:
    """What `qmatmul_p` computes; the weight is rounded to the type of x."""
    batch_ndim, transpose, has_experts = (params[name] for name in ("batch_ndim", "transpose", "has_experts"))
    k, n = weight_shape(weights, format, padding)
    row_bytes = math.prod(x.shape[:batch_ndim]) * k * x.dtype.itemsize
    slab = max(TILE_N, SCRATCH_BYTES // max(row_bytes, 1) // TILE_N * TILE_N)
    # Slabs of about the same size.
    slab = round_up(-(-n // max(1, -(-n // slab))), TILE_N) if n else TILE_N
    batch = tuple(range(batch_ndim))

    def multiply(x: jax.Array, first: int, rows: int) -> jax.Array:
        dense = dequantize_p.bind(
            *weights, format=format, padding=padding, has_experts=has_experts, batch_ndim=batch_ndim, first=first,
            rows=rows, dtype=x.dtype.name,
        )  # fmt: skip
        contract = batch_ndim if transpose else batch_ndim + 1
        return lax.dot_general(
            x,
            dense,
            (((x.ndim - 1,), (contract,)), (batch, batch)),
            precision=lax.Precision.HIGHEST if params["highest"] else None,
            preferred_element_type=jnp.float32,
        )

    slabs = [(first, min(slab, n - first)) for first in range(0, n, slab)] or [(0, 0)]
    if transpose:
        parts = [multiply(lax.slice_in_dim(x, i, i + rows, axis=x.ndim - 1), i, rows) for i, rows in slabs]
        out = sum(parts[1:], parts[0])
    else:
        out = lax.concatenate([multiply(x, first, rows) for first, rows in slabs], x.ndim - 1)
    return out.astype(params["out_dtype"])
