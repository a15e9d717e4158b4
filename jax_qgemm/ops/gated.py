"""The gated product of a transformer's feed-forward layer, and the weight that holds both of its halves."""

from __future__ import annotations

import functools
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_qgemm.formats.activations import QActivations
from jax_qgemm.formats.layout import TILE_N
from jax_qgemm.formats.qtensor import QTensor
from jax_qgemm.ops.lowering import FLOAT_DTYPES
from jax_qgemm.ops.matmul import check_shape, check_weight, product, result_dtype


@overload
def interleave_gate_up(gate: QTensor, up: QTensor) -> QTensor: ...
@overload
def interleave_gate_up(gate: Any, up: Any) -> jax.Array: ...
def interleave_gate_up(gate: Any, up: Any) -> Any:
    """The columns of both in turn, 16 of the gate and 16 of what it opens: what `gated_matmul` takes.

    The packed tiles are moved as they are, nothing is decoded. A tile of the gate and its partner stay neighbours, so
    that halves of n, on two devices for example, are again interleaved weights.

    Args:
      gate: a QTensor (*batch, k, n), or a float array (..., n) such as a bias. n is a multiple of 16.
      up: the same, of the same format, shape and type.

    Returns:
      A QTensor (*batch, k, 2n), whose `dequantize()` is the interleaved matrix; or an array (..., 2n).

    Raises:
      TypeError: not two QTensors or two float arrays.
      ValueError: the two differ in format, shape or type, or in their permutation or input_scale (under a
        transformation these must be one array); n is not a multiple of 16; or one has a global_scale. `gated_matmul`
        takes such a pair as a tuple.
    """
    if isinstance(gate, QTensor) and isinstance(up, QTensor):
        return _interleave_weights(gate, up)
    return _interleave_arrays(gate, up)


def _interleave_weights(gate: QTensor, up: QTensor) -> QTensor:
    for name in ("format", "shape"):
        a, b = getattr(gate, name), getattr(up, name)
        if a != b:
            raise ValueError(f"gate and up must have the same {name}, got {a} and {b}")
    for name in ("permutation", "input_scale"):
        if not _same(getattr(gate, name), getattr(up, name)):
            raise ValueError(
                f"gate and up must have the same {name} (under a transformation, the same array) or both none; "
                "gated_matmul takes them as a tuple"
            )
    if gate.global_scale is not None or up.global_scale is not None:
        raise ValueError("gate and up must have no global_scale: an interleaved weight has room for one only")
    _check_columns(gate.shape[-1])
    planes = tuple(_interleave(a, b, -3) for a, b in zip(gate.planes, up.planes, strict=True))
    return QTensor(planes, gate.format, gate.padding, permutation=gate.permutation, input_scale=gate.input_scale)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if a is None or b is None or isinstance(a, Tracer) or isinstance(b, Tracer):
        return False
    return np.array_equal(a, b)


def _interleave_arrays(gate: Any, up: Any) -> jax.Array:
    for name, half in (("gate", gate), ("up", up)):
        dtype = getattr(half, "dtype", None)
        if dtype not in FLOAT_DTYPES:
            got = dtype or type(half).__name__
            raise TypeError(f"gate and up must be two QTensors or two float arrays, got {got} for {name}")
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.ndim == 0:
        raise ValueError(
            f"gate and up must have the same shape (..., n) and type, got {gate.dtype}{list(gate.shape)} and "
            f"{up.dtype}{list(up.shape)}"
        )
    *rows, n = gate.shape
    _check_columns(n)
    tiles = [jnp.reshape(half, (*rows, n // TILE_N, TILE_N)) for half in (gate, up)]
    return _interleave(*tiles, -2).reshape(*rows, 2 * n)


def _check_columns(n: int) -> None:
    if n % TILE_N:
        raise ValueError(f"gate and up have n = {n}, but only multiples of {TILE_N} can be interleaved")


@functools.partial(jax.jit, static_argnums=2)
def _interleave(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """a[0], b[0], a[1], b[1] and so on along an axis, counted from the last."""
    both = jnp.stack([a, b], axis)
    return both.reshape(*a.shape[:axis], 2 * a.shape[axis], *a.shape[axis + 1 :])


def gated_matmul(
    x: jax.Array | QActivations,
    w: QTensor | tuple[QTensor, QTensor],
    *,
    activation: str | None = "silu",
    x_format: str | None = None,
    straight_through: bool = False,
    bias: Any = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    precision: Any = None,
    kernel: str = "auto",
) -> jax.Array:
    """``activation(x @ w_gate + bias_gate) * (x @ w_up + bias_up) + residual``, as SwiGLU and GeGLU have it.

    One weight that holds both halves is read in one pass, and what the two products give is never written. (Shazeer,
    "GLU Variants Improve Transformer", 2020.) Sums are float32 and the result is rounded once. Differentiable in x,
    bias and residual, forward and reverse; the weight gets no gradient.

    Args:
      x: float16, bfloat16 or float32 (..., k); or `QActivations`, see `matmul`.
      w: a QTensor (k, 2n) from `interleave_gate_up`; or a tuple of two QTensors (k, n), gate and up, of any formats,
        for two products.
      activation: of the gate; see `matmul`.
      x_format: see `matmul`.
      straight_through: see `matmul`.
      bias: (2n,) in the order of the columns of w, `interleave_gate_up(bias_gate, bias_up)`; for a tuple, a tuple of
        two (n,) or None each; or None.
      residual: (..., n), or None.
      out_dtype: float16, bfloat16 or float32; the type of x by default.
      precision: see `matmul`.
      kernel: see `matmul`.

    Returns:
      (..., n) of `out_dtype`.

    Raises:
      TypeError: as `matmul` does.
      ValueError: as `matmul` does; or w is no interleaved weight, or its two halves differ in shape.
      RuntimeError: as `matmul` does.
    """
    options = {
        "x_format": x_format, "straight_through": straight_through, "precision": precision, "kernel": kernel,
    }  # fmt: skip
    if not isinstance(w, tuple):
        check_weight(w)
        if w.shape[-1] % (2 * TILE_N) or w.padding[1]:
            raise ValueError(
                f"w has shape {w.shape}: expected (k, 2n) from interleave_gate_up, n a multiple of {TILE_N}, or a "
                "tuple of two QTensors"
            )
        return product(
            x, w, bias=bias, activation=activation, residual=residual, out_dtype=out_dtype, gated=True, **options
        )
    gate, up = _pair("w", w)
    bias_gate, bias_up = _pair("bias", (None, None) if bias is None else bias)
    for name, half in (("w[0]", gate), ("w[1]", up)):
        check_weight(half, name)
    if gate.shape != up.shape:
        raise ValueError(f"w[0] and w[1] must have the same shape, got {gate.shape} and {up.shape}")
    opened = product(x, up, bias=bias_up, out_dtype="float32", **options)
    out = product(x, gate, bias=bias_gate, activation=activation, out_dtype="float32", **options) * opened
    check_shape("residual", residual, out.shape)
    if residual is not None:
        out = out + residual.astype(jnp.float32)
    return out.astype(result_dtype(x, out_dtype))


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        got = f"{len(value)} entries" if isinstance(value, tuple) else type(value).__name__
        raise ValueError(f"{name} must be a pair of gate and up, got {got}")
    return value
