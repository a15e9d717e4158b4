"""The product of quantized activations with a quantized weight as a JAX primitive, with its epilogue."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_qgemm import reference
from jax_qgemm.formats.format import Format
from jax_qgemm.formats.integer import IntFormat
from jax_qgemm.ops import integer_dense
from jax_qgemm.ops.fused_primitive import function_of, split_operands, which_extras
from jax_qgemm.ops.lowering import check_operands, result_aval, weight_shape
from jax_qgemm.ops.matmul_primitive import qmatmul_p
from jax_qgemm.ops.stack import map_weights, to_front

X_FORMATS = ("int8", "fp8")
KERNELS = ("host", "dense", "reference")

integer_matmul_p = Primitive("integer_matmul")
"""Operands: codes of x (*batch, ..., k), their scales, float32 (*batch, ..., 1), and the planes of one weight, (*batch,
n/16, k/k_block, payload); then those that there are of global_scale, bias and residual, as of `qmatmul_fused_p`.

Parameters: format, padding, batch_ndim, out_dtype, activation, gated, has_scale, has_bias and has_residual as there,
and
  x_format: one of X_FORMATS.
  kernel: "auto" or one of KERNELS: "host", on the CPU, is the kernel of `qmatmul_p` over the codes as float32.
"""


def bind(codes: Any, scales: Any, planes: Any, extras: Any, **params: Any) -> jax.Array:
    """The primitive; `extras` are global_scale, bias and residual, None for what there is not."""
    has = {f"has_{name}": e is not None for name, e in zip(("scale", "bias", "residual"), extras, strict=True)}
    return integer_matmul_p.bind(codes, scales, *planes, *(e for e in extras if e is not None), **params, **has)


def _split(operands: Any, has_scale: bool, has_bias: bool, has_residual: bool) -> tuple[Any, Any, Any, list[Any]]:
    """Codes, scales, planes, and global_scale, bias and residual; of operands or what belongs to them."""
    codes, scales, *rest = operands
    _, planes, *extras = split_operands((codes, *rest), has_scale, has_bias, has_residual)
    return codes, scales, planes, extras


def _why_not(x_format: str, format: Format, k: int) -> str | None:
    """What keeps activations from being multiplied with a weight of k rows."""
    if not isinstance(format, IntFormat) or format.bits not in (4, 8):
        return "expected int4 or int8 weights"
    if 0 < format.group < 64:
        return "expected groups of 64 and more, or one scale per channel"
    if x_format == "fp8" and format.bits == 8:
        return "expected int4 weights, since 8-bit codes are not exact in float8_e4m3fn"
    most = integer_dense.largest_k(format)
    if x_format == "int8" and (format.group or k) > most:
        return f"the sums of more than {most} products may leave int32"
    return None


@integer_matmul_p.def_abstract_eval
def _abstract_eval(
    *operands, x_format, format, padding, batch_ndim, out_dtype, kernel, activation, gated, has_scale, has_bias,
    has_residual,
):  # fmt: skip
    del kernel, activation
    codes, scales, planes, _ = _split(operands, has_scale, has_bias, has_residual)
    if reason := _why_not(x_format, format, codes.shape[-1]):
        raise ValueError(f"x is quantized to {x_format}, but w is {format}: {reason}")
    n = check_operands(codes.update(dtype=jnp.dtype("float32")), planes, format, padding, batch_ndim)
    if scales.dtype != jnp.float32 or scales.shape != (*codes.shape[:-1], 1):
        raise ValueError(
            f"scales of x have {scales.dtype}{list(scales.shape)}, expected float32{[*codes.shape[:-1], 1]}"
        )
    return result_aval(codes, n // 2 if gated else n, out_dtype)


def _composed(*operands, out_dtype, activation, gated, has_scale, has_bias, has_residual, **params):
    """The same with the epilogue in jnp: what derivatives, and batches of more than rows, are made of."""
    codes, scales, planes, extras = _split(operands, has_scale, has_bias, has_residual)
    core = {"activation": None, "gated": False, "out_dtype": "float32"}
    sums = bind(codes, scales, planes, (None, None, None), **params, **core)
    return reference.epilogue(
        sums, *extras, batch_ndim=params["batch_ndim"], activation=activation, gated=gated, out_dtype=out_dtype
    )


def _batch(args, dims, **params):
    # An operand that is not mapped has dimension None.
    codes, scales, planes, (scale, bias, residual) = _split(args, **which_extras(params))
    codes_dim, scales_dim, plane_dims, (scale_dim, bias_dim, residual_dim) = _split(dims, **which_extras(params))
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    own_weights = any(d is not None for d in plane_dims)
    has_extras = any(which_extras(params).values()) or params["activation"] is not None
    if has_extras and (own_weights or codes_dim is None or scale_dim is not None or bias_dim is not None):
        return jax.vmap(functools.partial(_composed, **params), tuple(dims))(*args), 0
    codes, scales = to_front(codes, codes_dim, size), to_front(scales, scales_dim, size)
    if own_weights:
        params["batch_ndim"] += 1
        return integer_matmul_p.bind(codes, scales, *map_weights(planes, plane_dims, size, False), **params), 0
    # Mapped rows alone gain a leading axis: one product, not a loop.
    axis = params["batch_ndim"]
    if residual is not None:
        residual = jnp.moveaxis(to_front(residual, residual_dim, size), 0, axis)
    codes, scales = jnp.moveaxis(codes, 0, axis), jnp.moveaxis(scales, 0, axis)
    params = {name: value for name, value in params.items() if name not in which_extras(params)}
    return bind(codes, scales, planes, (scale, bias, residual), **params), axis


def _jvp(primals, tangents, **params):
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]
    if moving[0] < 2:
        raise TypeError(
            f"the scales of x ({params['x_format']}) are differentiated, but quantized activations have no derivative: "
            "matmul(x, w, x_format=..., straight_through=True) differentiates as if x were not quantized"
        )
    values, directions = ([operands[i] for i in moving] for operands in (primals, tangents))
    return jax.jvp(function_of(_composed, moving, primals, params), values, directions)


def _sums(codes, scales, planes, *, kernel, **weight):
    """float32 (*batch, ..., n), by one of KERNELS; but for the epilogue finished."""
    if kernel == "dense":
        return integer_dense.sums(codes, *planes, **weight) * scales
    x = codes.astype(jnp.float32)
    if kernel == "host":
        params = {"has_experts": False, "transpose": False, "out_dtype": "float32", "highest": True}
        return qmatmul_p.bind(x, *planes, **weight, **params, kernel="host") * scales
    k, n = weight_shape(planes, weight["format"], weight["padding"])
    rows = weight["format"].decode(weight["format"].from_planes(planes, n, k))
    return reference.matmul(x * scales, rows, batch_ndim=weight["batch_ndim"], transpose=False, out_dtype="float32")


def _product(
    *operands, on_cpu, x_format, format, padding, batch_ndim, out_dtype, kernel, activation, gated, has_scale, has_bias,
    has_residual,
):  # fmt: skip
    del x_format  # the type of the codes
    if kernel == "host" and not on_cpu:
        raise ValueError("kernel='host' serves cpu, but the product is lowered for another platform")
    if kernel == "auto":
        kernel = "host" if on_cpu else "dense"
    codes, scales, planes, extras = _split(operands, has_scale, has_bias, has_residual)
    sums = _sums(codes, scales, planes, kernel=kernel, format=format, padding=padding, batch_ndim=batch_ndim)
    return reference.epilogue(
        sums, *extras, batch_ndim=batch_ndim, activation=activation, gated=gated, out_dtype=out_dtype
    )


integer_matmul_p.def_impl(functools.partial(xla.apply_primitive, integer_matmul_p))
batching.primitive_batchers[integer_matmul_p] = _batch
ad.primitive_jvps[integer_matmul_p] = _jvp
for platform in (None, "cpu"):
    lower = mlir.lower_fun(functools.partial(_product, on_cpu=platform == "cpu"), multiple_results=False)
    mlir.register_lowering(integer_matmul_p, lower, platform=platform)
