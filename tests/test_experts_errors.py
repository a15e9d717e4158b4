"""Bad products with weights chosen by index are refused, in words; so are bad operands of the primitive and handler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_weight
from test_errors import assert_holds, eval_shape, shape

import jax_qgemm as qg
from jax_qgemm._registration import MATMUL_TARGET
from jax_qgemm.formats import get_format
from jax_qgemm.ops.matmul_primitive import qmatmul_p

COUNT = 4
W = random_weight(get_format("q4_0"), 48, 64, np.random.default_rng(0), batch=COUNT)[0]
X, E = shape(5, 3, 64), shape(5, dtype=jnp.int32)


def _with(planes=None, **metadata):
    return qg.QTensor(W.planes if planes is None else planes, W.format, W.padding, **metadata)


ERRORS = {
    "x is a list": ({"x": [1.0]}, TypeError, ["x must be an array", "list"]),
    "x is an integer": ({"x": shape(5, 64, dtype=jnp.int8)}, TypeError, ["x must be float16", "int8"]),
    "x has another k": ({"x": shape(5, 65)}, ValueError, ["x has shape (5, 65)", "(4, 64, 48)", "(5, ..., 64)"]),
    "x has other entries": ({"x": shape(4, 64)}, ValueError, ["x has shape (4, 64)", "experts has shape (5,)"]),
    "x has no entries": ({"x": shape(64)}, ValueError, ["x has shape (64,)", "(5, ..., 64)"]),
    "x has as many axes as experts": (
        {"x": shape(5, 64), "experts": shape(5, 64, dtype=jnp.int32)},
        ValueError,
        ["x has shape (5, 64)", "experts has shape (5, 64)", "(5, 64, ..., 64)"],
    ),
    "w is dense": ({"w": shape(4, 64, 48)}, TypeError, ["w must be a QTensor", "float32[4, 64, 48]"]),
    "w is one weight": ({"w": jax.tree.map(lambda a: a[0], W)}, ValueError, ["w must be a stack", "(64, 48)"]),
    "w is stacked twice": ({"w": jax.tree.map(lambda a: a[None], W)}, ValueError, ["(e, k, n)", "(1, 4, 64, 48)"]),
    "w is empty": ({"w": jax.tree.map(lambda a: a[:0], W)}, ValueError, ["e at least 1", "(0, 64, 48)"]),
    "experts is a list": ({"experts": [0] * 5}, TypeError, ["experts must be an array of integers", "list"]),
    "experts are floats": ({"experts": shape(5)}, TypeError, ["experts must be integers", "float32"]),
    "experts are bools": ({"experts": shape(5, dtype=bool)}, TypeError, ["experts must be integers", "bool"]),
    "bias of one": ({"bias": shape(48)}, ValueError, ["bias has shape (48,)", "expected (4, 48)"]),
    "bias of the entries": ({"bias": shape(5, 48)}, ValueError, ["bias has shape (5, 48)", "expected (4, 48)"]),
    "bias is an integer": ({"bias": shape(4, 48, dtype=jnp.int32)}, TypeError, ["bias must be float16", "int32"]),
    "activation": ({"activation": "swish"}, ValueError, ["activation must be one of", "'swish'"]),
    "out_dtype": ({"out_dtype": jnp.int32}, TypeError, ["out_dtype must be float16", "int32"]),
    "precision": ({"precision": "exact"}, ValueError, ["precision must be", "'exact'"]),
    "kernel": ({"kernel": "fast"}, ValueError, ["kernel must be 'auto' or one of", "'fast'"]),
    "one permutation": (
        {"w": _with(permutation=np.arange(64))},
        ValueError,
        ["permutation of w has shape (64,)", "(4, 64)"],
    ),
    "one global scale": (
        {"w": _with(global_scale=np.float32(1))},
        ValueError,
        ["global_scale of w has shape ()", "expected (4,)"],
    ),
    "a plane of fewer experts": (
        {"w": _with((W.planes[0], W.planes[1][:3]))},
        ValueError,
        ["'scales'", "uint16[3, 3, 1, 32]", "uint16[4, 3, 1, 32]"],
    ),
}


@pytest.mark.parametrize(("arguments", "error", "words"), ERRORS.values(), ids=ERRORS)
def test_errors(arguments, error, words):
    with pytest.raises(error) as caught:
        eval_shape(qg.expert_matmul, {"x": X, "w": W, "experts": E} | arguments)
    assert_holds(caught.value, words)


def test_stacked_weights_point_to_it():
    with pytest.raises(ValueError, match=r"jax_qgemm\.expert_matmul"):
        qg.matmul(jnp.ones((5, 64)), W)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (np.zeros(4, np.int32), r"experts has int32\[4\], expected int32\[5\]"),
        (np.zeros((5, 3), np.int32), r"experts has int32\[5, 3\], expected int32\[5\]"),
        (np.zeros(5, np.int8), r"experts has int8\[5\], expected int32\[5\]"),
    ],
    ids=str,
)
def test_primitive(experts, message):
    """It checks for itself: vmap and the transpose rule bind it too."""
    params = {"batch_ndim": 1, "transpose": False, "out_dtype": "float32", "highest": False, "kernel": "auto"}
    x = np.ones((5, 3, 64), np.float32)
    with pytest.raises(ValueError, match=message):
        qmatmul_p.bind(x, *W.planes, experts, format=W.format, padding=W.padding, has_experts=True, **params)


# The handler checks again what kernels rely on: an exported function may come from anywhere.

HANDLER = {
    "fewer experts": (W.planes, np.zeros(4, np.int32), "one index for each entry"),
    "more experts": (W.planes, np.zeros(6, np.int32), "one index for each entry"),
    "experts of another type": (W.planes, np.zeros(5, np.uint32), "expected 2 planes, got 3"),
    "one weight": ([p[0] for p in W.planes], np.zeros(5, np.int32), "one axis of weights"),
    "a plane of fewer experts": ((W.planes[0], W.planes[1][:3]), np.zeros(5, np.int32), "plane 1 .* wrong shape"),
    "no weights": ([p[:0] for p in W.planes], np.zeros(5, np.int32), "must hold a weight"),
}


@pytest.mark.parametrize(("planes", "experts", "message"), HANDLER.values(), ids=HANDLER)
def test_handler(planes, experts, message):
    attributes = {
        "format": "q4_0", "kernel": "auto", "highest": np.bool_(False), "transpose": np.bool_(False),
        **{name: np.int64(value) for name, value in (("group_size", 0), ("scale_type", 0), ("batch_ndim", 1))},
    }  # fmt: skip
    call = jax.ffi.ffi_call(MATMUL_TARGET, shape(5, 3, 48))
    x = np.ones((5, 3, 64), np.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(call(x, *planes, experts, **attributes))
        out = call(x, *W.planes, np.array([3, 0, 3, -2, 9], np.int32), **attributes)
        expected = np.asarray(W.dequantize(), np.float64).sum(1, keepdims=True)[[3, 0, 3, 0, 3]]
        np.testing.assert_allclose(np.asarray(out), np.broadcast_to(expected, out.shape), rtol=1e-4, atol=1e-4)
