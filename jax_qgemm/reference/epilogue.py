from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_qgemm.formats.layout import TILE_N

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda v: jax.nn.gelu(v, approximate=False),
    "gelu_tanh": lambda v: jax.nn.gelu(v, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""Nonlinearities that the products take by name; "gelu" is the exact one."""


def epilogue(
    sums: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    batch_ndim: int,
    activation: str | None,
    gated: bool,
    out_dtype: str,
) -> jax.Array:
    """``activation(scale * sums + bias) + residual`` in float32, rounded once.

    Args:
      sums: float32 (*batch, ..., n).
      scale: float32 () or (*batch,), or None.
      bias: (n,) or (*batch, n), or None.
      residual: of the shape of the result, or None.
      batch_ndim: number of axes of `batch`.
      gated: n is 16 columns of a gate and 16 of what it opens, in turn: ``activation(gate) * up + residual``.

    Returns:
      (*batch, ..., n), or (*batch, ..., n/2) if `gated`, of `out_dtype`.
    """

    def spread(array: jax.Array, ndim: int) -> jax.Array:
        """With axes of 1 behind the batch axes, if it has them: `ndim` of its axes are no batch axes."""
        if array.ndim == ndim:
            return array
        ones = (1,) * (sums.ndim - batch_ndim - ndim)
        return array.reshape(*array.shape[:batch_ndim], *ones, *array.shape[batch_ndim:])

    if scale is not None:
        sums = sums * spread(scale, 0)
    if bias is not None:
        sums = sums + spread(bias.astype(jnp.float32), 1)
    activate = ACTIVATIONS[activation] if activation is not None else lambda v: v
    if gated:
        *rows, n = sums.shape
        tiles = sums.reshape(*rows, n // (2 * TILE_N), 2, TILE_N)
        gate, up = (tiles[..., i, :].reshape(*rows, n // 2) for i in range(2))
        out = activate(gate) * up
    else:
        out = activate(sums)
    if residual is not None:
        out = out + residual.astype(jnp.float32)
    return out.astype(out_dtype)
