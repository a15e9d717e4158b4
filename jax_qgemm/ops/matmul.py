"""The public product: argument checks, and what surrounds the primitives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_qgemm._sharding import varying_alike
from jax_qgemm.formats.qtensor import QTensor
from jax_qgemm.ops import fused_primitive
from jax_qgemm.ops.lowering import FLOAT_DTYPES, KERNELS
from jax_qgemm.ops.matmul_primitive import qmatmul_p
from jax_qgemm.reference import ACTIVATIONS

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


def check_shape(name: str, array: Any, shape: tuple[Any, ...]) -> None:
    """Raises unless `array` is None or a float array of that shape."""
    if array is None:
        return
    check_float(name, array)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {shape}")


def check_weight(w: Any, name: str = "w") -> None:
    """Raises unless w is one (k, n) QTensor."""
    if not isinstance(w, QTensor):
        got = f"an array, {w.dtype}{list(w.shape)}" if hasattr(w, "dtype") else type(w).__name__
        raise TypeError(f"{name} must be a QTensor (see jax_qgemm.quantize and jax_qgemm.io), got {got}")
    if w.ndim != 2:
        raise ValueError(
            f"{name} must be one weight of shape (k, n), got shape {w.shape}: index a stacked weight (w[i]), map over "
            "it with jax.vmap, or scan over it with jax.lax.scan"
        )


def result_dtype(x: jax.Array, out_dtype: Any) -> Any:
    """The type of a result, that of x by default; TypeError for one that the products don't give."""
    try:
        dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    except TypeError:
        dtype = None
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype must be float16, bfloat16 or float32, got {out_dtype!r}")
    return dtype


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
    """``activation(x @ w + bias) + residual`` with a quantized weight.

    Weights are decoded exactly, in registers (by the kernel "dense": rounded once to the type of x, in scratch memory);
    products are summed in float32, and the result is rounded once. Differentiable in x,
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
      kernel: "auto", or one by name: on NVIDIA GPUs "gemv" (up to 64 rows of x, 8 of float32), "gemm_sm80", and on
        Hopper for 16-bit x "gemv_sm90" (up to 64 rows) and "gemm_sm90"; "host" on the CPU; anywhere "dense" (rows of w
        are decoded to the type of x in scratch memory of at most 256 MiB, then XLA's dot), which "auto" takes on GPUs
        for derivatives of 16 and more rows of 16-bit x, and for products of 256 and more that gemm_sm90 does not serve,
        and "reference" (plain jnp over all of w decoded).

    Returns:
      (..., n) of `out_dtype`.

    Raises:
      TypeError: x, bias or residual is not an array of those types, or w not a QTensor.
      ValueError: shapes that do not fit, a stacked w, an unknown activation, precision or kernel, or a kernel that does
        not serve the product or the platform that the function is compiled for.
      RuntimeError: compiled for CUDA by a build without CUDA.
    """
    return product(
        x, w, bias=bias, activation=activation, residual=residual, out_dtype=out_dtype, precision=precision,
        kernel=kernel,
    )  # fmt: skip


def product(
    x: jax.Array,
    w: QTensor,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    precision: Any = None,
    kernel: str = "auto",
    gated: bool = False,
) -> jax.Array:
    """`matmul`, and `gated_matmul` of one QTensor."""
    check_float("x", x)
    check_weight(w)
    k, n = w.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}, but w has shape {w.shape}: expected x of shape (..., {k})")
    out_dtype = result_dtype(x, out_dtype)
    if activation is not None and not (isinstance(activation, str) and activation in ACTIVATIONS):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)} or None, got {activation!r}")
    if not (isinstance(kernel, str) and (kernel == "auto" or kernel in KERNELS)):
        raise ValueError(f"kernel must be 'auto' or one of {', '.join(KERNELS)}, got {kernel!r}")
    check_shape("bias", bias, (n,))
    check_shape("residual", residual, (*x.shape[:-1], n // 2 if gated else n))
    for name, array in (("permutation", w.permutation), ("input_scale", w.input_scale)):
        if array is not None and array.shape != (k,):
            raise ValueError(f"{name} of w has shape {array.shape}, expected {(k,)}")
    scale = None if w.global_scale is None else jnp.asarray(w.global_scale, jnp.float32)
    x = to_packed_order(jnp.asarray(x), w)
    x, bias, residual, scale, *planes = varying_alike(x, bias, residual, scale, *w.planes)
    params = {
        "format": w.format,
        "padding": w.padding,
        "batch_ndim": 0,
        "out_dtype": out_dtype.name,
        "highest": _is_highest(precision),
        "kernel": kernel,
    }
    if not gated and activation is None and scale is None and bias is None and residual is None:
        return qmatmul_p.bind(x, *planes, **params, transpose=False)
    return fused_primitive.bind(x, planes, scale, bias, residual, **params, activation=activation, gated=gated)


def to_packed_order(x: jax.Array, w: QTensor) -> jax.Array:
    """x as the packed weight wants it: its last axis permuted, then divided by the input scale."""
    if w.permutation is not None:
        x = jnp.take(x, w.permutation, axis=-1)
    if w.input_scale is not None:
        x = (x.astype(jnp.float32) / w.input_scale.astype(jnp.float32)).astype(x.dtype)
    return x
