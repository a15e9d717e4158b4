"""Quantized activations against numpy in float32, operation by operation; q8_1 as ggml has them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantize_oracle
from jax import export

import jax_qgemm as qg
from jax_qgemm.formats import activations
from jax_qgemm.formats.activations import QActivations, q8_1_from_bytes, q8_1_to_bytes
from jax_qgemm.ops import quantize_activations

pytestmark = pytest.mark.usefixtures("backend")

F32 = np.float32


def round_away(a: np.ndarray) -> np.ndarray:
    """C's roundf."""
    return np.copysign(np.floor(np.abs(a.astype(np.float64)) + 0.5), a)


def q8_1(x: np.ndarray, convention: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (..., k/32, 32), float32 d and s (..., k/32) of quantize_row_q8_1_ref or of quantize_q8_1 in CUDA."""
    groups = x.astype(F32).reshape(*x.shape[:-1], -1, 32)
    d = np.abs(groups).max(-1) / F32(127)
    if convention == "cpu":
        inverse = np.where(d == 0, F32(0), F32(1) / np.where(d == 0, F32(1), d))
        codes = round_away(groups * inverse[..., None])
        return codes.astype(np.int8), d, codes.sum(-1).astype(F32) * d
    codes = round_away(groups / np.where(d == 0, F32(1), d)[..., None])
    lanes = groups
    for offset in (16, 8, 4, 2, 1):  # __shfl_xor_sync: every lane adds that of lane ^ offset
        lanes = lanes + lanes[..., np.arange(32) ^ offset]
    return codes.astype(np.int8), d, lanes[..., 0]


def samples() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 64, 256)).astype(F32)
    x[1] = np.round(x[1] * 8)  # ties
    x[2] *= np.exp2(rng.integers(-10, 12, (64, 8))).repeat(32, 1)
    x[3, :, ::3] = 0
    x[4, ::2] = 0
    x[5] = rng.integers(-127, 128, (64, 256)) / 2
    x[5, :, ::32] = 127
    return x


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_codes_scales_and_sums(dtype, jit):
    x = samples().astype(dtype)
    quantized = (jax.jit(quantize_activations) if jit else quantize_activations)(jnp.asarray(x))
    codes, d, _ = q8_1(x, "cpu")
    assert quantized.codes.dtype == np.int8
    assert quantized.scales.dtype == np.float16
    assert quantized.sums is not None
    assert quantized.sums.dtype == np.int16
    assert quantized.format == "q8_1"
    assert quantized.shape == quantized.codes.shape == x.shape
    np.testing.assert_array_equal(quantized.codes, codes.reshape(x.shape))
    np.testing.assert_array_equal(quantized.scales, d.astype(np.float16))
    np.testing.assert_array_equal(quantized.sums, codes.astype(np.int64).sum(-1))


def test_dequantize_is_scale_times_code():
    x = samples()
    quantized = quantize_activations(x)
    exact = np.asarray(quantized.codes, np.float64).reshape(*x.shape[:-1], -1, 32)
    exact = (exact * np.asarray(quantized.scales, np.float64)[..., None]).reshape(x.shape)
    np.testing.assert_array_equal(quantized.dequantize(), exact.astype(F32))
    for dtype in (jnp.float16, jnp.bfloat16):
        got = quantized.dequantize(dtype)
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got), exact.astype(F32).astype(dtype))
    error = exact[0] - x[0]
    assert np.sum(error**2) / np.sum(x[0].astype(np.float64) ** 2) <= 6e-5


@pytest.mark.parametrize("convention", ["cpu", "cuda"])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_ggml_blocks(convention, jit):
    x = samples()
    codes, d, s = q8_1(x, convention)
    expected = np.concatenate(
        [
            d.astype(np.float16)[..., None].view(np.uint8),
            s.astype(np.float16)[..., None].view(np.uint8),
            codes.view(np.uint8),
        ],
        axis=-1,
    ).reshape(*x.shape[:-1], -1)
    assert expected.shape[-1] == 256 // 32 * 36
    to_bytes = jax.jit(q8_1_to_bytes, static_argnums=1) if jit else q8_1_to_bytes
    raw = to_bytes(x, convention)
    np.testing.assert_array_equal(raw, expected)
    read = q8_1_from_bytes(raw)
    np.testing.assert_array_equal(read.codes, codes.reshape(x.shape))
    np.testing.assert_array_equal(read.scales, d.astype(np.float16))
    np.testing.assert_array_equal(read.sums, codes.astype(np.int64).sum(-1))


def test_values_beyond_float16_scales_are_clamped():
    largest = np.finfo(F32).max
    x = np.ones((4, 64), F32)
    x[0, :32] = largest
    x[1, :32] = -largest
    x[2, 3] = 9e6
    x[3, 5] = 127 * 65504
    got = np.asarray(jax.jit(quantize_activations)(x).dequantize())
    assert (got[0, :32] == 127 * 65504).all()
    assert (got[1, :32] == -127 * 65504).all()
    assert got[2, 3] == got[3, 5] == 127 * 65504
    np.testing.assert_allclose(got[:, 32:], 1, rtol=2**-11)
    to_bytes = jax.jit(q8_1_to_bytes, static_argnums=1)
    for convention in ("cpu", "cuda"):
        raw = np.asarray(to_bytes(x, convention)).reshape(4, 2, 36)
        d, s = raw[..., :2].copy().view(np.float16), raw[..., 2:4].copy().view(np.float16)
        assert (d[:2, 0] == 65504).all()
        assert s[0, 0] == 65504
        assert s[1, 0] == -65504
        assert np.isfinite(s).all()


def test_a_group_that_is_not_finite_decodes_to_nan_and_no_other():
    x = np.ones((3, 64), F32)
    x[0, 3] = np.inf
    x[1, 35] = -np.inf
    x[2, 0] = np.nan
    got = np.asarray(jax.jit(quantize_activations)(x).dequantize())
    for row, group in ((0, 0), (1, 1), (2, 0)):
        halves = got[row].reshape(2, 32)
        assert np.isnan(halves[group]).all()
        np.testing.assert_allclose(halves[1 - group], 1, rtol=2**-11)


@pytest.mark.parametrize("shape", [(32,), (2, 0, 3, 64)])
def test_any_leading_axes(shape):
    quantized = jax.jit(quantize_activations)(jnp.ones(shape))
    assert quantized.codes.shape == quantized.dequantize().shape == shape
    assert quantized.scales.shape == quantized.sums.shape == (*shape[:-1], shape[-1] // 32)
    raw = jax.eval_shape(lambda x: q8_1_to_bytes(x, "cpu"), jnp.ones(shape))
    assert raw.shape == (*shape[:-1], shape[-1] // 32 * 36)


def test_is_a_pytree_with_a_static_format():
    x = samples()
    quantized = quantize_activations(x)
    leaves, tree = jax.tree.flatten(quantized)
    assert [a.dtype for a in leaves] == [np.int8, np.float16, np.int16]
    assert jax.tree.unflatten(tree, leaves).format == "q8_1"
    mapped = jax.vmap(quantize_activations)(x)
    _, scanned = jax.lax.scan(lambda carry, q: (carry, q.dequantize()), None, quantized)
    assert isinstance(mapped, QActivations)
    for a, b in zip(jax.tree.leaves(mapped), leaves, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(scanned, quantized.dequantize())


# One scale per token.

LARGEST = {"int8": 127, "fp8": 448}
TINY = 2.0**-100


def per_token(x: np.ndarray, format: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes (..., k) and float32 scales (..., 1) of finite rows, by NumPy and ml_dtypes."""
    x, largest = x.astype(F32), F32(LARGEST[format])
    top = np.abs(x).max(-1, keepdims=True)
    top = np.where(top < largest * F32(TINY), F32(0), top)
    scaled = np.where(top == 0, F32(0), x * (largest / np.where(top == 0, F32(1), top)))
    codes = np.rint(scaled).astype(np.int8) if format == "int8" else scaled.astype(ml_dtypes.float8_e4m3fn)
    return codes, top / largest


def token_samples(format: str) -> np.ndarray:
    x = samples().reshape(-1, 256)
    rng = np.random.default_rng(1)
    edges = np.zeros((16, 256), F32)
    edges[0] = np.arange(256) - 128 + 0.5  # ties of int8: the scale below is 1
    edges[1] = 2.0 ** rng.integers(-20, 9, 256) * rng.choice([1, 1.0625, 1.125, 1.1875], 256)  # of e4m3, subnormal too
    edges[2] = np.arange(256) * 2.0**-10
    edges[3, :3] = 1e38, -3e38, 1
    edges[4, :3] = LARGEST[format] * TINY * np.array([1, -0.5, 0.01])
    edges[5, :3] = LARGEST[format] * TINY * 0.999
    edges[6, :2] = 1e-40, -1e-45
    edges[7, :4] = LARGEST[format] * TINY, 1e-38, 1e-40, -1e-45
    edges[8:] = np.exp2(rng.uniform(-30, 30, (8, 256))) * rng.choice([-1, 1], (8, 256))
    edges[:3, 0] = LARGEST[format]
    return np.concatenate([x, edges])


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_per_token_to_the_byte(format, dtype, jit):
    with np.errstate(over="ignore"):
        x = token_samples(format).astype(dtype)
    x = x[np.isfinite(x.astype(F32)).all(-1)]
    quantize = functools.partial(quantize_activations, format=format)
    quantized = (jax.jit(quantize) if jit else quantize)(jnp.asarray(x))
    codes, scales = per_token(x, format)
    assert (quantized.format, quantized.dtype, quantized.shape) == (format, x.dtype, x.shape)
    assert quantized.sums is None
    assert quantized.codes.dtype == codes.dtype
    np.testing.assert_array_equal(np.asarray(quantized.codes).view(np.uint8), codes.view(np.uint8))
    assert quantized.scales.dtype == F32
    np.testing.assert_array_equal(quantized.scales, scales)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("format", quantize_oracle.FORMATS)
def test_edges_to_the_byte(format, dtype):
    """NaN, Inf, subnormal, tiny and huge numbers too; rows that are not whole vectors, and vectors of two rows."""
    quantize = jax.jit(functools.partial(quantize_activations, format=format))
    with np.errstate(over="ignore"):
        x = quantize_oracle.edges(format, 96).astype(dtype)
    for rows in (x,) if format == "q8_1" else (x, x[:, :93]):
        quantized = quantize(jnp.asarray(rows))
        parts = tuple(part for part in (quantized.codes, quantized.scales, quantized.sums) if part is not None)
        quantize_oracle.assert_same(parts, quantize_oracle.expected(rows, format))


@pytest.mark.parametrize("k", [1, 40, 1024, 4096, 14336, 40_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("format", quantize_oracle.FORMATS)
def test_rows_of_any_length(format, dtype, k):
    k = -(-k // 32) * 32 if format == "q8_1" else k
    x = np.random.default_rng(k).standard_normal((5, k)).astype(dtype)
    quantized = quantize_activations(jnp.asarray(x), format)
    parts = tuple(part for part in (quantized.codes, quantized.scales, quantized.sums) if part is not None)
    quantize_oracle.assert_same(parts, quantize_oracle.expected(x, format))


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_per_token_error_and_dequantize(format):
    x = np.random.default_rng(2).standard_normal((64, 1024)).astype(F32)
    quantized = quantize_activations(jnp.asarray(x), format)
    exact = np.asarray(quantized.codes).astype(np.float64) * np.asarray(quantized.scales, np.float64)
    np.testing.assert_array_equal(quantized.dequantize(), exact.astype(F32))
    np.testing.assert_array_equal(quantized.dequantize(jnp.bfloat16), exact.astype(F32).astype(ml_dtypes.bfloat16))
    # int8: of a step of max|x| / 127 in turn for every token. fp8: of 3 bits behind the first.
    bound = np.abs(x).max(-1, keepdims=True) / 254 if format == "int8" else np.abs(x) * 2.0**-4
    floor = np.asarray(quantized.scales) * 2.0**-10  # half of the smallest step of e4m3
    assert (np.abs(exact - x) <= np.maximum(bound, floor) * (1 + 1e-6)).all()
    assert np.sum((exact - x) ** 2) / np.sum(x.astype(np.float64) ** 2) <= {"int8": 1e-4, "fp8": 1e-3}[format]


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_token_that_is_not_finite_decodes_to_nan_and_no_other(format):
    x = np.ones((5, 40), F32)
    x[0, 3], x[1, 39], x[2, 0] = np.inf, -np.inf, np.nan
    x[3] = 0
    quantized = jax.jit(functools.partial(quantize_activations, format=format))(x)
    got = np.asarray(quantized.dequantize())
    assert np.isnan(got[:3]).all()
    np.testing.assert_array_equal(got[3:], x[3:])
    np.testing.assert_array_equal(np.asarray(quantized.scales)[3], 0)


@pytest.mark.parametrize("format", ["q8_1", "int8", "fp8"])
def test_every_one_of_many_rows_shows_its_nan(format):
    """XLA's CPU backend takes the maximum of many rows in vectors, in which a NaN may be lost."""
    x = np.random.default_rng(0).standard_normal((150, 64)).astype(F32)
    x[np.arange(150), np.arange(150) % 32] = np.nan
    got = np.asarray(jax.jit(functools.partial(quantize_activations, format=format))(x).dequantize())
    assert np.isnan(got[:, :32]).all()


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("shape", [(1,), (7,), (0, 5), (2, 0, 3, 9)])
def test_any_shape_per_token(shape, format):
    quantized = jax.jit(functools.partial(quantize_activations, format=format))(jnp.ones(shape, jnp.bfloat16))
    assert quantized.codes.shape == quantized.shape == quantized.dequantize().shape == shape
    assert quantized.scales.shape == (*shape[:-1], 1)
    assert repr(quantized) == f"QActivations({format}, shape={shape}, of bfloat16)"


@pytest.mark.parametrize("format", ["q8_1", "int8", "fp8"])
def test_every_format_is_a_pytree(format):
    x = jnp.asarray(samples()[0, :3])
    quantize = jax.jit(functools.partial(quantize_activations, format=format))
    quantized = quantize(x)
    quantized.check()
    leaves, tree = jax.tree.flatten(quantized)
    assert len(leaves) == (3 if format == "q8_1" else 2)
    assert jax.tree.unflatten(tree, leaves).format == format
    others: Any = (jax.vmap(quantize)(x), jax.lax.map(quantize, x), jax.tree.map(lambda a: a + 0, quantized))
    for other in others:
        assert (other.format, other.dtype) == (format, x.dtype)
        for a, b in zip(jax.tree.leaves(other), leaves, strict=True):
            np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("format", ["q8_1", "int8", "fp8"])
def test_exported_functions_take_and_give_them(format):
    x = jnp.asarray(samples()[0, :3], jnp.bfloat16)
    quantize = jax.jit(functools.partial(quantize_activations, format=format))
    exported = export.export(quantize, disabled_checks=qg.export_safety_checks())(x)
    quantized: Any = export.deserialize(exported.serialize()).call(x)
    assert (quantized.format, quantized.dtype) == (format, jnp.bfloat16)
    exported = export.export(jax.jit(lambda q: q.dequantize()))(quantized)
    values = export.deserialize(exported.serialize()).call(quantized)
    np.testing.assert_array_equal(values, quantize_activations(x, format).dequantize())


def test_codes_have_no_derivative():
    x = jnp.ones((2, 32))
    for format in ("q8_1", "int8", "fp8"):
        with pytest.raises(TypeError, match=rf"x is differentiated, but its {format} codes.*straight_through=True"):
            jax.grad(lambda x, f=format: jnp.sum(quantize_activations(x, f).dequantize()))(x)
        stopped = jax.grad(
            lambda x, f=format: jnp.sum(x * quantize_activations(jax.lax.stop_gradient(x), f).dequantize())
        )
        np.testing.assert_array_equal(stopped(x), quantize_activations(x, format).dequantize())


@pytest.mark.parametrize("quantizer", [quantize_activations, lambda x: q8_1_to_bytes(x, "cuda")])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((2, 32), np.int8), TypeError, r"x must be a float16, bfloat16 or float32 array, got int8"),
        (np.zeros((2, 32), np.float64), TypeError, r"x must be .*got float64"),
        ([1.0] * 32, TypeError, r"x must be .*got list"),
        (np.zeros((2, 33), F32), ValueError, r"x must have .* positive multiple of 32, got \(2, 33\)"),
        (np.zeros((2, 0), F32), ValueError, r"x must have .* positive multiple of 32, got \(2, 0\)"),
        (np.zeros((), F32), ValueError, r"x must have .* positive multiple of 32, got \(\)"),
    ],
)
def test_bad_activations_are_named(quantizer, x, error, message):
    with pytest.raises(error, match=message):
        quantizer(x)


def test_other_bad_arguments_are_named():
    x = np.zeros((2, 32), F32)
    with pytest.raises(ValueError, match=r"unknown activation format 'q8_0'; known formats: q8_1, int8, fp8"):
        quantize_activations(x, "q8_0")
    with pytest.raises(ValueError, match=r'convention must be "cpu" or "cuda", got \'gpu\''):
        q8_1_to_bytes(x, "gpu")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"raw must be a uint8 array, got int8"):
        q8_1_from_bytes(np.zeros(36, np.int8))
    with pytest.raises(ValueError, match=r"raw must have .*positive multiple of 36, got \(2, 40\)"):
        q8_1_from_bytes(np.zeros((2, 40), np.uint8))
    assert activations.BLOCK_BYTES == 36
