"""What quantized activations are lowered to: one custom call for CUDA, XLA's operations elsewhere; and on meshes."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_weight
from jax import export
from quantize_oracle import FORMATS, assert_same, expected

import jax_qgemm as qg
from jax_qgemm._registration import QUANTIZE_TARGET
from jax_qgemm.ops.quantize import quantize_p

X = jax.ShapeDtypeStruct((3, 5, 64), jnp.bfloat16)


@pytest.fixture
def build(monkeypatch):
    """Says whether the build has CUDA, which is all that lowering for CUDA asks of the native module."""

    def says(cuda: bool) -> None:
        info = dataclasses.replace(qg.build_info(), cuda=cuda)
        monkeypatch.setattr("jax_qgemm._registration.build_info", lambda: info)

    return says


def _quantizer(format):
    return functools.partial(qg.quantize_activations, format=format)


def _export(function, *arguments, platform="cuda"):
    checks = qg.export_safety_checks()
    return export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)(*arguments)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("format", FORMATS)
def test_one_call_and_nothing_else_for_cuda(build, format, dtype):
    build(cuda=True)
    function, x = _quantizer(format), jax.ShapeDtypeStruct(X.shape, dtype)
    for quantize in (function, jax.vmap(function), jax.vmap(jax.vmap(function), 1)):
        module = _export(quantize, x).mlir_module()
        assert module.count(f"custom_call @{QUANTIZE_TARGET}") == module.count("custom_call @") == 1
        assert f'format = "{format}"' in module
        assert not any(f"stablehlo.{op}" in module for op in ("reduce", "divide", "multiply", "convert"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_build_without_cuda_refuses_to_lower_for_cuda(build, format):
    build(cuda=False)
    with pytest.raises(RuntimeError, match=r"built without CUDA.*JAX_QGEMM_CUDA"):
        _export(_quantizer(format), X)


def test_rows_may_be_symbolic(build):
    build(cuda=True)
    (rows,) = export.symbolic_shape("rows")
    exported = _export(_quantizer("int8"), jax.ShapeDtypeStruct((rows, 64), jnp.float16))
    assert exported.mlir_module().count(f"custom_call @{QUANTIZE_TARGET}") == 1
    assert [str(aval.shape) for aval in exported.out_avals] == ["(rows, 64)", "(rows, 1)"]


@pytest.mark.parametrize("platform", ["cpu", "tpu", "rocm"])
@pytest.mark.parametrize("format", FORMATS)
def test_other_platforms_have_xla_operations(format, platform):
    module = _export(_quantizer(format), X, platform=platform).mlir_module()
    assert "custom_call @" not in module
    assert "stablehlo.reduce" in module


@pytest.mark.parametrize("x_format", ["int8", "fp8"])
def test_products_quantize_by_it(build, x_format):
    build(cuda=True)
    w, _ = random_weight(qg.int4(64), 48, 64, np.random.default_rng(0))
    matmul = functools.partial(qg.matmul, x_format=x_format, kernel="dense")
    assert _export(matmul, X, w).mlir_module().count(f"custom_call @{QUANTIZE_TARGET}") == 1
    trained = jax.value_and_grad(lambda x, w: jnp.sum(matmul(x, w, straight_through=True).astype(jnp.float32)))
    assert _export(trained, X, w).mlir_module().count(f"custom_call @{QUANTIZE_TARGET}") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_gpu_quantizes_once_for_several_uses(format):
    quantize = _quantizer(format)

    def several(x):
        return [quantize(x).dequantize() * i for i in range(1, 4)]

    text = jax.jit(several).lower(jnp.ones((4, 64))).compile().as_text()
    assert str(text).count(f'custom_call_target="{QUANTIZE_TARGET}"') == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("format", FORMATS)
def test_gpu_slices_at_any_address(format, dtype):
    """XLA hands a slice to the handler as base + offset."""
    k = 32 if format == "q8_1" else 33
    x = np.random.default_rng(0).standard_normal((7 * 3 * k + 1,)).astype(dtype)

    @jax.jit
    def sliced(x):
        return [quantize_p.bind(x[i * 3 * k + i % 2 :][: 3 * k].reshape(3, k), format=format) for i in range(7)]

    for i, parts in enumerate(sliced(jnp.asarray(x))):
        rows = x[i * 3 * k + i % 2 :][: 3 * k].reshape(3, k)
        assert_same(tuple(parts), expected(rows, format))


def _types(*results):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]


ONES = np.ones((2, 64), np.float32)
CODES, SCALES = ((2, 64), "int8"), ((2, 1), "float32")


# An exported function may come from anywhere.
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("format", "x", "results", "problem"),
    [
        ("q4_0", ONES, [CODES, SCALES], "unknown activation format q4_0"),
        ("int8", ONES.astype(np.int32), [CODES, SCALES], "x must be f16, bf16 or f32"),
        ("int8", ONES[0, 0], [((), "int8"), ((1,), "float32")], "x must have an axis"),
        ("q8_1", ONES[:, :33], [((2, 33), "int8"), SCALES, SCALES], "k = 33, expected a positive multiple of 32"),
        ("int8", ONES, [CODES, SCALES, SCALES], "must be codes, scales and, of q8_1, sums"),
        ("q8_1", ONES, [CODES, ((2, 2), "float16")], "must be codes, scales and, of q8_1, sums"),
        ("fp8", ONES, [CODES, SCALES], "codes have the wrong type"),
        ("int8", ONES, [((2, 32), "int8"), SCALES], "codes have the wrong shape"),
        ("int8", ONES, [CODES, ((2, 1), "float16")], "scales have the wrong type"),
        ("int8", ONES, [CODES, ((2, 2), "float32")], "scales have the wrong shape"),
        ("q8_1", ONES, [CODES, ((2, 2), "float16"), ((2, 2), "int32")], "sums have the wrong type"),
        ("q8_1", ONES, [CODES, ((2, 2), "float16"), ((2, 1), "int16")], "sums have the wrong shape"),
    ],
)
def test_gpu_handler_refuses(format, x, results, problem):
    call = jax.ffi.ffi_call(QUANTIZE_TARGET, _types(*results))
    with pytest.raises(Exception, match=problem):
        jax.block_until_ready(call(x, format=format))


SHARDED = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from quantize_oracle import FORMATS, assert_same, expected
import jax_qgemm as qg

assert jax.device_count() == 4, jax.devices()
x = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)

def check(quantized, format, spec=None):
    parts = [part for part in (quantized.codes, quantized.scales, quantized.sums) if part is not None]
    for part in parts if spec is not None else ():
        assert jax.typeof(part).sharding.spec == spec, jax.typeof(part)
    assert_same(tuple(parts), expected(x, format))

for format in FORMATS:
    quantize = functools.partial(qg.quantize_activations, format=format)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    for spec in (P("d"), P(None, "d")):
        check(jax.jit(quantize)(jax.device_put(x, NamedSharding(mesh, spec))), format)
    local = jax.shard_map(quantize, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    check(jax.jit(local)(x), format)
    with jax.set_mesh(jax.make_mesh((4,), ("e",), axis_types=(AxisType.Explicit,))):
        for spec, out_spec in ((P("e"), P("e", None)), (P(None, "e"), P(None, None))):
            check(jax.jit(quantize)(jax.device_put(x, spec)), format, out_spec)
print("right")
"""


def test_sharded_activations():
    here = Path(__file__).parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
    }
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "right"
