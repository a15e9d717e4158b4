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

qmatmul_p = Primitive("qmatmul")
"""Operands: x (*batch, ..., k) and the planes of one weight (*batch, n/16, k/k_block, payload).

Parameters:
  format: the `Format`.
  padding: (of k, of n), in elements.
  batch_ndim: how many leading axes of x and of every plane are batch axes.
  transpose: x is (*batch, ..., n) and the result (*batch, ..., k).
  out_dtype: name of the result's type.
  highest: float32 x: full float32 products, else TF32-class.
  kernel: "auto" or a key of KERNELS.
"""


@qmatmul_p.def_abstract_eval
def _abstract_eval(x, *planes, format, padding, batch_ndim, transpose, out_dtype, highest, kernel):
    del highest, kernel
    columns = check_operands(x, planes, format, padding, batch_ndim, transpose)
    return result_aval(x, columns, out_dtype)


def _batch(args, dims, **params):
    # An operand that is not mapped has dimension None.
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    (x, *planes), (x_dim, *plane_dims) = args, dims
    if all(d is None for d in plane_dims):
        # A mapped x alone only gains a leading axis: one product, not a loop.
        axis = params["batch_ndim"]
        return qmatmul_p.bind(jnp.moveaxis(x, x_dim, axis), *planes, **params), axis
    operands = [
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args, dims, strict=True)
    ]
    params["batch_ndim"] += 1
    return qmatmul_p.bind(*operands, **params), 0


def _jvp(primals, tangents, **params):
    x, *planes = primals
    out = qmatmul_p.bind(x, *planes, **params)
    # Planes are integers: only x has a tangent.
    return out, qmatmul_p.bind(ad.instantiate_zeros(tangents[0]), *planes, **params)


def _transpose(cotangent, x, *planes, **params):
    none = [None] * len(planes)
    if type(cotangent) is ad.Zero:
        return [ad.Zero(x.aval), *none]
    params |= {"transpose": not params["transpose"], "out_dtype": x.aval.dtype.name}
    if params["kernel"] in ("gemv", "gemv_sm90", "gemm_sm80", "gemm_sm90"):
        params["kernel"] = "auto"  # they serve the product itself; its derivative has a kernel of its own
    return [qmatmul_p.bind(cotangent, *planes, **params), *none]


def _reference(x, *planes, format, padding, batch_ndim, transpose, out_dtype, highest, kernel):
    del highest, kernel
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
