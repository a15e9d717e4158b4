"""`quantize`: gguf-py's bytes where it has a quantizer, bounds on the error of the searches, a float64 oracle
for integers, and what happens at the ends of the ranges."""

import functools

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_qgemm.formats import GGUF_FORMATS, get_format, int2, int3, int4, int8, quantize
from jax_qgemm.formats.integer import GROUP_SIZES, SCALE_DTYPES

pytestmark = pytest.mark.usefixtures("backend")

EXACT = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4")
SEARCHED = {  # NMSE of ggml's own quantizers on N(0, 1)
    "q2_k": 8.8e-2, "q3_k": 2.28e-2, "q4_k": 5.08e-3, "q5_k": 1.30e-3, "q6_k": 3.14e-4,
    "iq4_nl": 5.79e-3, "iq4_xs": 5.88e-3, "nvfp4": 9.0e-3,
}  # fmt: skip


def qtype(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def powers_of_two(rng: np.random.Generator, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    return np.exp2(rng.integers(low, high, shape)).astype(np.float32)


def near_ties(rng: np.random.Generator, top: int) -> np.ndarray:
    """(32, 1024) values halfway between codes, as nearly as float32 has them, of blocks with the largest code `top`."""
    codes = rng.integers(-abs(top), abs(top), (1024, 32)) + 0.5
    codes[:, 5] = top
    return (codes * rng.uniform(0.01, 1, (1024, 1))).reshape(32, 1024)


@functools.cache
def rows_for_exact_bytes() -> np.ndarray:
    """(480, 1024) rows that no format here overflows on and whose scales are normal float32 numbers."""
    rng = np.random.default_rng(7)
    shape = (32, 1024)
    signs = rng.choice([-1, 1], shape).astype(np.float32)
    near_powers = powers_of_two(rng, (32, 32), -100, 15).repeat(32, 1).view(np.int32)
    with_subnormals = normal(*shape, seed=1)
    with_subnormals[:, ::7] = rng.integers(0, 1 << 23, (32, 147), dtype=np.uint32).view(np.float32)
    sparse = np.where(rng.random(shape) < 0.03, normal(*shape, seed=2), 0)
    parts = (
        normal(96, 1024),
        np.round(normal(*shape, seed=3) * 10) / 10,
        near_ties(rng, -8),
        near_ties(rng, -16),
        near_ties(rng, 127),
        rng.integers(-8, 9, shape),
        rng.integers(-40, 41, shape) / 8,
        signs * powers_of_two(rng, shape, -60, 16),
        (near_powers + rng.integers(-50, 3, shape)).astype(np.int32).view(np.float32),
        with_subnormals,
        sparse,
        normal(*shape, seed=4) * powers_of_two(rng, (32, 32), -100, 12).repeat(32, 1),
        signs * 65504 * rng.random(shape),
    )
    return np.concatenate(parts).astype(np.float32) + np.float32(0)  # no -0: see below


@functools.cache
def bytes_of_gguf_py(name: str) -> np.ndarray:
    return gguf.quants.quantize(rows_for_exact_bytes(), qtype(name))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_bytes_are_those_of_gguf_py(name, jit):
    """numpy leaves the sign of a minimum among zeros of both signs open: none here."""
    rows, expected = rows_for_exact_bytes(), bytes_of_gguf_py(name)
    if jit:
        got = quantize(rows.T, name).to_gguf_bytes()
    else:
        format = GGUF_FORMATS[name]
        fields, overflow = format.encode(jnp.asarray(rows))
        assert not overflow
        got = format.to_bytes(fields).reshape(expected.shape)
    different = np.asarray(got) != expected
    assert not different.any(), f"{different.sum()} bytes differ in rows {np.unique(different.nonzero()[0])}"


def test_mxfp4_bytes_for_any_finite_float32():
    """Subnormal blocks, and those next to a power of two, where the float32 logarithm rounds up to it."""
    rng = np.random.default_rng(0)
    scales = rng.integers(0, 0x7F7FFF00, (4096, 1), dtype=np.uint32)
    scales[::2] &= 0xFF800000
    bits = np.maximum(scales.astype(np.int64) + rng.integers(-60, 3, (4096, 32)), 0)
    bits[:, ::3] = rng.integers(0, scales + 1, (4096, 11))
    signs = rng.integers(0, 2, bits.shape) << 31
    rows = (bits | signs).astype(np.uint32).view(np.float32).reshape(64, 2048)
    assert np.isfinite(rows).all()
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(rows, qtype("mxfp4"))
    np.testing.assert_array_equal(quantize(rows.T, "mxfp4").to_gguf_bytes(), expected)


@pytest.mark.parametrize("name", EXACT)
def test_blocks_below_any_float16_scale_decode_like_those_of_gguf_py(name):
    """Their scale is zero. The codes are not compared: gguf-py casts the products with an infinite 1 / d to integers,
    which C leaves undefined."""
    small = powers_of_two(np.random.default_rng(0), (8, 8), -140, -70).repeat(32, 1)
    rows = normal(8, 256) * small
    assert (np.abs(rows) < np.finfo(np.float32).tiny).any()
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(gguf.quants.quantize(rows, qtype(name)), qtype(name))
    got = np.asarray(quantize(rows.T, name).dequantize()).T
    np.testing.assert_array_equal(got, expected)


def searched_rows() -> dict[str, np.ndarray]:
    """Rows of 1024 weights of several kinds, 256 in all."""
    rng = np.random.default_rng(11)
    shape = (16, 1024)
    outlier = rng.standard_normal(shape)
    outlier[:, 100] = 2000
    made = {
        "normal": rng.standard_normal((128, 1024)),
        "uniform": rng.uniform(-1, 1, shape),
        "positive": rng.uniform(0, 1, shape),
        "negative": rng.uniform(-3, -1, shape),
        "laplace": rng.laplace(size=shape),
        "heavy tails": rng.standard_t(3, shape),
        "sparse": np.where(rng.random(shape) < 0.05, rng.standard_normal(shape), 0),
        "many scales": rng.standard_normal(shape) * np.exp2(rng.integers(-6, 6, (16, 4))).repeat(256, 1),
        "outlier": outlier,
    }
    return {kind: w.astype(np.float32) for kind, w in made.items()}


def squares(a: np.ndarray) -> float:
    return float(np.sum(a.astype(np.float64) ** 2))


def plain_nmse(w: np.ndarray, name: str) -> float:
    """Error of rounding each group to the format's levels over its range. Scales are exact, nvfp4's rounded."""
    format = GGUF_FORMATS[name]
    groups = w.astype(np.float64).reshape(-1, format.group)
    if name in ("q2_k", "q4_k", "q5_k"):
        top = 2**format.code_bits - 1
        low = np.minimum(groups.min(-1, keepdims=True), 0)
        scale = (groups.max(-1, keepdims=True) - low) / top
        levels = np.arange(top + 1)
    else:
        low = 0
        levels = np.unique(format.qvalue(jnp.arange(2**format.code_bits, dtype=jnp.uint8)))
        scale = np.abs(groups).max(-1, keepdims=True) / levels[-1]
    if name == "nvfp4":
        scale = (2 * scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) / 2
    scale = np.where(scale == 0, 1, scale)
    nearest = levels[np.abs((groups - low)[..., None] / scale[..., None] - levels).argmin(-1)]
    return float(np.sum((nearest * scale + low - groups) ** 2) / np.sum(groups**2))


@pytest.mark.parametrize("name", SEARCHED)
def test_search_beats_ggml_on_normal_weights_and_plain_rounding_on_others(name):
    """Decoded by gguf-py from the bytes we write. ggml's figures are for its own quantizers on N(0, 1)."""
    kinds = searched_rows()
    w = np.concatenate([*kinds.values()])
    decoded = gguf.quants.dequantize(np.asarray(quantize(w.T, name).to_gguf_bytes()), qtype(name))
    errors = dict(zip(kinds, np.split(decoded - w, np.cumsum([len(v) for v in kinds.values()])), strict=False))
    assert squares(errors["normal"]) / squares(kinds["normal"]) <= SEARCHED[name]
    for kind in kinds.keys() - {"outlier"}:
        assert squares(errors[kind]) / squares(kinds[kind]) < plain_nmse(kinds[kind], name), kind

    # A large value may cost the others of its super-block, whose sub-scales are multiples of a coarse step then.
    with_outlier = kinds["outlier"]
    neighbours = squares(with_outlier[:, :256]) - 16 * 2000.0**2
    limit = (plain_nmse(with_outlier, name) + 2.0**-18) * squares(with_outlier) + neighbours
    assert squares(errors["outlier"]) <= limit


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_ends_of_the_range(name):
    """Finite weights never decode to Inf or NaN: scales beyond their type are clamped, which keeps the signs of a block
    of one sign. Zeros and weights too small for any scale decode to zero, constants to themselves."""
    block = GGUF_FORMATS[name].block
    largest = np.finfo(np.float32).max
    w = normal(2 * block, 12, seed=5)
    w[:, 1] = largest
    w[:, 2] = -largest
    w[:, 3] = np.where(w[:, 3] > 0, largest, -largest)
    w[5, 4] = largest
    w[:, 5] *= 1e12
    w[:, 6] *= 1e-40
    w[::2, 7] *= 1e-40
    w[:, 8] = 1e-45
    w[:, 9] = 0
    w[:, 10] = 0.75
    w[:, 11] = -0.75
    got = np.asarray(jax.jit(lambda w: quantize(w, name).dequantize())(w))
    assert np.isfinite(got).all()
    assert (got[:, 1] > 0).all()
    assert (got[:, 2] < 0).all()
    np.testing.assert_array_equal(got[:, [6, 8, 9]], 0)
    # One magnitude fits into any scale; those of one power of two or of three bits of mantissa are coarse.
    tolerance = {"mxfp4": 0, "nvfp4": 0.04}.get(name, 1e-3)
    np.testing.assert_allclose(got[:, 10:], w[:, 10:], rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", ["q4_1", "q8_0", "q3_k", "q4_k", "iq4_nl", "nvfp4"])
def test_scales_beyond_their_type_raise(name):
    with pytest.raises(ValueError, match=rf"w has values too large for format {name}: a scale leaves the range"):
        quantize(normal(256, 4) * np.float32(1e12), name)


def test_q4_0_holds_up_to_8_times_the_largest_float16():
    w = np.zeros((32, 16), np.float32)
    w[3, 2] = 524150  # d = 65518.75 rounds to 65504
    assert np.asarray(quantize(w, "q4_0").dequantize())[3, 2] == 524032
    w[3, 2] = 524170
    with pytest.raises(ValueError, match="too large for format q4_0"):
        quantize(w, "q4_0")


INT_CASES = [
    make((*GROUP_SIZES, -1)[(5 * i + 3 * j + k) % 6], symmetric=symmetric, scale_dtype=dtype)
    for i, make in enumerate((int2, int3, int4, int8))
    for j, symmetric in enumerate((True, False))
    for k, dtype in enumerate(SCALE_DTYPES)
    if (i + j + k) % 2
]


@pytest.mark.parametrize("format", INT_CASES, ids=str)
def test_integers_are_the_nearest(format):
    """Against float64: stored scale and zero point as the docstring of `IntFormat.encode` says, every code the nearest
    over them, the error half a step where the range suffices."""
    w = normal(4, 512, seed=3)
    w[1] = np.abs(w[1])
    w[2, :300] = 0
    w[3] *= 1e-3
    fields, overflow = jax.jit(format.encode)(w)
    assert not overflow
    group = format.group or 512
    grouped = w.astype(np.float64).reshape(4, -1, group)
    levels = 2**format.bits
    scale = np.asarray(format.scale(fields), np.float64)
    stored_zero = 128 if format.bits == 8 and not format.symmetric else 0
    dtype = ml_dtypes.finfo(format.scale_dtype)
    if format.symmetric:
        ideal = np.abs(grouped).max(-1) / (levels / 2 - 0.5)
        zero, bottom = np.zeros_like(scale), -levels // 2
        assert format.zero_point(fields) is None
    else:
        low = np.minimum(grouped.min(-1), 0)
        ideal = (np.maximum(grouped.max(-1), 0) - low) / (levels - 1)
        zero, bottom = np.asarray(format.zero_point(fields), np.float64) + stored_zero, 0
        np.testing.assert_array_less(np.abs(zero - -low / np.where(scale == 0, 1, scale)), 0.5 + 1e-5)
    # Half a step of the scale's type, and as much again of float32.
    step = np.maximum(ideal * float(dtype.eps), float(dtype.smallest_subnormal))
    np.testing.assert_array_less(np.abs(scale - ideal), step / 2 * (1 + 1e-3) + ideal * 2.0**-23 + 1e-300)

    quotient = grouped / np.where(scale == 0, 1, scale)[..., None] + zero[..., None]
    qvalue = np.asarray(format.qvalue(fields["codes"]), np.float64).reshape(grouped.shape) + stored_zero
    nearest = np.clip(quotient, bottom, bottom + levels - 1)
    np.testing.assert_array_less(np.abs(qvalue - nearest), 0.5 + 1e-4)
    assert qvalue.min() >= bottom
    assert qvalue.max() <= bottom + levels - 1
    inside = (quotient >= bottom - 0.5) & (quotient <= bottom + levels - 0.5)
    assert inside.mean() > 0.97
    error = np.abs(np.asarray(format.decode(fields), np.float64) - w).reshape(grouped.shape)
    half = np.broadcast_to(scale[..., None] / 2 * (1 + 1e-4), error.shape)
    np.testing.assert_array_less(error[inside], half[inside] + 1e-300)


@pytest.mark.parametrize("make", [int3, int8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_with_large_weights(make, symmetric):
    w = normal(64, 16) * np.float32(1e12)
    largest = np.where(w > 0, np.finfo(np.float32).max, -np.finfo(np.float32).max).astype(np.float32)
    format = make(32, symmetric=symmetric)
    with pytest.raises(ValueError, match=r"too large for format int\d\(group_size=32"):
        quantize(w, format)
    for dtype in SCALE_DTYPES:
        format = make(32, symmetric=symmetric, scale_dtype=dtype)
        got = jax.jit(lambda w, format=format: quantize(w, format).dequantize())(np.stack([w, largest]))
        assert np.isfinite(got).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_weights_quantize_like_their_float32_values(dtype):
    w = jnp.asarray(normal(256, 16)).astype(dtype)
    narrow, wide = quantize(w, "q4_1"), quantize(w.astype(jnp.float32), "q4_1")
    for a, b in zip(narrow.planes, wide.planes, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["q8_0", "nvfp4"])
def test_batches_quantize_like_their_parts(name):
    w = normal(2, 3, 256, 5)
    whole = quantize(w, name).to_gguf_bytes()
    mapped = jax.vmap(lambda w: quantize(w, name).to_gguf_bytes())(w)
    np.testing.assert_array_equal(whole, mapped)
    np.testing.assert_array_equal(whole[1, 2], quantize(w[1, 2], name).to_gguf_bytes())
    assert quantize(w[:, :0], name).shape == (2, 0, 256, 5)
    assert quantize(w[..., :0], name).shape == (2, 3, 256, 0)


@pytest.mark.parametrize(
    ("w", "format", "error", "message"),
    [
        (
            np.zeros((32, 4), np.int8),
            "q4_0",
            TypeError,
            r"w must be a float16, bfloat16 or float32 .*got int8",
        ),
        (np.zeros((32, 4), np.float64), "q4_0", TypeError, r"w must be .*got float64"),
        ([[0.0]], "q4_0", TypeError, r"w must be .*got list"),
        (np.zeros(32, np.float32), "q4_0", ValueError, r"w must have shape \(\*batch, k, n\), got \(32,\)"),
        (
            np.zeros((33, 4), np.float32),
            "q4_0",
            ValueError,
            r"w has k = 33 .*q4_0 needs a positive multiple of 32",
        ),
        (np.zeros((0, 4), np.float32), "q4_0", ValueError, r"w has k = 0 .*positive multiple of 32"),
        (np.zeros((128, 4), np.float32), "q4_k", ValueError, r"w has k = 128 .*positive multiple of 256"),
        (np.zeros((64, 4), np.float32), int4(128), ValueError, r"int4\(group_size=128, .*multiple of 128"),
        (np.full((32, 4), np.nan, np.float32), "q4_0", ValueError, r"w has values that are not finite.*q4_0"),
        (
            np.full((32, 4), np.inf, np.float32),
            "mxfp4",
            ValueError,
            r"w has values that are not finite.*mxfp4",
        ),
        (np.zeros((32, 4), np.float32), "q8_1", ValueError, r"unknown format 'q8_1'; known formats: q4_0, "),
        (np.zeros((32, 4), np.float32), None, TypeError, r"format must be a name or a Format .*got NoneType"),
    ],
)
def test_quantize_names_what_is_wrong(w, format, error, message):
    with pytest.raises(error, match=message):
        quantize(w, format)


def test_shape_errors_are_raised_while_tracing():
    with pytest.raises(ValueError, match="w has k = 33"):
        jax.eval_shape(lambda w: quantize(w, "q4_0"), jax.ShapeDtypeStruct((33, 4), jnp.float32))


@pytest.mark.parametrize("make", [int2, int3, int4, int8])
def test_integer_formats_name_what_is_wrong(make):
    with pytest.raises(ValueError, match=r"group_size must be one of .* or -1 .*, got 48"):
        make(48)
    with pytest.raises(ValueError, match=r"group_size must be one of .*, got 0"):
        make(0)
    with pytest.raises(ValueError, match=r"scale_dtype must be one of .*, got 'float64'"):
        make(32, scale_dtype="float64")
    assert get_format(make.__name__) == make(128) != make(128, symmetric=False)
