"""Bad calls with quantized activations raise under `jax.eval_shape`, naming the argument, what came and what was
expected."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_weight
from jax import export
from quantized_x import F32

import jax_qgemm as qg
from jax_qgemm._registration import INTEGER_MATMUL_TARGET
from jax_qgemm.ops import integer_dense

X = jax.ShapeDtypeStruct((5, 128), jnp.float32)


def weight(format: Any, **metadata: Any) -> qg.QTensor:
    w, _ = random_weight(qg.formats.get_format(format), 48, 128, np.random.default_rng(0))
    return qg.QTensor(w.planes, w.format, w.padding, **metadata)


def activations(
    format: str = "int8", codes: Any = ((5, 128), "int8"), scales: Any = ((5, 1), "float32"), sums: Any = None
) -> qg.QActivations:
    codes, scales = (jax.ShapeDtypeStruct(*a) for a in (codes, scales))
    return qg.QActivations(format, codes, scales, sums)


INT4 = weight(qg.int4(64))
ERRORS = {
    "unknown format": ({"x_format": "int5"}, ValueError, ["x_format must be one of int8, fp8 or None", "'int5'"]),
    "no name": ({"x_format": 8}, ValueError, ["x_format must be one of", "8"]),
    "ggml's": ({"x_format": "q8_1"}, ValueError, ["x_format must be one of", "'q8_1'"]),
    "integer x": ({"x": jax.ShapeDtypeStruct((5, 128), jnp.int8)}, TypeError, ["x must be float16", "int8"]),
    "another k": ({"x": jax.ShapeDtypeStruct((5, 64), F32)}, ValueError, ["x has shape (5, 64)", "(..., 128)"]),
    "GGUF weights": ({"w": weight("q4_0")}, ValueError, ["x is quantized to int8, but w is q4_0", "int4 or int8"]),
    "3 bits": ({"w": weight(qg.int3(64))}, ValueError, ["w is int3(group_size=64", "int4 or int8"]),
    "small groups": ({"w": weight(qg.int4(32))}, ValueError, ["w is int4(group_size=32", "groups of 64 and more"]),
    "fp8 and int8": ({"x_format": "fp8", "w": weight(qg.int8(64))}, ValueError, ["fp8", "w is int8(", "not exact"]),
    "kernel": ({"kernel": "gemv"}, ValueError, ["kernel='gemv' can't serve quantized", "'auto'", "dense"]),
    "no kernel": ({"kernel": "fast"}, ValueError, ["kernel must be 'auto' or one of", "'fast'"]),
    "bias": ({"bias": jax.ShapeDtypeStruct((128,), F32)}, ValueError, ["bias has shape (128,)", "(48,)"]),
    "residual": ({"residual": jax.ShapeDtypeStruct((48,), F32)}, ValueError, ["residual", "(5, 48)"]),
    "out_dtype": ({"out_dtype": "int32"}, TypeError, ["out_dtype must be float16", "int32"]),
    "precision": ({"precision": "exact"}, ValueError, ["precision must be", "'exact'"]),
    "straight through what": (
        {"x_format": None, "straight_through": True},
        ValueError,
        ["straight_through=True needs quantized activations", "x_format", "None"],
    ),
    "codes straight through": (
        {"x": activations(), "x_format": None, "straight_through": True},
        ValueError,
        ["straight_through=True needs x itself"],
    ),
    "two formats": (
        {"x": activations(), "x_format": "fp8"},
        ValueError,
        ["x is quantized to int8, but x_format is 'fp8'"],
    ),
    "ggml's activations": (
        {
            "x": activations("q8_1", scales=((5, 4), "float16"), sums=jax.ShapeDtypeStruct((5, 4), jnp.int16)),
            "x_format": None,
        },
        ValueError,
        ["x is quantized to q8_1", "int8, fp8"],
    ),
    "an input scale": (
        {"x": activations(), "x_format": None, "w": weight(qg.int4(64), input_scale=np.ones(128, F32))},
        ValueError,
        ["w has an input_scale", "x_format='int8'"],
    ),
    "unknown container": ({"x": activations("int5"), "x_format": None}, ValueError, ["'int5'", "q8_1, int8, fp8"]),
    "codes of another type": (
        {"x": activations(codes=((5, 128), "uint8")), "x_format": None},
        TypeError,
        ["codes of x (int8) must be int8, got uint8"],
    ),
    "scales of another type": (
        {"x": activations(scales=((5, 1), "float16")), "x_format": None},
        TypeError,
        ["scales of x (int8) must be float32, got float16"],
    ),
    "scales of another shape": (
        {"x": activations(scales=((5,), "float32")), "x_format": None},
        ValueError,
        ["scales of x (int8) have shape (5,), expected (5, 1)"],
    ),
    "sums that the format has not": (
        {"x": activations(sums=jax.ShapeDtypeStruct((5, 4), jnp.int16)), "x_format": None},
        TypeError,
        ["sums of x (int8) must be None, got int16"],
    ),
    "codes without axes": (
        {"x": activations(codes=((), "int8"), scales=((1,), "float32")), "x_format": None},
        ValueError,
        ["codes of x (int8) have shape ()", "(..., k)"],
    ),
}


@pytest.mark.parametrize(("arguments", "error", "words"), ERRORS.values(), ids=ERRORS)
def test_bad_arguments_are_named(arguments, error, words):
    arguments = {"x": X, "w": INT4, "x_format": "int8"} | arguments
    static = {n: v for n, v in arguments.items() if n not in ("x", "bias", "residual")}
    traced = {n: v for n, v in arguments.items() if n not in static}
    with pytest.raises(error) as caught:
        jax.eval_shape(lambda **traced: qg.matmul(**traced, **static), **traced)
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


def test_sums_that_may_leave_int32_are_refused():
    format = qg.int8(-1, symmetric=False)
    k = integer_dense.largest_k(format) + 1
    assert 127 * 255 * (k - 1) < 2**31
    planes: Any = [jax.ShapeDtypeStruct(format.plane_shape(p, 16, k), format.plane_dtype(p)) for p in format.planes]
    w = qg.QTensor(tuple(planes), format, (-k % 64, 0))
    x = jax.ShapeDtypeStruct((1, k), F32)
    with pytest.raises(ValueError, match=r"more than 66051 products may leave int32"):
        jax.eval_shape(functools.partial(qg.matmul, x_format="int8"), x, w)


def _export(function: Any, *arguments: Any, platform: str = "cuda") -> None:
    checks = qg.export_safety_checks()
    export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)(*arguments)


FORCED = functools.partial(qg.matmul, x_format="int8", kernel="gemm_sm90_a8")


@pytest.mark.parametrize(
    ("k", "format", "reasons"),
    [
        (200, qg.int4(-1), ["k = 200 is not a multiple of 16"]),
        (512, qg.int4(64, scale_dtype="float32"), ["groups with 16-bit scales"]),
        (200, qg.int8(-1, symmetric=False), ["k = 200", "8-bit weights without zero points"]),
        (512, qg.int8(64, symmetric=False, scale_dtype="float32"), ["without zero points", "with 16-bit scales"]),
    ],
    ids=str,
)
def test_gemm_sm90_a8_refuses_with_every_reason(k, format, reasons, monkeypatch):
    monkeypatch.setattr("jax_qgemm.ops.quantize.require_cuda", lambda: None)  # the build may have no CUDA
    w, _ = random_weight(format, 48, k, np.random.default_rng(0))
    with pytest.raises(ValueError, match="kernel='gemm_sm90_a8' can't serve x") as error:
        _export(FORCED, jax.ShapeDtypeStruct((5, k), F32), w)
    assert all(reason in str(error.value) for reason in reasons)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gemm_sm90_a8_serves_cuda(platform):
    with pytest.raises(ValueError, match="kernel='gemm_sm90_a8' serves cuda, but the product is lowered for"):
        _export(FORCED, X, INT4, platform=platform)


def test_gemm_sm90_a8_serves_quantized_x():
    for product in (qg.matmul, qg.gated_matmul):
        w, _ = random_weight(qg.int4(64), 64, 128, np.random.default_rng(0))
        with pytest.raises(ValueError, match=r"kernel='gemm_sm90_a8' can't serve x.*serves quantized x.*x_format"):
            _export(functools.partial(product, kernel="gemm_sm90_a8"), X, w)


def test_a_build_without_cuda_refuses_gemm_sm90_a8(monkeypatch):
    """And whatever quantizes x, for which CUDA has a kernel, too."""
    info = dataclasses.replace(qg.build_info(), cuda=False, cuda_version=None, cuda_architectures=())
    monkeypatch.setattr("jax_qgemm._registration.build_info", lambda: info)
    with pytest.raises(RuntimeError, match=r"built without CUDA.*JAX_QGEMM_CUDA"):
        _export(functools.partial(qg.matmul, kernel="gemm_sm90_a8"), activations(), INT4)
    _export(qg.matmul, activations(), INT4)  # of codes auto takes XLA's operations
    with pytest.raises(RuntimeError, match=r"built without CUDA.*JAX_QGEMM_CUDA"):
        _export(functools.partial(qg.matmul, x_format="int8"), X, INT4)


# The handler checks again what the kernel relies on: an exported function may come from anywhere.

STACK, _ = random_weight(qg.int4(64), 96, 128, np.random.default_rng(0), batch=3)
ATTRIBUTES = {
    "format": "int4", "kernel": "gemm_sm90_a8", "activation": "none",
    "group_size": np.int64(64), "scale_type": np.int64(0), "batch_ndim": np.int64(1),
    **dict.fromkeys(("gated", "has_scale", "has_bias", "has_residual"), np.bool_(False)),
}  # fmt: skip


def ones(*shape: int, dtype: Any = F32) -> np.ndarray:
    return np.ones(shape, dtype)


# codes and scales, operands behind the planes, attributes, and the message
HANDLER = {
    "codes of another type": ((ones(3, 5, 128), ones(3, 5, 1)), (), {}, "codes must be s8 or f8e4m3fn"),
    "unsigned codes": ((ones(3, 5, 128, dtype=np.uint8), ones(3, 5, 1)), (), {}, "codes must be s8 or f8e4m3fn"),
    "codes of fewer rows": ((ones(3, 4, 128, dtype=np.int8), ones(3, 4, 1)), (), {}, "leading axes of x and out"),
    "codes of another k": ((ones(3, 5, 64, dtype=np.int8), ones(3, 5, 1)), (), {}, "plane 0 .* wrong shape"),
    "scales of another type": ((None, ones(3, 5, 1, dtype=np.float16)), (), {}, "scales must be f32"),
    "scales of fewer rows": ((None, ones(3, 4, 1)), (), {}, "one for each row of codes"),
    "scales of groups": ((None, ones(3, 5, 2)), (), {}, "one for each row of codes"),
    "scales of fewer axes": ((None, ones(3, 5)), (), {}, "one for each row of codes"),
    "experts": ((None, None), (np.zeros(3, np.int32),), {}, "codes take no experts"),
    "a short bias": ((None, None), (ones(95),), {"has_bias": True}, "bias must have the shape"),
    "a residual of one row": ((None, None), (ones(96),), {"has_residual": True}, "residual must have the shape"),
    "activation": ((None, None), (), {"activation": "swish"}, "unknown activation swish"),
    "another group": ((None, None), (), {"group_size": 128}, "plane 0 .* wrong shape"),
}


@pytest.mark.gpu
@pytest.mark.parametrize(("x", "operands", "attributes", "message"), HANDLER.values(), ids=HANDLER)
def test_handler(x, operands, attributes, message):
    good = (ones(3, 5, 128, dtype=np.int8), ones(3, 5, 1))
    codes, scales = (g if a is None else a for a, g in zip(x, good, strict=True))
    attributes = {name: type(ATTRIBUTES[name])(value) for name, value in attributes.items()}
    call = jax.ffi.ffi_call(INTEGER_MATMUL_TARGET, jax.ShapeDtypeStruct((3, 5, 96), jnp.float32))
    with jax.default_device(jax.devices("cuda")[0]), pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(codes, scales, *STACK.planes, *operands, **ATTRIBUTES | attributes))
