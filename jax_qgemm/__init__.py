"""Quantized matrix products for JAX on NVIDIA GPUs and CPUs."""

from jax_qgemm._guard import check_native as _check_native

_check_native()

from jax_qgemm import _registration, formats  # noqa: E402

_registration.register()

from jax_qgemm import io  # noqa: E402
from jax_qgemm._build_info import BuildInfo, build_info  # noqa: E402
from jax_qgemm._registration import export_safety_checks  # noqa: E402
from jax_qgemm.formats import (  # noqa: E402
    QActivations,
    QTensor,
    int2,
    int3,
    int4,
    int8,
    quantize,
)
from jax_qgemm.ops import (  # noqa: E402
    expert_matmul,
    gated_matmul,
    interleave_gate_up,
    matmul,
    quantize_activations,
    take,
)

__all__ = [
    "BuildInfo",
    "QActivations",
    "QTensor",
    "build_info",
    "expert_matmul",
    "export_safety_checks",
    "formats",
    "gated_matmul",
    "int2",
    "int3",
    "int4",
    "int8",
    "interleave_gate_up",
    "io",
    "matmul",
    "quantize",
    "quantize_activations",
    "take",
]
