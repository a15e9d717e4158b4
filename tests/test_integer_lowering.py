"""What XLA is given of products of quantized activations: its own operations, or on a Hopper GPU one custom call."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_weight
from jax import export
from quantized_x import F32

import jax_qgemm as qg
from jax_qgemm._registration import INTEGER_MATMUL_TARGET, MATMUL_TARGET
from jax_qgemm.ops import integer_dense, integer_primitive


def test_integers_are_multiplied_as_such_and_decoded_by_slabs(monkeypatch):
    w, _ = random_weight(qg.int8(-1), 4096, 512, np.random.default_rng(2))
    shape = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)
    function = jax.jit(functools.partial(qg.matmul, x_format="int8", kernel="dense"))
    lowered = function.lower(shape, w)
    assert "(tensor<8x1x512xi8>, tensor<4096x1x512xi8>) -> tensor<1x8x4096xi32>" in lowered.as_text()
    monkeypatch.setattr(integer_dense, "SCRATCH_BYTES", 1 << 17)
    compiled = jax.jit(functools.partial(qg.matmul, x_format="int8", kernel="dense")).lower(shape, w).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 512 // 2  # of its codes


def test_x_is_quantized_once_for_several_products():
    weights = [random_weight(qg.int4(64), 48, 192, np.random.default_rng(seed))[0] for seed in range(3)]

    def project(x, weights):
        return [qg.matmul(x, w, x_format="int8") for w in weights]

    compiled = jax.jit(project).lower(jax.ShapeDtypeStruct((5, 192), jnp.bfloat16), weights).compile()
    assert str(compiled.as_text()).count(" round-nearest-even(") == 1


def test_host_is_the_cpus(monkeypatch):
    monkeypatch.setattr("jax_qgemm.ops.quantize.require_cuda", lambda: None)  # the build may have no CUDA
    w, _ = random_weight(qg.int4(64), 48, 128, np.random.default_rng(15))
    x = np.random.default_rng(16).standard_normal((4, 128)).astype(F32)
    lowered = jax.jit(functools.partial(qg.matmul, x_format="int8", kernel="host")).trace(x, w)
    with pytest.raises(ValueError, match="kernel='host' serves cpu"):
        lowered.lower(lowering_platforms=("cuda",))
    cpu = lowered.lower(lowering_platforms=("cpu",))
    assert "jax_qgemm.matmul" in cpu.as_text()


# On a Hopper GPU, whose lowering needs neither the GPU nor the kernels.

M, K, N, LAYERS = 5, 512, 384, 3
CALL = f"custom_call @{INTEGER_MATMUL_TARGET}("


@pytest.fixture
def hopper(monkeypatch):
    info = dataclasses.replace(qg.build_info(), cuda=True, cuda_version="13.0", cuda_architectures=("90a-real",))
    monkeypatch.setattr("jax_qgemm._registration.build_info", lambda: info)
    monkeypatch.setattr(integer_primitive, "has_gemm_sm90", lambda: True)


def _weight(format, k=K, batch=None):
    return random_weight(format, N, k, np.random.default_rng(0), batch=batch)[0]


def _lowered(function, x, w, platform="cuda") -> str:
    """As XLA gets it. The function is a new one: what it was lowered to before is not of interest."""
    checks = qg.export_safety_checks()
    exporter = export.export(jax.jit(lambda x, w: function(x, w)), platforms=[platform], disabled_checks=checks)
    return exporter(x, w).mlir_module()


def _x(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("x_format", ["int8", "fp8"])
def test_a_product_with_its_epilogue_is_one_custom_call(x_format, dtype, gated):
    def block(x, w):
        bias, residual = x[0, :N], x[:, : N // 2 if gated else N]
        product = qg.gated_matmul if gated else qg.matmul
        return product(x, w, x_format=x_format, bias=bias, activation="silu", residual=residual)

    module = _lowered(block, _x(M, K, dtype=dtype), _weight(qg.int4(128, scale_dtype="bfloat16")))
    assert "dot_general" not in module
    (call,) = re.findall(rf"(%\w+) = stablehlo\.{re.escape(CALL)}(.*)", module)
    name, rest = call
    names = {"int8": "i8", "fp8": "f8E4M3FN", "float16": "f16", "bfloat16": "bf16", "float32": "f32"}
    codes, result = names[x_format], f"tensor<{M}x{N // 2 if gated else N}x{names[dtype]}>"
    assert f": (tensor<{M}x{K}x{codes}>, tensor<{M}x1xf32>, " in rest
    assert f") -> {result}" in rest
    assert f"return {name} : {result}" in module  # nothing follows
    for attribute in (
        'activation = "silu"', "batch_ndim = 0 : i64", 'format = "int4"', "group_size = 128 : i64",
        'kernel = "gemm_sm90_a8"', "scale_type = 1 : i64", f"gated = {str(gated).lower()}",
        "has_scale = false", "has_bias = true", "has_residual = true",
    ):  # fmt: skip
        assert attribute in rest, f"{attribute} is missing in {rest}"


def _loss(x, w):
    return jnp.sum(qg.matmul(x, w, x_format="int8", straight_through=True).astype(F32) ** 2)


def _shared(x, w):
    shared = qg.quantize_activations(x, "int8")
    return [qg.matmul(shared, w[i]) for i in range(LAYERS)]


def _by_int8(x, w):
    return qg.matmul(x, w, x_format="int8")


# name: function of x and a weight, leading axes of x, weights, custom calls, their batch_ndim
OPS = {
    "leading axes": (_by_int8, (2, M), None, 1, 0),
    "vmap over x": (jax.vmap(_by_int8, (0, None)), (2, M), None, 1, 0),
    "vmap over w": (jax.vmap(_by_int8, (None, 0)), (M,), LAYERS, 1, 1),
    "scan": (lambda x, w: jax.lax.scan(lambda _, w: (None, _by_int8(x, w)), None, w)[1], (M,), LAYERS, 1, 0),
    "three of one x": (_shared, (M,), LAYERS, LAYERS, 0),
    "grad": (jax.grad(_loss), (M,), None, 1, 0),
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("op", OPS)
def test_custom_calls_of(op):
    function, shape, batch, calls, batch_ndim = OPS[op]
    module = _lowered(function, _x(*shape, K), _weight(qg.int8(-1), batch=batch))
    assert module.count(CALL) == calls
    assert module.count(f"batch_ndim = {batch_ndim} : i64") >= calls
    assert "dot_general" not in module
    assert (f"custom_call @{MATMUL_TARGET}(" in module) == (op == "grad")  # the derivative is that of x itself


_SERVED = (
    {"group_size": 64, "scale_dtype": "float16"},
    {"group_size": 128, "scale_dtype": "bfloat16"},
    {"group_size": 256, "scale_dtype": "float16"},
    {"group_size": -1, "scale_dtype": "float16"},
    {"group_size": -1, "scale_dtype": "float32"},
)
SERVED: list[tuple[str, Any]] = [
    *(("int8", make(**options)) for make in (qg.int4, qg.int8) for options in _SERVED),
    *((x_format, qg.int4(symmetric=False, **options)) for x_format in ("int8", "fp8") for options in _SERVED),
]
NOT_SERVED = [
    (512, qg.int8(128, symmetric=False)),
    (512, qg.int8(-1, symmetric=False)),
    (512, qg.int4(64, scale_dtype="float32")),
    (200, qg.int4(-1)),
]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("x_format", "format"), SERVED, ids=str)
def test_gemm_sm90_a8_serves(x_format, format):
    for k in (512, 528):
        module = _lowered(functools.partial(qg.matmul, x_format=x_format), _x(1, k), _weight(format, k))
        assert module.count(CALL) == 1
        assert f'format = "{format.name}"' in module
        assert f"group_size = {format.group} : i64" in module


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("k", "format"), NOT_SERVED, ids=str)
def test_what_gemm_sm90_a8_does_not_serve_is_dense(k, format):
    module = _lowered(_by_int8, _x(M, k), _weight(format, k))
    assert CALL not in module
    assert "dot_general" in module


@pytest.mark.usefixtures("hopper")
def test_auto_is_gemm_sm90_a8_where_all_gpus_have_it(monkeypatch):
    x, w = _x(M, K), _weight(qg.int4(128))
    assert CALL not in _lowered(_by_int8, x, w, "tpu")
    assert CALL not in _lowered(functools.partial(qg.matmul, x_format="int8", kernel="dense"), x, w)
    monkeypatch.setattr(integer_primitive, "has_gemm_sm90", lambda: False)
    assert CALL not in _lowered(_by_int8, x, w)
    assert CALL in _lowered(functools.partial(qg.matmul, x_format="int8", kernel="gemm_sm90_a8"), x, w)


@pytest.mark.usefixtures("hopper")
def test_gemm_sm90_a8_of_a_symbolic_number_of_rows():
    (m,) = export.symbolic_shape("m")
    module = _lowered(_by_int8, _x(m, K), _weight(qg.int4(128)))
    assert module.count(CALL) == 1
