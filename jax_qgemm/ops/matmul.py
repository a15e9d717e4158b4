"""The public product: argument checks, and what surrounds the primitives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_qgemm._sharding import varying_alike
from jax_qgemm.formats.activations import QActivations
from jax_qgemm.formats.qtensor import QTensor
from jax_qgemm.ops import fused_primitive, integer_matmul
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


def check_qtensor(w: Any, name: str = "w") -> None:
    """Raises TypeError unless w is a QTensor."""
    if not isinstance(w, QTensor):
        got = f"an array, {w.dtype}{list(w.shape)}" if hasattr(w, "dtype") else type(w).__name__
        raise TypeError(f"{name} must be a QTensor (see jax_qgemm.quantize and jax_qgemm.io), got {got}")


def check_weight(w: Any, name: str = "w") -> None:
    """Raises unless w is one (k, n) QTensor."""
    check_qtensor(w, name)
    if w.ndim != 2:
        raise ValueError(
            f"{name} must be one weight of shape (k, n), got shape {w.shape}: index a stacked weight (w[i]), map over "
            "it with jax.vmap, scan over it with jax.lax.scan, or choose from it with jax_qgemm.expert_matmul"
        )


def check_metadata(w: QTensor) -> None:
    """Raises unless w's permutation and input_scale have the shape (*batch, k) and its global_scale (*batch,)."""
    *batch, k, _ = w.shape
    shapes = {"permutation": (*batch, k), "input_scale": (*batch, k), "global_scale": tuple(batch)}
    for name, shape in shapes.items():
        array = getattr(w, name)
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"{name} of w has shape {jnp.shape(array)}, expected {shape}")


def check_names(activation: Any, kernel: Any) -> None:
    """Raises ValueError unless they name an activation, or None, and a kernel or "auto"."""
    if activation is not None and not (isinstance(activation, str) and activation in ACTIVATIONS):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)} or None, got {activation!r}")
    if not (isinstance(kernel, str) and (kernel == "auto" or kernel in KERNELS)):
        raise ValueError(f"kernel must be 'auto' or one of {', '.join(KERNELS)}, got {kernel!r}")


def result_dtype(x: jax.Array | QActivations, out_dtype: Any) -> Any:
    """The type of a result, that of x by default; TypeError for one that the products don't give."""
    try:
        dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    except TypeError:
        dtype = None
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype must be float16, bfloat16 or float32, got {out_dtype!r}")
    return dtype


