"""Every bad call raises under `jax.eval_shape`, naming the argument, what came and what was expected."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_weight

import jax_qgemm as qg
from jax_qgemm.ops.matmul_primitive import qmatmul_p

K, N = 64, 48
W = random_weight(qg.formats.get_format("q4_0"), N, K, np.random.default_rng(0))[0]
STACK = random_weight(qg.formats.get_format("q4_0"), N, K, np.random.default_rng(0), batch=3)[0]
F32 = jnp.float32


def shape(*dims, dtype=F32):
    return jax.ShapeDtypeStruct(dims, dtype)


def with_planes(*planes):
    return qg.QTensor(planes, W.format, W.padding)


CODES, SCALES = W.planes
X = shape(5, K)

# keyword arguments of matmul, error, and words that the message must hold
MATMUL = {
    "x is a list": ({"x": [1.0]}, TypeError, ["x must be an array", "list"]),
    "x is an integer": ({"x": shape(5, K, dtype=jnp.int8)}, TypeError, ["x must be float16", "int8"]),
    "x is complex": ({"x": shape(5, K, dtype=jnp.complex64)}, TypeError, ["x must be float16", "complex64"]),
    "x is fp8": ({"x": shape(5, K, dtype=jnp.float8_e4m3fn)}, TypeError, ["x must be", "float8_e4m3fn"]),
    "x is a scalar": ({"x": shape()}, ValueError, ["x has shape ()", "(..., 64)"]),
    "x has another k": ({"x": shape(5, 65)}, ValueError, ["x has shape (5, 65)", "(64, 48)", "(..., 64)"]),
    "x is transposed": ({"x": shape(K, 5)}, ValueError, ["x has shape (64, 5)", "(..., 64)"]),
    "x has n": ({"x": shape(5, N)}, ValueError, ["x has shape (5, 48)", "(..., 64)"]),
    "w is dense": ({"w": shape(K, N)}, TypeError, ["w must be a QTensor", "float32[64, 48]"]),
    "w is None": ({"w": None}, TypeError, ["w must be a QTensor", "NoneType"]),
    "w is stacked": (
        {"w": STACK},
        ValueError,
        ["w must be one weight of shape (k, n)", "(3, 64, 48)", "vmap"],
    ),
    "bias is a list": ({"bias": [0.0] * N}, TypeError, ["bias must be an array", "list"]),
    "bias has k": ({"bias": shape(K)}, ValueError, ["bias has shape (64,)", "expected (48,)"]),
    "bias is a matrix": ({"bias": shape(5, N)}, ValueError, ["bias has shape (5, 48)", "expected (48,)"]),
    "bias is an integer": ({"bias": shape(N, dtype=jnp.int32)}, TypeError, ["bias must be float16", "int32"]),
    "residual is short": (
        {"residual": shape(4, N)},
        ValueError,
        ["residual has shape (4, 48)", "expected (5, 48)"],
    ),
    "residual is a row": (
        {"residual": shape(N)},
        ValueError,
        ["residual has shape (48,)", "expected (5, 48)"],
    ),
    "residual is bool": (
        {"residual": shape(5, N, dtype=bool)},
        TypeError,
        ["residual must be float16", "bool"],
    ),
    "activation": ({"activation": "swish"}, ValueError, ["activation must be one of", "silu", "'swish'"]),
    "activation is a function": (
        {"activation": jax.nn.relu},
        ValueError,
        ["activation must be one of", "relu"],
    ),
    "out_dtype is int": ({"out_dtype": jnp.int32}, TypeError, ["out_dtype must be float16", "int32"]),
    "out_dtype is f64": ({"out_dtype": np.float64}, TypeError, ["out_dtype must be float16", "float64"]),
    "precision": ({"precision": "exact"}, ValueError, ["precision must be", "'highest'", "'exact'"]),
    "precision is a number": ({"precision": 3}, ValueError, ["precision must be", "3"]),
    "kernel": ({"kernel": "fast"}, ValueError, ["kernel must be 'auto' or one of", "gemm_sm80", "'fast'"]),
    "too few planes": ({"w": with_planes(CODES)}, ValueError, ["w", "1", "2", "q4_0"]),
    "too many planes": ({"w": with_planes(CODES, SCALES, SCALES)}, ValueError, ["w", "3", "2", "q4_0"]),
    "a plane of another type": (
        {"w": with_planes(CODES, SCALES.astype(np.int16))},
        ValueError,
        ["'scales'", "int16", "uint16[3, 1, 32]"],
    ),
    "a plane of another shape": (
        {"w": with_planes(CODES, SCALES[:2])},
        ValueError,
        ["'scales'", "uint16[2, 1, 32]", "uint16[3, 1, 32]"],
    ),
    "a plane cast to float": (
        {"w": with_planes(CODES, SCALES.astype(np.float16))},
        ValueError,
        ["'scales'", "float16", "uint16[3, 1, 32]"],
    ),
    "a stacked scale": (
        {"w": with_planes(CODES, SCALES[None])},
        ValueError,
        ["'scales'", "uint16[1, 3, 1, 32]"],
    ),
}


def assert_holds(error: Exception, words: list[str]) -> None:
    for word in words:
        assert word in str(error), f"{word!r} is missing in: {error}"


def eval_shape(function, arguments):
    """`jax.eval_shape` with those arguments abstract that are given as shapes."""
    abstract = {k: v for k, v in arguments.items() if isinstance(v, jax.ShapeDtypeStruct)}
    rest = {k: v for k, v in arguments.items() if k not in abstract}
    return jax.eval_shape(functools.partial(function, **rest), **abstract)


@pytest.mark.parametrize(("arguments", "error", "words"), MATMUL.values(), ids=MATMUL)
def test_matmul(arguments, error, words):
    with pytest.raises(error) as caught:
        eval_shape(qg.matmul, {"x": X, "w": W} | arguments)
    assert_holds(caught.value, words)


def test_matmul_of_too_few_arguments():
    with pytest.raises(TypeError, match="w"):
        qg.matmul(np.ones((5, K), np.float32))  # pyright: ignore[reportCallIssue]


def bind(x, *planes, batch_ndim):
    return qmatmul_p.bind(
        x, *planes, format=W.format, padding=W.padding, has_experts=False, batch_ndim=batch_ndim, transpose=False,
        out_dtype="float32", highest=False, kernel="auto",
    )  # fmt: skip


def test_primitive():
    """It checks for itself: vmap and the transpose rule bind it too."""
    x = np.ones((2, 5, K), np.float32)
    with pytest.raises(ValueError, match=r"w has 1 planes, but format q4_0 has 2"):
        bind(x, CODES, batch_ndim=0)
    with pytest.raises(ValueError, match=r"'codes'.*\[3, 3, 1, 128\], expected .*\[2, 3, 1, 128\]"):
        bind(x, *STACK.planes, batch_ndim=1)


INT = shape(3, dtype=jnp.int32)
TAKE = {
    "w is dense": ({"w": shape(K, N)}, TypeError, ["w must be a QTensor", "float32[64, 48]"]),
    "w is stacked": ({"w": STACK}, ValueError, ["w must be one weight", "(3, 64, 48)"]),
    "indices are floats": ({"indices": shape(3)}, TypeError, ["indices must be integers", "float32"]),
    "indices are bools": ({"indices": shape(3, dtype=bool)}, TypeError, ["indices must be integers", "bool"]),
    "dtype": ({"dtype": jnp.int32}, TypeError, ["dtype must be float16", "int32"]),
}


@pytest.mark.parametrize(("arguments", "error", "words"), TAKE.values(), ids=TAKE)
def test_take(arguments, error, words):
    with pytest.raises(error) as caught:
        eval_shape(qg.take, {"w": W, "indices": INT} | arguments)
    assert_holds(caught.value, words)


QUANTIZE = {
    "w is an integer": ((shape(K, N, dtype=jnp.int32), "q4_0"), TypeError, ["w must be a float16", "int32"]),
    "w is a vector": ((shape(K), "q4_0"), ValueError, ["w must have shape (*batch, k, n)", "(64,)"]),
    "k is no multiple": (
        (shape(33, N), "q4_0"),
        ValueError,
        ["k = 33", "(33, 48)", "q4_0", "multiple of 32"],
    ),
    "k is zero": ((shape(0, N), "q4_0"), ValueError, ["k = 0", "multiple of 32"]),
    "k of a k-quant": ((shape(K, N), "q4_k"), ValueError, ["k = 64", "q4_k", "multiple of 256"]),
    "k of a group": ((shape(K, N), "int4"), ValueError, ["k = 64", "int4", "multiple of 128"]),
    "unknown format": ((shape(K, N), "q4_9"), ValueError, ["'q4_9'", "q4_0", "int4"]),
    "format is a number": ((shape(K, N), 4), TypeError, ["format must be a name or a Format", "int"]),
}


@pytest.mark.parametrize(("arguments", "error", "words"), QUANTIZE.values(), ids=QUANTIZE)
def test_quantize(arguments, error, words):
    w, format = arguments
    with pytest.raises(error) as caught:
        jax.eval_shape(lambda w: qg.quantize(w, format), w)
    assert_holds(caught.value, words)


def test_quantize_of_a_list():
    with pytest.raises(TypeError, match=r"w must be .* got list"):
        qg.quantize([[1.0]], "q4_0")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_quantize_of_values_that_are_not_finite(bad):
    w = np.ones((K, 16), np.float32)
    w[3, 5] = bad
    with pytest.raises(ValueError, match=r"w has values that are not finite.*q8_0"):
        qg.quantize(w, "q8_0")


def test_quantize_of_values_too_large():
    """Eager: an error. Under jit, where values are unknown: clamped to what the format holds."""
    w = np.full((K, 16), 6e5, np.float32)
    with pytest.raises(ValueError, match=r"w has values too large for format q4_0"):
        qg.quantize(w, "q4_0")
    clamped = np.asarray(jax.jit(lambda w: qg.quantize(w, "q4_0"))(w).dequantize())
    assert np.isfinite(clamped).all()
    np.testing.assert_array_equal(clamped, np.full((K, 16), 8 * 65504, np.float32))


RAW = {
    "raw is int8": (np.zeros((4, 18), np.int8), "q4_0", TypeError, ["raw must be a uint8 array", "int8"]),
    "raw is bytes": (b"abc", "q4_0", TypeError, ["raw must be a uint8 array", "bytes"]),
    "raw is a vector": (np.zeros(18, np.uint8), "q4_0", ValueError, ["(*batch, n, row bytes)", "(18,)"]),
    "part of a block": (np.zeros((4, 19), np.uint8), "q4_0", ValueError, ["multiple of 18", "(4, 19)"]),
    "no block": (np.zeros((4, 0), np.uint8), "q4_0", ValueError, ["multiple of 18", "(4, 0)"]),
    "integers have no block": (
        np.zeros((4, 18), np.uint8),
        "int4",
        ValueError,
        ["int4", "no GGUF block", "q4_0"],
    ),
    "unknown format": (np.zeros((4, 18), np.uint8), "q9", ValueError, ["'q9'", "q4_0"]),
}


@pytest.mark.parametrize(("raw", "format", "error", "words"), RAW.values(), ids=RAW)
def test_from_gguf_bytes(raw, format, error, words):
    with pytest.raises(error) as caught:
        qg.QTensor.from_gguf_bytes(raw, format)
    assert_holds(caught.value, words)


def test_to_gguf_bytes():
    integers = random_weight(qg.int4(32), 16, 64, np.random.default_rng(0))[0]
    with pytest.raises(ValueError, match=r"int4.*no GGUF block"):
        integers.to_gguf_bytes()
    scaled = qg.QTensor(W.planes, W.format, W.padding, global_scale=jnp.float32(2))
    with pytest.raises(ValueError, match="global_scale"):
        scaled.to_gguf_bytes()


@pytest.mark.parametrize("make", [qg.int2, qg.int3, qg.int4, qg.int8])
def test_integer_formats(make):
    with pytest.raises(ValueError, match=r"group_size must be one of \(16, 32, 64, 128, 256\) or -1.*got 48"):
        make(48)
    with pytest.raises(ValueError, match="got 0"):
        make(0)
    with pytest.raises(ValueError, match=r"scale_dtype must be one of .*float16.*got 'float64'"):
        make(64, scale_dtype="float64")


@pytest.mark.parametrize("dtype", ["int8", "float64"])
def test_dequantize(dtype):
    with pytest.raises(TypeError, match=rf"dtype must be float16, bfloat16 or float32, got {dtype}"):
        W.dequantize(dtype)


def test_kernel_of_another_platform():
    """Known only when the function is lowered; the error says which platform the kernel serves."""
    x = np.ones((5, K), np.float32)
    function = jax.jit(functools.partial(qg.matmul, kernel="gemm_sm80"))
    message = r"kernel='gemm_sm80' serves cuda, but .* lowered for cpu"
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(ValueError, match=message):
        function(x, W)
