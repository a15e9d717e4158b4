"""The core product as a JAX primitive: x @ w or x @ w.T with the packed planes of a weight, linear in x."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, xla

from jax_qgemm import reference
from jax_qgemm._registration import MATMUL_TARGET
from jax_qgemm.ops import dense
from jax_qgemm.ops.lowering import check_operands, register_lowerings, result_aval, weight_shape
from jax_qgemm.ops.stack import map_weights, select, split, to_front

qmatmul_p = Primitive("qmatmul")
"""Operands: x (*batch, ..., k) and the planes of one weight for each entry of the batch, (*batch, n/16, k/k_block,
payload). Or the planes of a stack of weights, (e, n/16, k/k_block, payload), and behind them experts, int32 (*batch,):
the weight of each entry; an index out of range is the nearest in range.

Parameters:
  format: the `Format`.
  padding: (of k, of n), in elements.
  has_experts: whether there are experts.
  batch_ndim: how many leading axes of x, and of every plane if there are no experts, are batch axes.
  transpose: x is (*batch, ..., n) and the result (*batch, ..., k).
  out_dtype: name of the result's type.
  highest: float32 x: full float32 products, else TF32-class.
  kernel: "auto" or a key of KERNELS.
"""


@qmatmul_p.def_abstract_eval
def _abstract_eval(x, *weights, format, padding, has_experts, batch_ndim, transpose, out_dtype, highest, kernel):
    del highest, kernel
    planes, experts = split(weights, has_experts)
    columns = check_operands(x, planes, format, padding, batch_ndim, transpose, experts)
    return result_aval(x, columns, out_dtype)


def _batch(args, dims, **params):
    # An operand that is not mapped has dimension None.
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    (x, *weights), (x_dim, *weight_dims) = args, dims
    if all(d is None for d in weight_dims):
        # A mapped x alone only gains a leading axis: one product, not a loop.
        axis = params["batch_ndim"]
        return qmatmul_p.bind(jnp.moveaxis(x, x_dim, axis), *weights, **params), axis
    weights = map_weights(weights, weight_dims, size, params["has_experts"])
    params["batch_ndim"] += 1
    return qmatmul_p.bind(to_front(x, x_dim, size), *weights, **params), 0


def _jvp(primals, tangents, **params):
    x, *weights = primals
    out = qmatmul_p.bind(x, *weights, **params)
    # Planes and experts are integers: only x has a tangent.
    return out, qmatmul_p.bind(ad.instantiate_zeros(tangents[0]), *weights, **params)


def _transpose(cotangent, x, *weights, **params):
    none = [None] * len(weights)
    if type(cotangent) is ad.Zero:
        return [ad.Zero(x.aval), *none]
    params |= {"transpose": not params["transpose"], "out_dtype": x.aval.dtype.name}
    if params["kernel"] in ("gemv", "gemv_sm90", "gemm_sm80", "gemm_sm90"):
        params["kernel"] = "auto"  # they serve the product itself; its derivative has a kernel of its own
    return [qmatmul_p.bind(cotangent, *weights, **params), *none]


def _reference(x, *weights, format, padding, has_experts, batch_ndim, transpose, out_dtype, highest, kernel):
    del highest, kernel
    planes = select(*split(weights, has_experts))
    k, n = weight_shape(planes, format, padding)
    rows = format.decode(format.from_planes(planes, n, k))
    return reference.matmul(x, rows, batch_ndim=batch_ndim, transpose=transpose, out_dtype=out_dtype)


def _attributes(*, transpose, **_):
    return {"transpose": np.bool_(transpose)}


qmatmul_p.def_impl(functools.partial(xla.apply_primitive, qmatmul_p))
batching.primitive_batchers[qmatmul_p] = _batch
ad.primitive_jvps[qmatmul_p] = _jvp
ad.primitive_transposes[qmatmul_p] = _transpose
register_lowerings(qmatmul_p, MATMUL_TARGET, _reference, dense.product, _attributes)
