"""Bad calls of products with an epilogue, of gated ones, and of what makes their weights; as in test_errors.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_weight
from test_errors import STACK, K, N, W, X, assert_holds, eval_shape, shape

import jax_qgemm as qg
from jax_qgemm._registration import FUSED_MATMUL_TARGET
from jax_qgemm.ops import fused_primitive

GATED_W = qg.interleave_gate_up(W, W)  # (64, 96)
OTHER = random_weight(qg.formats.get_format("q4_1"), N, K, np.random.default_rng(0))[0]
GATED = {
    "w is dense": ({"w": shape(K, N)}, TypeError, ["w must be a QTensor", "float32[64, 48]"]),
    "w is stacked": ({"w": qg.interleave_gate_up(STACK, STACK)}, ValueError, ["w must be one weight", "(3, 64, 96)"]),
    "w has an odd number of tiles": ({"w": W}, ValueError, ["w has shape (64, 48)", "interleave_gate_up"]),
    "w is a list": ({"w": [W, W]}, TypeError, ["w must be a QTensor", "list"]),
    "w is three": ({"w": (W, W, W)}, ValueError, ["w must be a pair", "3 entries"]),
    "half of w is dense": ({"w": (W, 1.0)}, TypeError, ["w[1] must be a QTensor", "float"]),
    "halves of two shapes": ({"w": (W, GATED_W)}, ValueError, ["w[0] and w[1]", "(64, 48)", "(64, 96)"]),
    "x has another k": ({"x": shape(5, 65)}, ValueError, ["x has shape (5, 65)", "(..., 64)"]),
    "bias of one half": ({"bias": shape(N)}, ValueError, ["bias has shape (48,)", "expected (96,)"]),
    "bias of a pair": ({"bias": (None, None)}, TypeError, ["bias must be an array", "tuple"]),
    "one bias for a pair": ({"w": (W, W), "bias": shape(2 * N)}, ValueError, ["bias must be a pair"]),
    "residual of both halves": (
        {"residual": shape(5, 2 * N)},
        ValueError,
        ["residual has shape (5, 96)", "expected (5, 48)"],
    ),
    "residual of a pair": (
        {"w": (W, W), "residual": shape(5, 1)},
        ValueError,
        ["residual has shape (5, 1)", "(5, 48)"],
    ),
    "activation": ({"activation": "swish"}, ValueError, ["activation must be one of", "silu", "'swish'"]),
    "out_dtype": ({"out_dtype": jnp.int32}, TypeError, ["out_dtype must be float16", "int32"]),
    "out_dtype of a pair": ({"w": (W, W), "out_dtype": jnp.int32}, TypeError, ["out_dtype must be float16", "int32"]),
    "kernel": ({"kernel": "fast"}, ValueError, ["kernel must be 'auto' or one of", "'fast'"]),
}


@pytest.mark.parametrize(("arguments", "error", "words"), GATED.values(), ids=GATED)
def test_gated_matmul(arguments, error, words):
    with pytest.raises(error) as caught:
        eval_shape(qg.gated_matmul, {"x": X, "w": GATED_W} | arguments)
    assert_holds(caught.value, words)


def with_metadata(**metadata):
    return qg.QTensor(W.planes, W.format, W.padding, **metadata)


TAIL = random_weight(qg.formats.get_format("q4_0"), 40, K, np.random.default_rng(0))[0]
INTERLEAVE = {
    "two formats": (W, OTHER, ValueError, ["same format", "q4_0", "q4_1"]),
    "two shapes": (W, STACK, ValueError, ["same shape", "(64, 48)", "(3, 64, 48)"]),
    "part of a tile": (TAIL, TAIL, ValueError, ["n = 40", "multiples of 16"]),
    "one permutation": (W, with_metadata(permutation=np.arange(K)), ValueError, ["the same permutation"]),
    "two input scales": (
        with_metadata(input_scale=np.ones(K)),
        with_metadata(input_scale=np.full(K, 2.0)),
        ValueError,
        ["the same input_scale"],
    ),
    "global scale": (with_metadata(global_scale=np.float32(1)), W, ValueError, ["no global_scale"]),
    "a weight and an array": (W, np.ones(N, np.float32), TypeError, ["two QTensors or two float arrays", "QTensor"]),
    "lists": ([1.0], [1.0], TypeError, ["two QTensors or two float arrays", "list"]),
    "integers": (np.ones(16, int), np.ones(16, int), TypeError, ["two float arrays", "int64"]),
    "arrays of two shapes": (
        np.ones(16, np.float32),
        np.ones(32, np.float32),
        ValueError,
        ["float32[16]", "float32[32]"],
    ),
    "arrays of two types": (
        np.ones(16, np.float32),
        np.ones(16, np.float16),
        ValueError,
        ["float32[16]", "float16[16]"],
    ),
    "part of an array's tile": (np.ones(8, np.float32), np.ones(8, np.float32), ValueError, ["n = 8"]),
}


@pytest.mark.parametrize(("gate", "up", "error", "words"), INTERLEAVE.values(), ids=INTERLEAVE)
def test_interleave_gate_up(gate, up, error, words):
    with pytest.raises(error) as caught:
        qg.interleave_gate_up(gate, up)
    assert_holds(caught.value, words)


FUSED = {
    "bias is an integer": ({"bias": shape(N, dtype=jnp.int32)}, TypeError, ["bias must be float16", "int32"]),
    "bias of another batch": ({"bias": shape(2, N)}, ValueError, ["bias has shape (2, 48)", "(48,) or (3, 48)"]),
    "bias of no columns": ({"bias": shape(1)}, ValueError, ["bias has shape (1,)", "(48,) or (3, 48)"]),
    "residual is a row": ({"residual": shape(N)}, ValueError, ["residual has shape (48,)", "expected (3, 5, 48)"]),
    "scale is f16": ({"scale": shape(3, dtype=jnp.float16)}, ValueError, ["global_scale has float16[3]", "float32 ()"]),
    "scale of another batch": ({"scale": shape(5)}, ValueError, ["global_scale has float32[5]", "(3,)"]),
    "gated, an odd number of tiles": ({"gated": True}, ValueError, ["w has n = 48", "multiple of 32"]),
    "activation": ({"activation": "swish"}, ValueError, ["activation must be one of", "'swish'"]),
}


@pytest.mark.parametrize(("arguments", "error", "words"), FUSED.values(), ids=FUSED)
def test_fused_primitive(arguments, error, words):
    """A batch of 3 weights: what vmap and the derivatives bind."""

    def function(**operands):
        params = {"has_experts": False, "batch_ndim": 1, "out_dtype": "float32", "highest": False, "kernel": "auto"}
        params |= {"activation": None, "gated": False, "scale": None, "bias": None, "residual": None} | operands
        return fused_primitive.bind(weights=STACK.planes, format=W.format, padding=W.padding, **params)

    with pytest.raises(error) as caught:
        eval_shape(function, {"x": shape(3, 5, K)} | arguments)
    assert_holds(caught.value, words)


# The handler checks again what kernels rely on: an exported function may come from anywhere.

ATTRIBUTES = {
    "format": "q4_0", "kernel": "auto", "activation": "none",
    "group_size": np.int64(0), "scale_type": np.int64(0), "batch_ndim": np.int64(1),
    **dict.fromkeys(("highest", "gated", "has_scale", "has_bias", "has_residual"), np.bool_(False)),
}  # fmt: skip
X3 = np.ones((3, 5, K), np.float32)


def f32(*shape):
    return np.ones(shape, np.float32)


# operands behind x and the planes, attributes, and words of the message
HANDLER = {
    "planes taken for others": ([], {"has_bias": True, "has_residual": True}, ["expected 2 planes, got 0"]),
    "a plane too many": ([f32(N)], {}, ["expected 2 planes, got 3"]),
    "fewer operands than flags": (
        [],
        dict.fromkeys(("has_scale", "has_bias", "has_residual"), True),
        ["expected 2 planes, got -1"],
    ),
    "activation": ([], {"activation": "swish"}, ["unknown activation swish"]),
    "gated, an odd number of tiles": ([], {"gated": True}, ["multiple of 32 columns"]),
    "scale is f16": ([np.ones(3, np.float16)], {"has_scale": True}, ["global_scale must be f32"]),
    "scale is an integer": ([np.ones(3, np.int32)], {"has_scale": True}, ["global_scale must be f16, bf16 or f32"]),
    "scale of another batch": ([f32(2)], {"has_scale": True}, ["no axes or of the batch axes"]),
    "scale of a matrix": ([f32(3, 5)], {"has_scale": True}, ["no axes or of the batch axes"]),
    "bias is an integer": ([np.ones(N, np.int32)], {"has_bias": True}, ["bias must be f16, bf16 or f32"]),
    "bias is a scalar": ([f32()], {"has_bias": True}, ["bias must have the shape"]),
    "bias is short": ([f32(N - 1)], {"has_bias": True}, ["bias must have the shape"]),
    "bias of another batch": ([f32(2, N)], {"has_bias": True}, ["bias must have the shape"]),
    "residual is complex": ([np.ones((3, 5, N), np.complex64)], {"has_residual": True}, ["residual must be f16"]),
    "residual is a row": ([f32(N)], {"has_residual": True}, ["residual must have the shape of out"]),
    "residual is short": ([f32(3, 4, N)], {"has_residual": True}, ["residual must have the shape of out"]),
}


@pytest.mark.parametrize(("operands", "attributes", "words"), HANDLER.values(), ids=HANDLER)
def test_handler(operands, attributes, words):
    attributes = ATTRIBUTES | {k: v if isinstance(v, str) else np.bool_(v) for k, v in attributes.items()}
    call = jax.ffi.ffi_call(FUSED_MATMUL_TARGET, shape(3, 5, N // 2 if attributes["gated"] else N))
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(call(X3, *STACK.planes, *operands, **attributes))
    assert_holds(caught.value, words)


def test_handler_of_good_operands():
    """Those of the table, without their faults."""
    attributes = ATTRIBUTES | {name: np.bool_(True) for name in ("has_scale", "has_bias", "has_residual")}
    call = jax.ffi.ffi_call(FUSED_MATMUL_TARGET, shape(3, 5, N))
    with jax.default_device(jax.devices("cpu")[0]):
        for scale, bias in ((f32(), f32(N)), (f32(3), f32(3, N))):
            out = call(X3, *STACK.planes, scale, bias, f32(3, 5, N), **attributes)
            expected = np.asarray(STACK.dequantize()).sum(1, keepdims=True) + 2
            np.testing.assert_allclose(np.asarray(out), np.broadcast_to(expected, (3, 5, N)), rtol=1e-4, atol=1e-4)
