"""The core product as a JAX primitive: x @ w or x @ w.T with the packed planes of a weight, linear in x."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_qgemm import reference
from jax_qgemm._registration import MATMUL_TARGET, require_cuda
from jax_qgemm.formats.format import Format
from jax_qgemm.formats.integer import SCALE_DTYPES, IntFormat
from jax_qgemm.formats.layout import TILE_N

FLOAT_DTYPES = (jnp.dtype("float16"), jnp.dtype("bfloat16"), jnp.dtype("float32"))

# Which kernels serve which platform; the reference serves them all.
KERNELS: dict[str, tuple[str, ...]] = {"gemv": ("cuda",), "gemm_sm80": ("cuda",), "host": ("cpu",), "reference": ()}
GEMV_MAX_ROWS = 8

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


def weight_shape(planes: Any, format: Format, padding: tuple[int, int]) -> tuple[int, int]:
    """(k, n) of the weight that the planes hold, from the first of them."""
    n16, blocks = planes[0].shape[-3:-1]
    return blocks * format.k_block - padding[0], n16 * TILE_N - padding[1]


def _check_planes(planes: Any, format: Format, padding: tuple[int, int], batch: tuple[int, ...]) -> None:
    if len(planes) != len(format.planes):
        raise ValueError(f"w has {len(planes)} planes, but format {format} has {len(format.planes)}")
    k, n = weight_shape(planes, format, padding)
    for plane, array in zip(format.planes, planes, strict=True):
        shape = (*batch, *format.plane_shape(plane, n, k))
        if array.shape != shape or array.dtype != format.plane_dtype(plane):
            raise ValueError(
                f"plane {plane.name!r} of w ({format}) has {array.dtype}{list(array.shape)}, expected "
                f"{format.plane_dtype(plane)}{list(shape)}"
            )


@qmatmul_p.def_abstract_eval
def _abstract_eval(x, *planes, format, padding, batch_ndim, transpose, out_dtype, highest, kernel):
    del highest, kernel
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    if x.ndim <= batch_ndim:
        raise ValueError(f"x has shape {x.shape}: expected {batch_ndim} batch axes and at least one more")
    _check_planes(planes, format, padding, x.shape[:batch_ndim])
    k, n = weight_shape(planes, format, padding)
    contracted, kept, axis = (n, k, "n") if transpose else (k, n, "k")
    if x.shape[-1] != contracted:
        raise ValueError(f"x has shape {x.shape}, but w has {axis} = {contracted} (shape {(k, n)})")
    return x.update(shape=(*x.shape[:-1], kept), dtype=jnp.dtype(out_dtype), weak_type=False)


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
    if params["kernel"] in ("gemv", "gemm_sm80"):
        params["kernel"] = "auto"  # they serve the product itself; its derivative has a kernel of its own
    return [qmatmul_p.bind(cotangent, *planes, **params), *none]


def _reference(x, *planes, format, padding, batch_ndim, transpose, out_dtype, highest, kernel):
    del highest, kernel
    k, n = weight_shape(planes, format, padding)
    rows = format.decode(format.from_planes(planes, n, k))
    return reference.matmul(x, rows, batch_ndim=batch_ndim, transpose=transpose, out_dtype=out_dtype)


_reference_lowering = mlir.lower_fun(_reference, multiple_results=False)


def _check_kernel(kernel: str, platform: str) -> None:
    if kernel not in ("auto", "reference") and platform not in KERNELS[kernel]:
        serves = " and ".join(KERNELS[kernel])
        raise ValueError(f"kernel={kernel!r} serves {serves}, but the product is lowered for {platform}")


def _check_gemv(x_shape: tuple[Any, ...], format: Format, batch_ndim: int) -> None:
    """Raises with every reason why kernel="gemv" can't serve, but for those that only the device knows."""
    reasons = []
    rows = math.prod(x_shape[batch_ndim:-1])
    if isinstance(rows, int) and rows > GEMV_MAX_ROWS:
        reasons.append(f"x has {rows} rows, more than {GEMV_MAX_ROWS}")
    if isinstance(format, IntFormat) and format.group == 16:
        reasons.append("it serves integer groups of 32 and more")
    if isinstance(format, IntFormat) and format.scale_dtype == "float32":
        reasons.append("it serves integers with 16-bit scales")
    if reasons:
        raise ValueError(f"kernel='gemv' can't serve x {list(x_shape)} with {format}: {'; '.join(reasons)}")


def _lower_reference(ctx, *operands, **params):
    _check_kernel(params["kernel"], "a platform without kernels")
    return _reference_lowering(ctx, *operands, **params)


def _lower_native(ctx, *operands, platform: str, **params):
    if params["kernel"] == "reference":
        return _reference_lowering(ctx, *operands, **params)
    _check_kernel(params["kernel"], platform)
    format = params["format"]
    if platform == "cuda":
        require_cuda()
    if params["kernel"] == "gemv":
        _check_gemv(ctx.avals_in[0].shape, format, params["batch_ndim"])
    is_int = isinstance(format, IntFormat)
    return jax.ffi.ffi_lowering(MATMUL_TARGET)(
        ctx,
        *operands,
        format=format.name,
        kernel=params["kernel"],
        group_size=np.int64(format.group if is_int else 0),
        scale_type=np.int64(SCALE_DTYPES.index(format.scale_dtype) if is_int else 0),
        batch_ndim=np.int64(params["batch_ndim"]),
        transpose=np.bool_(params["transpose"]),
        highest=np.bool_(params["highest"]),
    )


qmatmul_p.def_impl(functools.partial(xla.apply_primitive, qmatmul_p))
batching.primitive_batchers[qmatmul_p] = _batch
ad.primitive_jvps[qmatmul_p] = _jvp
ad.primitive_transposes[qmatmul_p] = _transpose
mlir.register_lowering(qmatmul_p, _lower_reference)
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(qmatmul_p, functools.partial(_lower_native, platform=_platform), platform=_platform)
