"""Rows of a quantized embedding table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_qgemm.formats.qtensor import QTensor
from jax_qgemm.ops.lowering import FLOAT_DTYPES
from jax_qgemm.ops.matmul import check_weight


def take(w: QTensor, indices: Any, *, dtype: Any = jnp.float32) -> jax.Array:
    """``w[:, indices].T``: rows of a table of n embeddings of k features, decoding those rows alone.

    The same QTensor serves as the tied output projection, ``matmul(x, w)``.

    Args:
      w: a QTensor of shape (k, n).
      indices: integers (...,), in [-n, n); negative ones count from the end.
      dtype: float16, bfloat16 or float32.

    Returns:
      (..., k) of `dtype`: the elements of `w.dequantize()`. NaN for an index out of range, as `jnp.take` gives.

    Raises:
      TypeError: w is not a QTensor, indices are not integers, or another dtype.
      ValueError: w is stacked.
    """
    check_weight(w)
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    dtype = jnp.dtype(dtype)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    k, n = w.shape
    info = jnp.iinfo(indices.dtype)
    if info.max > jnp.iinfo(jnp.int32).max:
        indices = jnp.clip(indices, max(info.min, -n - 1), n)  # what is out of range must stay so in int32
    rows = indices.astype(jnp.int32)
    rows = jnp.where(rows < 0, rows + n, rows)
    valid = (rows >= 0) & (rows < n)
    planes = tuple(jnp.asarray(plane) for plane in w.planes)  # NumPy arrays take no traced indices
    fields = w.format.take_rows(planes, jnp.where(valid, rows, 0), k)
    values = w.to_logical(w.format.decode(fields))
    return jnp.where(valid[..., None], values, jnp.nan).astype(dtype)
