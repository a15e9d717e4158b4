"""GGUF codecs against gguf-py: every byte pattern survives the kernel layout, every value decodes to the same
bits."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_qgemm.formats import GGUF_FORMATS, QTensor, get_format, gguf_format, int4
from jax_qgemm.formats.format import exact_divide

pytestmark = pytest.mark.usefixtures("backend")

NAMES = tuple(GGUF_FORMATS)


def oracle(raw: np.ndarray, name: str) -> np.ndarray:
    """gguf-py's float32 values of the rows, (..., n, k)."""
    with np.errstate(all="ignore"):  # random bytes hold infinities and NaN
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name.upper()])


def assert_same_bits(got, expected: np.ndarray) -> None:
    """The same bits, or NaN for NaN. numpy's testing functions would take -0 for 0."""
    got = np.asarray(got)
    assert got.dtype == expected.dtype == np.float32
    assert got.shape == expected.shape
    both_nan = np.isnan(got) & np.isnan(expected)
    different = (got.view(np.uint32) != expected.view(np.uint32)) & ~both_nan
    assert not different.any(), f"{different.sum()} differ: {got[different][:3]}, {expected[different][:3]}"


def random_bytes(name: str, *batch_n: int, blocks: int) -> np.ndarray:
    rng = np.random.default_rng(len(name) + sum(batch_n) + blocks)
    return rng.integers(0, 256, (*batch_n, blocks * GGUF_FORMATS[name].block_bytes), dtype=np.uint8)


