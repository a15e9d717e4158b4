"""The C++ side of the formats against the Python registry, gguf-py and the integer formats' formula."""

import cases
import numpy as np
import pytest
from cases import ALL_FORMATS, k_of, random_weight

import jax_qgemm as qg
from jax_qgemm import _native
from jax_qgemm.formats import FORMAT_NAMES, GGUF_FORMATS, CodePlane, Format, IntFormat, get_format, layout
from jax_qgemm.formats.activations import q8_1_from_bytes
from jax_qgemm.formats.integer import SCALE_DTYPES


def _rows(format: Format) -> list[tuple]:
    """The planes as `_native.plane_tables` lists them."""
    return [
        (p.name, True, p.bits, p.shift, 0)
        if isinstance(p, CodePlane)
        else (p.name, False, np.dtype(p.dtype).itemsize * 8, 0, p.group)
        for p in format.planes
    ]


def test_both_sides_list_the_same_formats_in_the_same_order():
    native = list(_native.plane_tables())
    missing, extra = set(FORMAT_NAMES) - set(native), set(native) - set(FORMAT_NAMES)
    assert not missing, f"cuda/formats/formats.def lacks {sorted(missing)}"
    assert not extra, f"jax_qgemm/formats/registry.py lacks {sorted(extra)}"
    assert native == list(FORMAT_NAMES)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_plane_tables_agree(name):
    assert [tuple(row) for row in _native.plane_tables()[name]] == _rows(get_format(name))


def test_layout_versions_agree():
    assert qg.build_info().layout_version == layout.LAYOUT_VERSION


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_cases_have_every_format(name):
    assert name in {format.name for format in cases.FORMATS}


def native_dequantize(w: qg.QTensor) -> np.ndarray:
    """float32 (n, k) by the C++ decoder."""
    k, n = w.shape
    format = w.format
    parameters = {}
    if isinstance(format, IntFormat):
        parameters = {"group_size": format.group, "scale_type": SCALE_DTYPES.index(format.scale_dtype)}
    return np.asarray(_native.dequantize(format.name, [np.asarray(p) for p in w.planes], n, k, **parameters))


@pytest.mark.parametrize(("n", "blocks"), [(37, 1), (16, 3), (1, 5)])
@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_native_decoder_agrees_with_gguf_py(name, n, blocks):
    """To the bit, for any bytes whose float16 fields are finite, with tails in n and k."""
    format = GGUF_FORMATS[name]
    raw = cases.random_blocks(format, n, blocks * format.block, np.random.default_rng(n), any_scale=True)
    values = native_dequantize(qg.QTensor.from_gguf_bytes(raw, format))
    expected = cases.gguf_py_dequantize(raw, format)
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_every_byte_of_an_8_bit_scale(name):
    format = GGUF_FORMATS[name]
    raw = cases.random_blocks(format, 256, format.block, np.random.default_rng(0))
    raw[:, : format.block_bytes - format.block // 2] = np.arange(256, dtype=np.uint8)[:, None]
    w = qg.QTensor.from_gguf_bytes(raw, format)
    expected = cases.gguf_py_dequantize(raw, format)
    np.testing.assert_array_equal(native_dequantize(w).view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(np.asarray(w.dequantize()).T.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("format", [f for f in ALL_FORMATS if f.name not in GGUF_FORMATS], ids=str)
def test_native_decoder_agrees_with_the_integer_formula(format):
    w, dense = random_weight(format, 21, k_of("tail", format), np.random.default_rng(0))
    expected = dense.T.astype(np.float32)
    np.testing.assert_array_equal(native_dequantize(w).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("format", cases.FORMATS, ids=str)
def test_dequantize_agrees_with_the_native_decoder(format):
    w, dense = random_weight(format, 21, k_of("three blocks", format), np.random.default_rng(1))
    values = np.asarray(w.dequantize())
    np.testing.assert_array_equal(values.view(np.uint32), dense.astype(np.float32).view(np.uint32))
    np.testing.assert_array_equal(values.T.view(np.uint32), native_dequantize(w).view(np.uint32))


def test_native_decoder_of_q8_1():
    """x = d * q, from the block's bytes: f16 d, f16 s (not read), 32 int8."""
    raw = np.random.default_rng(0).integers(0, 256, (200, 36), np.uint8)
    scales = raw[:, :2].copy().view(np.float16).astype(np.float32)
    raw, scales = raw[np.isfinite(scales[:, 0])], scales[np.isfinite(scales[:, 0])]
    expected = scales * raw[:, 4:].view(np.int8).astype(np.float32)
    values = np.asarray(_native.dequantize_q8_1(raw.reshape(-1))).reshape(-1, 32)
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))
    decoded = np.asarray(q8_1_from_bytes(raw).dequantize())
    np.testing.assert_array_equal(decoded.view(np.uint32), expected.view(np.uint32))


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match="q9_9"):
        _native.dequantize("q9_9", [], 1, 1)
