"""Activations quantized to 8 bits, as a JAX primitive."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_qgemm._registration import QUANTIZE_TARGET, require_cuda
from jax_qgemm.formats import activations
from jax_qgemm.formats.activations import ACTIVATION_FORMATS, QActivations, activation_format, check_activations
from jax_qgemm.ops.lowering import result_aval


def quantize_activations(x: Any, format: str = "q8_1") -> QActivations:
    """Quantizes activations along their last axis. Every backend gives the same bytes.

    "int8" and "fp8", one scale per token, dynamic and symmetric: scale = max|x| / L in float32, code = x * (L / max|x|)
    rounded to nearest, ties to even, both quotients being rounded once; L is 127, and 448, the largest float8_e4m3fn.
    One product per element and no division, so that the code is that of the exact quotient unless this lies within
    2^-23 of itself from the middle of two codes. A token whose largest magnitude is below L * 2^-100 (1e-28) is taken
    for zeros: scale and codes are 0. A token with an Inf or a NaN has the scale NaN, and decodes to NaN.

    "q8_1", in groups of 32: d = max|x| / 127 in float32, code = x * (1 / d) rounded to nearest, halves away from zero;
    d is then rounded to float16. Values beyond +-127 * 65504 (8.3e6), whose d would overflow float16, are first clamped
    to that: finite x never gives Inf or NaN. A group whose largest magnitude is below 127 * 2^-100 is taken for zeros;
    its d is 0 in float16 in any case. A group with an Inf or a NaN decodes to NaN.

    On an NVIDIA GPU this is one kernel, which reads x once; elsewhere XLA's operations.

    The result has no derivative. `matmul(x, w, x_format=..., straight_through=True)` differentiates as if x were not
    quantized.

    Args:
      x: float16, bfloat16 or float32 (..., k), k positive, for "q8_1" a multiple of 32.
      format: "int8", "fp8" or "q8_1".

    Raises:
      TypeError: x is not a float array; or it is differentiated (`jax.lax.stop_gradient` says that it shall not be).
      ValueError: an unknown format, or another k.
      RuntimeError: compiled for CUDA by a build without CUDA.
    """
    check_activations(x, activation_format(format).group or 1)
    return QActivations(format, *quantize_p.bind(jnp.asarray(x), format=format), dtype=np.dtype(x.dtype))


quantize_p = Primitive("quantize_activations")
"""Operand: x (..., k). Results: codes, scales and, of "q8_1", sums, as `QActivations` has them.

Parameter: format, a key of ACTIVATION_FORMATS.
"""
quantize_p.multiple_results = True


@quantize_p.def_abstract_eval
def _abstract_eval(x, *, format):
    kind = ACTIVATION_FORMATS[format]
    k = x.shape[-1]
    groups = k // kind.group if kind.group else 1
    results = (k, kind.codes), (groups, kind.scales), (groups, kind.sums)
    return [result_aval(x, columns, dtype) for columns, dtype in results if dtype is not None]


def _batch(args, dims, *, format):
    # A mapped x only gains a leading axis.
    results = quantize_p.bind(jnp.moveaxis(args[0], dims[0], 0), format=format)
    return results, [0] * len(results)


def _refuse(primals, tangents, *, format):
    del primals, tangents
    raise TypeError(
        f"x is differentiated, but its {format} codes have no derivative: matmul(x, w, x_format=..., "
        "straight_through=True) differentiates as if x were not quantized, jax.lax.stop_gradient(x) not at all"
    )


def _lower_cuda(ctx, x, *, format):
    require_cuda()
    return jax.ffi.ffi_lowering(QUANTIZE_TARGET)(ctx, x, format=format)


quantize_p.def_impl(functools.partial(xla.apply_primitive, quantize_p))
batching.primitive_batchers[quantize_p] = _batch
ad.primitive_jvps[quantize_p] = _refuse
mlir.register_lowering(quantize_p, mlir.lower_fun(activations.quantize, multiple_results=True))
mlir.register_lowering(quantize_p, _lower_cuda, platform="cuda")