def test_every_format_of_gguf_py_with_a_block_of_ours_agrees_on_its_size():
    for name, format in GGUF_FORMATS.items():
        qtype = gguf.GGMLQuantizationType[name.upper()]
        assert format.ggml_type == qtype.value
        assert gguf.GGML_QUANT_SIZES[qtype] == (format.block, format.block_bytes)


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_survive_and_decode_like_gguf_py(name):
    """With batch axes, an n that is no multiple of 16, a k that is none of the k-block where that is possible."""
    format = GGUF_FORMATS[name]
    raw = random_bytes(name, 2, 3, 37, blocks=3)
    w = QTensor.from_gguf_bytes(raw, name)
    assert w.shape == (2, 3, 3 * format.block, 37)
    assert w.padding == (-3 * format.block % format.k_block, 11)
    np.testing.assert_array_equal(w.to_gguf_bytes(), raw)
    assert_same_bits(w.dequantize(), np.swapaxes(oracle(raw, name), -1, -2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_decode_has_the_bits_of_gguf_py(name, jit):
    """On a quarter of a million elements: random scales are subnormal, infinite and NaN among others."""
    format = GGUF_FORMATS[name]
    raw = random_bytes(name, 64, blocks=(1 << 18) // (64 * format.block))

    def decode(raw):
        return format.decode(format.from_bytes(raw.reshape(*raw.shape[:-1], -1, format.block_bytes)))

    assert_same_bits((jax.jit(decode) if jit else decode)(jnp.asarray(raw)), oracle(raw, name))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_every_8_bit_scale_with_every_code(name):
    """Among them the subnormal products of mxfp4's scales 0 to 2, its 255, and nvfp4's 0x7F and negative
    scales."""
    groups = 1 if name == "mxfp4" else 4
    scales = np.arange(256, dtype=np.uint8).reshape(-1, groups)
    codes = np.tile(np.arange(16, dtype=np.uint8) * 17, (len(scales), 2 if groups == 4 else 1))
    raw = np.concatenate([scales, codes], axis=-1)
    w = QTensor.from_gguf_bytes(raw, name)
    np.testing.assert_array_equal(w.to_gguf_bytes(), raw)
    assert_same_bits(w.dequantize(), oracle(raw, name).T)


def test_mxfp4_scales_are_the_powers_of_two_of_the_specification():
    """Half of 2**(e - 127), the first of them subnormal in float32."""
    scale = GGUF_FORMATS["mxfp4"].scale({"scales": jnp.arange(256, dtype=jnp.uint8)[None]})
    expected = np.ldexp(np.float64(1), np.arange(256) - 128).astype(np.float32)
    assert_same_bits(scale, expected[None])


@pytest.mark.parametrize("name", NAMES)
def test_scale_and_minimum_give_the_decoded_values(name):
    """What kernels compute from a format's parts, in float64, rounds to what gguf-py decodes."""
    format = GGUF_FORMATS[name]
    raw = random_bytes(name, 4, blocks=4)
    expected = oracle(raw, name)

    @jax.jit
    def parts(raw):
        fields = format.from_bytes(raw.reshape(4, 4, format.block_bytes))
        return format.scale(fields), format.qvalue(fields["codes"]), format.minimum(fields)

    scale, qvalue, minimum = parts(raw)
    scale, qvalue = np.asarray(scale, np.float64), np.asarray(qvalue, np.float64)
    with np.errstate(all="ignore"):
        value = scale[..., None] * qvalue.reshape(*scale.shape, format.group)
        if minimum is not None:
            value = value + np.asarray(minimum, np.float64)[..., None]
        value = value.reshape(expected.shape).astype(np.float32)
    finite = np.isfinite(expected)
    assert finite.mean() > 0.5
    np.testing.assert_array_equal(value[finite], expected[finite])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_dequantize_rounds_once(dtype):
    raw = np.random.default_rng(0).integers(0, 60, (16, 2 * 144), dtype=np.uint8)  # scales stay finite
    expected = oracle(raw, "q4_k").T
    got = QTensor.from_gguf_bytes(raw, "q4_k").dequantize(dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(jnp.asarray(expected).astype(dtype)))


def test_repacking_works_under_jit_and_vmap():
    raw = random_bytes("q6_k", 3, 16, blocks=2)

    def round_trip(raw):
        return QTensor.from_gguf_bytes(raw, "q6_k").to_gguf_bytes()

    np.testing.assert_array_equal(jax.jit(round_trip)(raw), raw)
    np.testing.assert_array_equal(jax.vmap(round_trip)(raw), raw)


@pytest.mark.parametrize(
    ("raw", "format", "error", "message"),
    [
        (np.zeros((2, 18), np.int8), "q4_0", TypeError, r"raw must be a uint8 array, got int8"),
        ([[0] * 18], "q4_0", TypeError, r"raw must be a uint8 array, got list"),
        (np.zeros(18, np.uint8), "q4_0", ValueError, r"multiple of 18 \(q4_0 blocks\), got \(18,\)"),
        (np.zeros((2, 19), np.uint8), "q4_0", ValueError, r"multiple of 18 \(q4_0 blocks\), got \(2, 19\)"),
        (np.zeros((2, 0), np.uint8), "q4_0", ValueError, r"positive multiple of 18 .*got \(2, 0\)"),
        (np.zeros((2, 18), np.uint8), "q9_9", ValueError, r"unknown format 'q9_9'; known formats: q4_0, "),
        (np.zeros((2, 18), np.uint8), int4(32), ValueError, r"int4\(.*\) has no GGUF block; those that have"),
        (np.zeros((2, 18), np.uint8), 4, TypeError, r"format must be a name or a Format .*got int"),
    ],
)
def test_from_gguf_bytes_names_what_is_wrong(raw, format, error, message):
    with pytest.raises(error, match=message):
        QTensor.from_gguf_bytes(raw, format)


def test_to_gguf_bytes_refuses_what_a_block_cannot_hold():
    w = QTensor.from_gguf_bytes(random_bytes("q4_0", 16, blocks=2), "q4_0")
    scaled = QTensor(w.planes, w.format, w.padding, global_scale=jnp.float32(2))
    with pytest.raises(ValueError, match=r"can't hold global_scale"):
        scaled.to_gguf_bytes()
    fields = {"codes": jnp.zeros((16, 64), jnp.uint8), "scales": jnp.zeros((16, 2), jnp.uint16)}
    with pytest.raises(ValueError, match=r"has no GGUF block"):
        QTensor.from_fields(fields, int4(32)).to_gguf_bytes()


def test_formats_are_found_by_name():
    for name in NAMES:
        assert get_format(name) is gguf_format(name) is GGUF_FORMATS[name]
        assert str(get_format(name)) == name
    assert get_format("int4") == int4(128)
    assert get_format(int4(64)) == int4(64)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_division_is_rounded_once(jit):
    """Of any two float32, subnormal ones and those whose quotient is, too; by a constant and by an array."""
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 1 << 32, (2, 100_000)).astype(np.uint32).view(np.float32)
    subnormal = rng.integers(0, 1 << 23, 100_000).astype(np.uint32).view(np.float32)
    normal = rng.standard_normal((2, 100_000)).astype(np.float32)
    divide = jax.jit(exact_divide) if jit else exact_divide
    for value, divisor in ((*anything,), (*normal,), (normal[0], 127.0), (subnormal, normal[0]), (1.0, normal[1])):
        with np.errstate(all="ignore"):
            expected = np.asarray(np.float32(value) / np.float32(divisor))
        got = np.asarray(divide(value, divisor))
        same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
        assert same.all()
