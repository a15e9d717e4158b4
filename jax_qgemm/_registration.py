"""Registers the native module's handlers with XLA, once, and says what they are called."""

from __future__ import annotations

import jax
from jax import export

from jax_qgemm import _native
from jax_qgemm._build_info import build_info

MATMUL_TARGET = "jax_qgemm.matmul.v1"
FUSED_MATMUL_TARGET = "jax_qgemm.fused_matmul.v1"
INTEGER_MATMUL_TARGET = "jax_qgemm.integer_matmul.v1"
DEQUANTIZE_TARGET = "jax_qgemm.dequantize.v1"
QUANTIZE_TARGET = "jax_qgemm.quantize_activations.v1"


def register() -> None:
    """Called once, when the package is imported."""
    for platform, handlers in _native.registrations().items():
        for name, handler in handlers.items():
            jax.ffi.register_ffi_target(name, handler, platform=platform)


def export_safety_checks() -> list[export.DisabledSafetyCheck]:
    """The checks to disable in `jax.export.export` for functions that call jax_qgemm:

    ``jax.export.export(f, disabled_checks=jax_qgemm.export_safety_checks())(x)``

    The targets carry a version in their names; a serialized function runs with any jax_qgemm that has them.
    """
    targets = (MATMUL_TARGET, FUSED_MATMUL_TARGET, INTEGER_MATMUL_TARGET, DEQUANTIZE_TARGET, QUANTIZE_TARGET)
    return [export.DisabledSafetyCheck.custom_call(target) for target in targets]


def require_cuda() -> None:
    """Raises RuntimeError where a product is lowered for CUDA by a build without CUDA."""
    if not build_info().cuda:
        raise RuntimeError(
            "jax_qgemm was built without CUDA and can't serve a CUDA device: rebuild with a CUDA compiler on the PATH, "
            "or with JAX_QGEMM_CUDA=wheels (see build_info())"
        )
