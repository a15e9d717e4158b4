"""The product with weights that are chosen by index: the experts of a mixture."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_qgemm.formats.qtensor import QTensor
from jax_qgemm.ops.matmul import (
    bind,
    check_float,
    check_metadata,
    check_names,
    check_qtensor,
    check_shape,
    result_dtype,
)


def expert_matmul(
    x: jax.Array,
    w: QTensor,
    experts: Any,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    out_dtype: Any = None,
    precision: Any = None,
    kernel: str = "auto",
) -> jax.Array:
    """``activation(x[i] @ w[experts[i]] + bias[experts[i]])`` for every index i of `experts`, in one kernel.

    For the experts of a mixture. Weights are read where they lie in the stack: none is copied. Each entry of `experts`
    reads its weight anew, from the cache if another has just done so.

    With top-k routing, `experts` is (tokens, top_k), as `jax.lax.top_k` gives it:

        up = expert_matmul(x[:, None], w_up, experts, activation="silu")  # x (tokens, k): (tokens, top_k, n)
        down = expert_matmul(up, w_down, experts)  # a row of its own for each token and expert

    For many tokens, sort them by expert and cut them into blocks of rows that share one: experts (blocks,), x (blocks,
    rows, k).

    Sums are float32 and the result is rounded once. Differentiable in x and bias, forward and reverse; the weight gets
    no gradient.

    Args:
      x: float16, bfloat16 or float32 (*lead, ..., k), `lead` being the shape of `experts`; what lies between are rows
        that share an expert. An axis of `lead` may be 1: those rows go to all experts along it.
      w: a QTensor (e, k, n), a stack of e weights.
      experts: integers (*lead), in [0, e). One out of range is the nearest in range, as in JAX's "clip" mode: negative
        ones do not count from the end.
      bias: (e, n), or None.
      activation: see `matmul`.
      out_dtype: float16, bfloat16 or float32; the type of x by default.
      precision: see `matmul`.
      kernel: see `matmul`. What it says of rows of x is about those that share one entry of `experts`.

    Returns:
      (*lead, ..., n) of `out_dtype`.

    Raises:
      TypeError: x or bias is not an array of those types, w not a QTensor, or experts are not integers.
      ValueError: as `matmul` does; w is not a stack of one axis, or an empty one; or experts do not fit x.
      RuntimeError: as `matmul` does.
    """
    check_float("x", x)
    check_qtensor(w)
    if w.ndim != 3 or w.shape[0] == 0:
        raise ValueError(f"w must be a stack of weights of shape (e, k, n), e at least 1, got shape {w.shape}")
    count, k, n = w.shape
    experts = _indices(experts, count)
    lead = experts.shape
    x_lead = tuple(x.shape[: len(lead)])
    fits = len(x_lead) == len(lead) and all(size in (1, of) for size, of in zip(x_lead, lead, strict=True))
    if not fits or x.ndim == len(lead) or x.shape[-1] != k:
        expected = ", ".join(map(str, (*lead, "...", k)))
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but experts has shape {lead} and w has shape {w.shape}: expected x of "
            f"shape ({expected})"
        )
    out_dtype = result_dtype(x, out_dtype)
    check_names(activation, kernel)
    check_shape("bias", bias, (count, n))
    check_metadata(w)

    def chosen(array: Any) -> Any:
        """Of each entry, out of one for each weight."""
        return None if array is None else jnp.take(jnp.asarray(array), experts, axis=0, mode="clip")

    x = jnp.broadcast_to(x, (*lead, *x.shape[len(lead) :]))
    rows = (1,) * (x.ndim - 1 - len(lead))
    if w.permutation is not None:
        x = jnp.take_along_axis(x, chosen(w.permutation).reshape(*lead, *rows, k), axis=-1)
    if w.input_scale is not None:
        factors = chosen(w.input_scale).astype(jnp.float32).reshape(*lead, *rows, k)
        x = (x.astype(jnp.float32) / factors).astype(x.dtype)
    scale = None if w.global_scale is None else chosen(w.global_scale).astype(jnp.float32)
    return bind(
        x, w, experts, scale, chosen(bias), None, out_dtype=out_dtype, precision=precision, kernel=kernel,
        activation=activation, gated=False,
    )  # fmt: skip


def _indices(experts: Any, count: int) -> jax.Array:
    """As int32, what is out of range still out of range."""
    dtype = getattr(experts, "dtype", None)
    if dtype is None or not hasattr(experts, "shape"):
        raise TypeError(f"experts must be an array of integers, got {type(experts).__name__}")
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"experts must be integers, got {dtype}")
    if jnp.iinfo(dtype).max > jnp.iinfo(jnp.int32).max:
        clip = jnp.clip if isinstance(experts, jax.Array) else np.clip  # jnp would cut a NumPy array to 32 bits first
        experts = clip(experts, 0, count - 1)
    return jnp.asarray(experts, jnp.int32)
