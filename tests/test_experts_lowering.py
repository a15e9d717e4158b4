"""What products with weights chosen by index compile to: custom calls that read the stack where it lies."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_weight
from jax import export
from test_errors import shape

import jax_qgemm as qg
from jax_qgemm._registration import DEQUANTIZE_TARGET, FUSED_MATMUL_TARGET, MATMUL_TARGET
from jax_qgemm.formats import get_format

needs_cuda_build = pytest.mark.skipif(not qg.build_info().cuda, reason="needs a build with CUDA")
COUNT = 4


def _block(x, w, experts):
    """All of a layer that the kernel takes."""
    return qg.expert_matmul(x[:, None], w, experts, bias=jnp.ones((COUNT, 384)), activation="silu")


# function of x (5, 512), a stack of weights (512, 384) and experts (5, 2); stacks mapped over, custom calls
OPS = {
    "plain": (lambda x, w, experts: qg.expert_matmul(x[:, None], w, experts), False, 1),
    "epilogue": (_block, False, 1),
    "grad": (jax.grad(lambda x, w, e: jnp.sum(qg.expert_matmul(x[:, None], w, e) ** 2)), False, 2),
    "vmap over experts": (jax.vmap(qg.expert_matmul, (None, None, 1), 1), False, 1),
    "vmap over w": (jax.vmap(_block, (None, 0, None)), True, 1),
    "scan over layers": (lambda x, w, e: jax.lax.scan(lambda _, w: (None, _block(x, w, e)), None, w)[1], True, 1),
}
# An instruction that gives what planes may be: unsigned integers of three axes or more.
_PLANE = re.compile(r"^\s+(?:ROOT )?%[\w.-]+ = u\d+\[\d+,\d+,[\d,]+\]\S* ([\w-]+)\(", re.MULTILINE)


def _operands_of(op, format):
    function, stacked, calls = OPS[op]
    w, _ = random_weight(get_format(format), 384, 512, np.random.default_rng(0), batch=COUNT)
    if stacked:
        w = jax.tree.map(lambda a: np.stack([a] * 3), w)
    return function, (np.ones((5, 512), np.float32), w, np.zeros((5, 2), np.int32)), calls


def _compiled(op, format):
    function, operands, calls = _operands_of(op, format)
    text = jax.jit(function).lower(*operands).compile().as_text()
    assert text is not None
    targets = f'custom_call_target="(?:{MATMUL_TARGET}|{FUSED_MATMUL_TARGET})"'
    assert len(re.findall(targets, text)) == calls, text
    return text


@pytest.mark.parametrize("op", [op for op in OPS if op != "scan over layers"])
@pytest.mark.parametrize("format", ["q4_k", "int4", "q8_0"])
def test_weights_are_read_where_they_lie(format, op):
    """Planes go from the parameters to the call."""
    opcodes = set(_PLANE.findall(_compiled(op, format)))
    assert {"parameter"} <= opcodes <= {"parameter", "bitcast"}


def test_the_check_for_copies_finds_them():
    _, operands, _ = _operands_of("plain", "q4_0")
    reference = functools.partial(qg.expert_matmul, kernel="reference")
    text = jax.jit(lambda x, w, e: reference(x[:, None], w, e)).lower(*operands).compile().as_text()
    assert set(_PLANE.findall(text or "")) - {"parameter", "bitcast"}


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("format", ["q4_k", "int4", "q8_0"])
def test_gpu_weights_are_read_where_they_lie(format, op):
    """Of a scan, the slices of a layer are fused into the call, which then gets base + offset."""
    slices = {"dynamic-slice"} if op == "scan over layers" else set()
    assert set(_PLANE.findall(_compiled(op, format))) <= {"parameter", "bitcast", "get-tuple-element"} | slices


@needs_cuda_build
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("op", OPS)
def test_cuda_lowering_exports(op, dtype):
    function, (x, w, experts), calls = _operands_of(op, "q4_k")
    checks = qg.export_safety_checks()
    exporter = export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)
    module = exporter(jax.ShapeDtypeStruct(x.shape, dtype), w, experts).mlir_module()
    assert sum(module.count(f"custom_call @{target}") for target in (MATMUL_TARGET, FUSED_MATMUL_TARGET)) == calls


@needs_cuda_build
def test_cuda_decodes_chosen_rows_alone():
    """The kernel "dense" gives the experts to the decoder."""
    w, _ = random_weight(get_format("q4_0"), 48, 64, np.random.default_rng(0), batch=COUNT)
    function = functools.partial(qg.expert_matmul, kernel="dense")
    checks = qg.export_safety_checks()
    exporter = export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)
    module = exporter(shape(5, 3, 64), w, shape(5, dtype=jnp.int32)).mlir_module()
    assert module.count(f"custom_call @{DEQUANTIZE_TARGET}") == 1
    assert "gather" not in module


def test_other_platforms_get_the_reference():
    w, _ = random_weight(get_format("q4_0"), 48, 64, np.random.default_rng(0), batch=COUNT)
    checks = qg.export_safety_checks()
    exporter = export.export(jax.jit(qg.expert_matmul), platforms=["tpu"], disabled_checks=checks)
    module = exporter(shape(5, 64), w, shape(5, dtype=jnp.int32)).mlir_module()
    assert MATMUL_TARGET not in module
    assert "dot_general" in module
