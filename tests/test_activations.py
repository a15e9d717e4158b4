"""q8_1 activations against numpy in float32, operation by operation as ggml has them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_qgemm.formats import activations
from jax_qgemm.formats.activations import QActivations, q8_1_from_bytes, q8_1_to_bytes, quantize_activations

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
    with pytest.raises(ValueError, match=r"unknown activation format 'q8_0'; known formats: q8_1"):
        quantize_activations(x, "q8_0")
    with pytest.raises(ValueError, match=r'convention must be "cpu" or "cuda", got \'gpu\''):
        q8_1_to_bytes(x, "gpu")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"raw must be a uint8 array, got int8"):
        q8_1_from_bytes(np.zeros(36, np.int8))
    with pytest.raises(ValueError, match=r"raw must have .*positive multiple of 36, got \(2, 40\)"):
        q8_1_from_bytes(np.zeros((2, 40), np.uint8))
    assert activations.BLOCK_BYTES == 36