def matmul(
    x: jax.Array | QActivations,
    w: QTensor,
    *,
    x_format: str | None = None,
    straight_through: bool = False,
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

    With x quantized to 8 bits, by `x_format` or beforehand, the codes of x and w are multiplied as they are, for int4
    and int8 weights in groups of 64 and more or per channel. With "int8" their products are summed exactly, as
    integers, per group of w; with "fp8", for int4 weights, the products are exact and their sums float32. (On the CPU
    "auto" sums both in float32.) The scales come on top in float32. Such x is not differentiable unless
    `straight_through`.

    Args:
      x: float16, bfloat16 or float32 (..., k); or `QActivations` of that shape in "int8" or "fp8", which several
        products may share.
      w: a QTensor of shape (k, n). A stacked weight (*batch, k, n) is indexed, mapped or scanned over.
      x_format: None, or how x is quantized first, per token: "int8" or "fp8" (see `quantize_activations`). The input
        scale of w is applied before, unrounded. Under `jax.jit` products that quantize one x alike do it once.
      straight_through: differentiate as if x were not quantized (straight-through estimator).
      bias: (n,), or None.
      activation: "gelu" (exact), "gelu_tanh", "relu", "silu", or None.
      residual: (..., n), or None.
      out_dtype: float16, bfloat16 or float32; the type of x by default.
      precision: of float32 x. None, DEFAULT and HIGH multiply in TF32-class precision, HIGHEST in full float32; None
        follows `jax.default_matmul_precision`. (On the CPU every product is full float32.) With quantized x it is the
        derivative's.
      kernel: "auto", or one by name: on NVIDIA GPUs "gemv" (up to 64 rows of x, 8 of float32), "gemm_sm80", and on
        Hopper for 16-bit x "gemv_sm90" (up to 64 rows) and "gemm_sm90"; "host" on the CPU; anywhere "dense" (rows of w
        are decoded to the type of x in scratch memory of at most 256 MiB, then XLA's dot), which "auto" takes on GPUs
        for derivatives of 16 and more rows of 16-bit x, and for products of 256 and more that gemm_sm90 does not serve,
        and "reference" (plain jnp over all of w decoded). Quantized x has "gemm_sm90_a8" on Hopper, which "auto" takes
        there for k a multiple of 16, weights without 8-bit zero points, and groups with 16-bit scales; "dense" (codes
        of w in scratch memory, then XLA's integer or bfloat16 dot), which it takes on GPUs for the rest; "host" (codes
        of x as float32), and "reference".

    Returns:
      (..., n) of `out_dtype`.

    Raises:
      TypeError: x, bias or residual is not an array of those types, or w not a QTensor; quantized x is differentiated.
      ValueError: shapes that do not fit, a stacked w, an unknown x_format, activation, precision or kernel, a kernel
        that does not serve the product or the platform that the function is compiled for, a w that quantized x can't
        be multiplied with, or quantized x where w has an input scale.
      RuntimeError: compiled for CUDA by a build without CUDA.
    """
    return product(
        x, w, x_format=x_format, straight_through=straight_through, bias=bias, activation=activation, residual=residual,
        out_dtype=out_dtype, precision=precision, kernel=kernel,
    )  # fmt: skip


def product(
    x: jax.Array | QActivations,
    w: QTensor,
    *,
    x_format: str | None = None,
    straight_through: bool = False,
    bias: jax.Array | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    precision: Any = None,
    kernel: str = "auto",
    gated: bool = False,
) -> jax.Array:
    """`matmul`, and `gated_matmul` of one QTensor."""
    if isinstance(x, QActivations):
        x.check("x")
    else:
        check_float("x", x)
    check_weight(w)
    k, n = w.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}, but w has shape {w.shape}: expected x of shape (..., {k})")
    out_dtype = result_dtype(x, out_dtype)
    check_names(activation, kernel)
    check_shape("bias", bias, (n,))
    check_shape("residual", residual, (*x.shape[:-1], n // 2 if gated else n))
    check_metadata(w)
    scale = None if w.global_scale is None else jnp.asarray(w.global_scale, jnp.float32)
    if isinstance(x, QActivations) or x_format is not None:
        return integer_matmul.product(
            x, w, (scale, bias, residual), x_format=x_format, straight_through=straight_through, kernel=kernel,
            highest=_is_highest(precision), out_dtype=out_dtype.name, activation=activation, gated=gated,
        )  # fmt: skip
    if straight_through:
        raise ValueError("straight_through=True needs quantized activations: x_format must be given, got None")
    x = to_packed_order(jnp.asarray(x), w)
    return bind(
        x, w, None, scale, bias, residual, out_dtype=out_dtype, precision=precision, kernel=kernel,
        activation=activation, gated=gated,
    )  # fmt: skip


def bind(
    x: jax.Array, w: QTensor, experts: Any, scale: Any, bias: Any, residual: Any, *, out_dtype: Any, precision: Any,
    kernel: str, activation: str | None, gated: bool,
) -> jax.Array:  # fmt: skip
    """The primitive that does no more than is asked for, of checked operands. Experts have the axes of the batch."""
    x, experts, bias, residual, scale, *weights = varying_alike(x, experts, bias, residual, scale, *w.planes)
    if experts is not None:
        weights.append(experts)
    params = {
        "format": w.format,
        "padding": w.padding,
        "has_experts": experts is not None,
        "batch_ndim": 0 if experts is None else experts.ndim,
        "out_dtype": out_dtype.name,
        "highest": _is_highest(precision),
        "kernel": kernel,
    }
    if not gated and activation is None and scale is None and bias is None and residual is None:
        return qmatmul_p.bind(x, *weights, **params, transpose=False)
    return fused_primitive.bind(x, weights, scale, bias, residual, **params, activation=activation, gated=gated)


def to_packed_order(x: jax.Array, w: QTensor) -> jax.Array:
    """x as the packed weight wants it: its last axis permuted, then divided by the input scale."""
    return integer_matmul.packed_order(x, w.permutation, w.input_scale).astype(x.dtype)
