"""The product of quantized activations with a quantized weight as a JAX primitive, with its epilogue."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_qgemm import reference
from jax_qgemm._registration import INTEGER_MATMUL_TARGET, require_cuda
from jax_qgemm.formats.format import Format
from jax_qgemm.formats.integer import IntFormat
from jax_qgemm.ops import integer_dense
from jax_qgemm.ops.fused_primitive import epilogue_attributes, function_of, split_operands, which_extras
from jax_qgemm.ops.lowering import (
    check_operands,
    check_platform,
    check_reasons,
    has_gemm_sm90,
    lower_to_call,
    result_aval,
    weight_shape,
)
from jax_qgemm.ops.matmul_primitive import qmatmul_p
from jax_qgemm.ops.stack import map_weights, to_front

X_FORMATS = ("int8", "fp8")
KERNELS = ("gemm_sm90_a8", "host", "dense", "reference")

integer_matmul_p = Primitive("integer_matmul")
"""Operands: codes of x (*batch, ..., k), their scales, float32 (*batch, ..., 1), and the planes of one weight, (*batch,
n/16, k/k_block, payload); then those that there are of global_scale, bias and residual, as of `qmatmul_fused_p`.

Parameters: format, padding, batch_ndim, out_dtype, activation, gated, has_scale, has_bias and has_residual as there,
and
  x_format: one of X_FORMATS.
  kernel: "auto" or one of KERNELS: "gemm_sm90_a8", on Hopper GPUs, is one kernel with its epilogue; "host", on the CPU,
    that of `qmatmul_p` over the codes as float32.
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


def check_format(x_format: str, format: Format, k: int) -> None:
    """Raises ValueError unless codes of x can be multiplied with those of a weight of k rows."""
    if reason := _why_not(x_format, format, k):
        raise ValueError(f"x is quantized to {x_format}, but w is {format}: {reason}")


def _why_not(x_format: str, format: Format, k: int) -> str | None:
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
    check_format(x_format, format, codes.shape[-1])
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
    """float32 (*batch, ..., n), by one of KERNELS made of others; but for the epilogue finished."""
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
    *operands, x_format, format, padding, batch_ndim, out_dtype, kernel, activation, gated, has_scale, has_bias,
    has_residual,
):  # fmt: skip
    del x_format  # the type of the codes
    codes, scales, planes, extras = _split(operands, has_scale, has_bias, has_residual)
    sums = _sums(codes, scales, planes, kernel=kernel, format=format, padding=padding, batch_ndim=batch_ndim)
    return reference.epilogue(
        sums, *extras, batch_ndim=batch_ndim, activation=activation, gated=gated, out_dtype=out_dtype
    )


def _why_not_sm90(format: IntFormat, k: int) -> list[str]:
    """Every reason why gemm_sm90_a8 can't serve a product, but for those that only the device knows."""
    reasons = []
    if isinstance(k, int) and k % 16:
        reasons.append(f"k = {k} is not a multiple of 16")
    if format.bits == 8 and not format.symmetric:
        reasons.append("it serves 8-bit weights without zero points")
    if format.group and format.scale_dtype == "float32":
        reasons.append("it serves groups with 16-bit scales")
    return reasons


_lower_product = mlir.lower_fun(_product, multiple_results=False)


def _lower(ctx, *operands, platform, **params):
    kernel, format = params["kernel"], params["format"]
    codes = ctx.avals_in[0]
    reasons = _why_not_sm90(format, codes.shape[-1])
    check_platform(kernel, platform)
    if kernel == "gemm_sm90_a8":
        check_reasons(kernel, codes, format, reasons)
        require_cuda()
    if kernel == "auto":
        serves = platform == "cuda" and has_gemm_sm90() and not reasons
        kernel = "host" if platform == "cpu" else "gemm_sm90_a8" if serves else "dense"
    if kernel != "gemm_sm90_a8":
        return _lower_product(ctx, *operands, **params | {"kernel": kernel})
    return lower_to_call(
        INTEGER_MATMUL_TARGET, ctx, operands, format=format, kernel=kernel, batch_ndim=params["batch_ndim"],
        **epilogue_attributes(**params),
    )  # fmt: skip


integer_matmul_p.def_impl(functools.partial(xla.apply_primitive, integer_matmul_p))
batching.primitive_batchers[integer_matmul_p] = _batch
ad.primitive_jvps[integer_matmul_p] = _jvp
mlir.register_lowering(integer_matmul_p, functools.partial(_lower, platform="a platform without kernels"))
for platform in ("cpu", "cuda"):
    mlir.register_lowering(integer_matmul_p, functools.partial(_lower, platform=platform), platform=platform)
