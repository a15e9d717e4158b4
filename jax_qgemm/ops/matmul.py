"""The public product: argument checks, what surrounds the core primitive, and the epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_qgemm.formats.qtensor import QTensor
from jax_qgemm.ops.matmul_primitive import FLOAT_DTYPES, KERNELS, qmatmul_p

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda v: jax.nn.gelu(v, approximate=False),
    "gelu_tanh": lambda v: jax.nn.gelu(v, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""Nonlinearities that `matmul(activation=...)` takes by name; "gelu" is the exact one."""

_PRECISIONS = {
    None: None,
    "default": lax.Precision.DEFAULT,
    "high": lax.Precision.HIGH,
    "highest": lax.Precision.HIGHEST,
    "float32": lax.Precision.HIGHEST,
    "tensorfloat32": lax.Precision.HIGH,
}


def _is_highest(precision: Any) -> bool:
    if precision is None:
        # What jax.default_matmul_precision sets; a value that names an algorithm asks for nothing of ours.
        precision = _PRECISIONS.get(jax.config.jax_default_matmul_precision)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(precision, str) and precision in _PRECISIONS:
        precision = _PRECISIONS[precision]
    if precision is not None and not isinstance(precision, lax.Precision):
        names = ", ".join(repr(p) for p in _PRECISIONS)
        raise ValueError(f"precision must be a jax.lax.Precision or one of {names}, got {precision!r}")
    return precision is lax.Precision.HIGHEST


def check_float(name: str, array: Any) -> None:
    """Raises TypeError unless `array` is a float16, bfloat16 or float32 array."""
    dtype = getattr(array, "dtype", None)
    if dtype is None or not hasattr(array, "shape"):
        raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {dtype}")


def check_weight(w: Any) -> None:
    """Raises unless w is one (k, n) QTensor."""
    if not isinstance(w, QTensor):
        got = f"an array, {w.dtype}{list(w.shape)}" if hasattr(w, "dtype") else type(w).__name__
        raise TypeError(f"w must be a QTensor (see jax_qgemm.quantize and jax_qgemm.io), got {got}")
    if w.ndim != 2:
        raise ValueError(
            f"w must be one weight of shape (k, n), got shape {w.shape}: index a stacked weight (w[i]), map over it "
            "with jax.vmap, or scan over it with jax.lax.scan"
        )


def matmul(
    x: jax.Array,
    w: QTensor,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    precision: Any = None,
    kernel: str = "auto",
) -> jax.Array:
    """``activation(x @ w + bias) + residual`` with a quantized weight that is never expanded to floats in memory.

    Weights are decoded exactly, products are summed in float32, and the result is rounded once. Differentiable in x,
    bias and residual, forward and reverse; the weight gets no gradient.

    Args:
      x: float16, bfloat16 or float32 (..., k).
      w: a QTensor of shape (k, n). A stacked weight (*batch, k, n) is indexed, mapped or scanned over.
      bias: (n,), or None.
      activation: "gelu" (exact), "gelu_tanh", "relu", "silu", or None.
      residual: (..., n), or None.
      out_dtype: float16, bfloat16 or float32; the type of x by default.
      precision: of float32 x. None, DEFAULT and HIGH multiply in TF32-class precision, HIGHEST in full float32; None
        follows `jax.default_matmul_precision`. (On the CPU every product is full float32.)
      kernel: "auto", or one by name: "gemv" (up to 8 rows of x) and "gemm_sm80" on NVIDIA GPUs, "host" on the CPU,
        "reference" (plain jnp) anywhere.

    Returns:
      (..., n) of `out_dtype`.

    Raises:
      TypeError: x, bias or residual is not an array of those types, or w not a QTensor.
      ValueError: shapes that do not fit, a stacked w, an unknown activation, precision or kernel, or a kernel that does
        not serve the product or the platform that the function is compiled for.
      RuntimeError: compiled for CUDA by a build without CUDA.
    """
    check_float("x", x)
    check_weight(w)
    k, n = w.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}, but w has shape {w.shape}: expected x of shape (..., {k})")
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype must be float16, bfloat16 or float32, got {out_dtype}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)} or None, got {activation!r}")
    if kernel != "auto" and kernel not in KERNELS:
        raise ValueError(f"kernel must be 'auto' or one of {', '.join(KERNELS)}, got {kernel!r}")
    for name, array, shape in (("bias", bias, (n,)), ("residual", residual, (*x.shape[:-1], n))):
        if array is not None:
            check_float(name, array)
            if array.shape != shape:
                raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {shape}")
    plain = bias is None and activation is None and residual is None and w.global_scale is None
    out = qmatmul_p.bind(
        to_packed_order(jnp.asarray(x), w),
        *w.planes,
        format=w.format,
        padding=w.padding,
        batch_ndim=0,
        transpose=False,
        out_dtype=(out_dtype if plain else jnp.dtype("float32")).name,
        highest=_is_highest(precision),
        kernel=kernel,
    )
    if w.global_scale is not None:
        out = out * w.global_scale.astype(jnp.float32)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    if activation is not None:
        out = ACTIVATIONS[activation](out)
    if residual is not None:
        out = out + residual.astype(jnp.float32)
    return out.astype(out_dtype)


def to_packed_order(x: jax.Array, w: QTensor) -> jax.Array:
    """x as the packed weight wants it: its last axis permuted, then divided by the input scale."""
    if w.permutation is not None:
        x = jnp.take(x, w.permutation, axis=-1)
    if w.input_scale is not None:
        x = (x.astype(jnp.float32) / w.input_scale.astype(jnp.float32)).astype(x.dtype)
    return x
