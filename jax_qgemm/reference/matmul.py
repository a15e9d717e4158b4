from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def matmul(x: jax.Array, rows: jax.Array, *, batch_ndim: int, transpose: bool, out_dtype: str) -> jax.Array:
    """The product with a decoded weight, in float32.

    Args:
      x: (*batch, ..., k), or (*batch, ..., n) if `transpose`.
      rows: float32 (*batch, n, k), the transpose of the logical weight.
      batch_ndim: number of leading axes that x and the weight share.
      transpose: multiply by the transpose of the logical weight.

    Returns:
      (*batch, ..., n), or (*batch, ..., k) if `transpose`, rounded once to `out_dtype`.
    """
    batch = tuple(range(batch_ndim))
    contract = batch_ndim if transpose else batch_ndim + 1
    out = lax.dot_general(
        x.astype(jnp.float32),
        rows,
        (((x.ndim - 1,), (contract,)), (batch, batch)),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return out.astype(out_dtype)
