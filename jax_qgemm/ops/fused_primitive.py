"""The product with an epilogue as a JAX primitive: activation(scale * (x @ w) + bias) + residual, perhaps gated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, xla

from jax_qgemm import reference
from jax_qgemm._registration import FUSED_MATMUL_TARGET
from jax_qgemm.formats.layout import TILE_N
from jax_qgemm.ops.lowering import FLOAT_DTYPES, check_operands, register_lowerings, result_aval
from jax_qgemm.ops.matmul_primitive import qmatmul_p
from jax_qgemm.ops.stack import map_weights, split

qmatmul_fused_p = Primitive("qmatmul_fused")
"""Operands: x, planes and perhaps experts as of `qmatmul_p`; then those that there are of global_scale, float32 () or
(*batch,); bias, (n,) or (*batch, n); and residual, of the result's shape.

Parameters: those of `qmatmul_p` without transpose, and
  activation: None or a key of `reference.ACTIVATIONS`.
  gated: tile rows of w (16 columns) are a gate and what it opens in turn: the result is
    activation(scale * gate + bias_gate) * (scale * up + bias_up) + residual, of n/2 columns.
  has_scale, has_bias, has_residual: which operands follow the planes.
"""


def bind(x: jax.Array, weights: Any, scale: Any, bias: Any, residual: Any, **params: Any) -> jax.Array:
    """The primitive, with None for operands that there are not. `weights`: the planes, and experts if `has_experts`."""
    extras = {"scale": scale, "bias": bias, "residual": residual}
    operands = [operand for operand in extras.values() if operand is not None]
    has = {f"has_{name}": operand is not None for name, operand in extras.items()}
    return qmatmul_fused_p.bind(x, *weights, *operands, **params, **has)


def split_operands(
    operands: Any, has_scale: bool, has_bias: bool, has_residual: bool
) -> tuple[Any, Any, Any, Any, Any]:
    """x, planes and experts, global_scale, bias and residual, None for an extra that there is not; of operands or what
    belongs to them."""
    x, *rest = operands
    count = len(rest) - has_scale - has_bias - has_residual
    extras = iter(rest[count:])
    scale, bias, residual = (next(extras) if has else None for has in (has_scale, has_bias, has_residual))
    return x, rest[:count], scale, bias, residual


def which_extras(params: dict[str, Any]) -> dict[str, bool]:
    """What `split_operands` has to know, of a primitive's parameters."""
    return {name: params[name] for name in ("has_scale", "has_bias", "has_residual")}


@qmatmul_fused_p.def_abstract_eval
def _abstract_eval(
    *operands, format, padding, has_experts, batch_ndim, out_dtype, highest, kernel, activation, gated, has_scale,
    has_bias, has_residual,
):  # fmt: skip
    del highest, kernel
    x, weights, scale, bias, residual = split_operands(operands, has_scale, has_bias, has_residual)
    planes, experts = split(weights, has_experts)
    n = check_operands(x, planes, format, padding, batch_ndim, experts=experts)
    if activation is not None and activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)} or None, got {activation!r}")
    if gated and (n % (2 * TILE_N) or padding[1]):
        raise ValueError(f"w has n = {n}: a gated product needs a multiple of {2 * TILE_N}")
    batch = x.shape[:batch_ndim]
    shape = (*x.shape[:-1], n // 2 if gated else n)
    if scale is not None and (scale.dtype != jnp.float32 or scale.shape not in ((), batch)):
        raise ValueError(f"global_scale has {scale.dtype}{list(scale.shape)}, expected float32 () or {batch}")
    for name, array, shapes in (("bias", bias, ((n,), (*batch, n))), ("residual", residual, (shape,))):
        if array is None:
            continue
        if array.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16 or float32, got {array.dtype}")
        if array.shape not in shapes:
            expected = " or ".join(str(s) for s in dict.fromkeys(shapes))
            raise ValueError(f"{name} has shape {array.shape}, expected {expected}")
    return result_aval(x, shape[-1], out_dtype)


def _composed(*operands, out_dtype, activation, gated, has_scale, has_bias, has_residual, **params):
    """The same by the core product and jnp: what its derivatives, and batches that it has no place for, are made of."""
    x, weights, *extras = split_operands(operands, has_scale, has_bias, has_residual)
    sums = qmatmul_p.bind(x, *weights, transpose=False, out_dtype="float32", **params)
    return reference.epilogue(
        sums, *extras, batch_ndim=params["batch_ndim"], activation=activation, gated=gated, out_dtype=out_dtype
    )


def function_of(
    composed: Callable[..., jax.Array], indices: list[int], operands: Any, params: dict[str, Any]
) -> Callable[..., jax.Array]:
    """`composed` as a function of the operands at `indices` alone."""

    def function(*values):
        chosen = dict(zip(indices, values, strict=True))
        return composed(*(chosen.get(i, operand) for i, operand in enumerate(operands)), **params)

    return function


def _batch(args, dims, **params):
    # An operand that is not mapped has dimension None.
    x, weights, scale, bias, residual = split_operands(args, **which_extras(params))
    x_dim, weight_dims, scale_dim, bias_dim, residual_dim = split_operands(dims, **which_extras(params))
    own_weights = any(d is not None for d in weight_dims)
    if not own_weights and (x_dim is None or scale_dim is not None or bias_dim is not None):
        # One call would need a copy of the weight for every bias, or repeat the same sums for every residual.
        return jax.vmap(functools.partial(_composed, **params), tuple(dims))(*args), 0

    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    # Mapped weights become a batch axis; mapped rows alone only gain a leading axis: one product, not a loop.
    axis = 0 if own_weights else params["batch_ndim"]
    params = {k: v for k, v in params.items() if k not in which_extras(params)}
    params["batch_ndim"] += own_weights

    def mapped(array: Any, dim: int | None) -> Any:
        if array is None:
            return None
        if dim is not None:
            return jnp.moveaxis(array, dim, axis)
        return jnp.broadcast_to(jnp.expand_dims(array, axis), (*array.shape[:axis], size, *array.shape[axis:]))

    x = mapped(x, x_dim)

    def of_weights(array, dim, ndim):
        """Of a global_scale or a bias, which have `ndim` axes of their own; one for all weights stays one."""
        if array is None or not own_weights:
            return array
        shared = array.ndim - (dim is not None) == ndim
        if shared and dim is None:
            return array
        array = mapped(array, dim)
        if shared:
            batch, own = x.shape[: params["batch_ndim"]], array.shape[1:]
            array = jnp.broadcast_to(array.reshape(size, *(1,) * (len(batch) - 1), *own), (*batch, *own))
        return array

    if own_weights:
        weights = map_weights(weights, weight_dims, size, params["has_experts"])
    scale, bias = of_weights(scale, scale_dim, 0), of_weights(bias, bias_dim, 1)
    return bind(x, weights, scale, bias, mapped(residual, residual_dim), **params), axis


def _jvp(primals, tangents, **params):
    # The sums are computed by the core product, which is what its derivative needs of it too.
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]
    values, directions = ([operands[i] for i in moving] for operands in (primals, tangents))
    return jax.jvp(function_of(_composed, moving, primals, params), values, directions)


def _transpose(cotangent, *operands, **params):
    linear = [i for i, operand in enumerate(operands) if ad.is_undefined_primal(operand)]
    avals = [operands[i].aval for i in linear]
    if type(cotangent) is ad.Zero:
        cotangents = [ad.Zero(aval) for aval in avals]
    else:
        cotangents = jax.linear_transpose(function_of(_composed, linear, operands, params), *avals)(cotangent)
    of = dict(zip(linear, cotangents, strict=True))
    return [of.get(i) for i in range(len(operands))]


def _reference(*operands, **params):
    return _composed(*operands, **(params | {"kernel": "reference"}))


def _dense(*operands, **params):
    return _composed(*operands, **(params | {"kernel": "dense"}))


def epilogue_attributes(*, activation: str | None, gated: bool, **params: Any) -> dict[str, Any]:
    """How handlers are told of an epilogue."""
    flags = {"gated": gated} | which_extras(params)
    return {"activation": activation or "none"} | {name: np.bool_(value) for name, value in flags.items()}


qmatmul_fused_p.def_impl(functools.partial(xla.apply_primitive, qmatmul_fused_p))
batching.primitive_batchers[qmatmul_fused_p] = _batch
ad.primitive_jvps[qmatmul_fused_p] = _jvp
ad.primitive_transposes[qmatmul_fused_p] = _transpose
register_lowerings(qmatmul_fused_p, FUSED_MATMUL_TARGET, _reference, _dense, epilogue_attributes)
