"""GGUF files against gguf-py: what it writes we read, what we write it reads, types and bytes included."""

import contextlib
import copy
import math
import pickle

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_qgemm import io
from jax_qgemm.formats import GGUF_FORMATS, QTensor, quantize
from jax_qgemm.io import _gguf_types

T = gguf.GGMLQuantizationType
V = gguf.GGUFValueType

WEIGHT_FORMATS = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
    "mxfp4", "nvfp4",
)  # fmt: skip


def write_with_gguf_py(path, *, metadata=(), tensors=(), alignment=None, endianess=gguf.GGUFEndian.LITTLE):
    """metadata: (key, value, type, element type or None); tensors: (name, array, raw type or None)."""
    writer = gguf.GGUFWriter(path, "test", endianess=endianess)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value, value_type, element_type in metadata:
        writer.add_key_value(key, value, value_type, element_type)
    for name, array, raw_type in tensors:
        writer.add_tensor(name, array, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_rows(format, rows, seed=0):
    """Rows of three random blocks whose floats are finite, as uint8 (rows, row bytes)."""
    rng = np.random.default_rng(seed)
    ggml_type = T[format.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[ggml_type]
    with contextlib.suppress(NotImplementedError):
        values = rng.standard_normal((rows, 3 * block), np.float32)
        return gguf.quants.quantize(values, ggml_type)
    return random_blocks(rng, ggml_type, rows)


def random_blocks(rng, ggml_type, rows):
    _, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    raw = rng.integers(0, 256, (rows, 3, block_bytes), np.uint8)
    # Where the blocks have float16 fields; random bytes would make some of them infinite or NaN.
    halves = {
        T.Q2_K: (80, 82), T.Q3_K: (108,), T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,),
        T.IQ4_NL: (0,), T.IQ4_XS: (0,), T.MXFP4: (), T.NVFP4: (),
    }[ggml_type]  # fmt: skip
    for at in halves:
        scales = rng.uniform(-2, 2, (rows, 3)).astype(np.float16)
        raw[:, :, at : at + 2] = scales[..., None].view(np.uint8)
    if ggml_type == T.MXFP4:
        raw[:, :, 0] = rng.integers(100, 140, (rows, 3))
    if ggml_type == T.NVFP4:
        raw[:, :, :4] = rng.integers(0, 0x7F, (rows, 3, 4))
    return raw.reshape(rows, -1)


def fields_of(path):
    """gguf-py's view of the metadata: key -> (type names, contents)."""
    fields = gguf.GGUFReader(path).fields
    return {
        key: ([t.name for t in field.types], field.contents())
        for key, field in fields.items()
        if not key.startswith("GGUF.")
    }


SCALARS = [
    *((f"int.{t.name}.{v}", v, t, None) for t, dtype in {
        V.UINT8: "u1", V.INT8: "i1", V.UINT16: "u2", V.INT16: "i2", V.UINT32: "u4", V.INT32: "i4",
        V.UINT64: "u8", V.INT64: "i8",
    }.items() for v in (int(np.iinfo(dtype).min), 1, int(np.iinfo(dtype).max))),
    ("f32", 0.1, V.FLOAT32, None),
    ("f32.inf", -math.inf, V.FLOAT32, None),
    ("f64", 0.1, V.FLOAT64, None),
    ("f64.tiny", 5e-324, V.FLOAT64, None),
    ("true", True, V.BOOL, None),
    ("false", False, V.BOOL, None),
    ("string", "naïve 模型 \U0001f600", V.STRING, None),
    ("string.empty", "", V.STRING, None),
    ("string.nul", "a\0b", V.STRING, None),
]  # fmt: skip
ARRAYS = [
    ("a.u8", [0, 255], V.ARRAY, V.UINT8),
    ("a.i8", [-128, 127], V.ARRAY, V.INT8),
    ("a.u16", [65535], V.ARRAY, V.UINT16),
    ("a.i16", [-32768], V.ARRAY, V.INT16),
    ("a.u32", [2**32 - 1], V.ARRAY, V.UINT32),
    ("a.i32", [0, 1, -(2**31)], V.ARRAY, V.INT32),
    ("a.u64", [2**64 - 1, 1], V.ARRAY, V.UINT64),
    ("a.i64", [-(2**63), 2**63 - 1], V.ARRAY, V.INT64),
    ("a.f32", [0.5, -1.25], V.ARRAY, V.FLOAT32),
    ("a.f64", [0.1, 1e300], V.ARRAY, V.FLOAT64),
    ("a.bool", [True, False, True], V.ARRAY, V.BOOL),
    ("a.string", ["", "é", "a\0b"], V.ARRAY, V.STRING),
]


def test_metadata_of_every_type(tmp_path):
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    one = np.ones(8, np.float32)
    write_with_gguf_py(path, metadata=[*SCALARS, *ARRAYS], tensors=[("t", one, None)])
    tensors, metadata = io.load_gguf(path)
    assert list(metadata) == [
        "general.architecture",
        *(key for key, *_ in SCALARS),
        *(key for key, *_ in ARRAYS),
    ]
    for key, value, value_type, _ in SCALARS:
        expected = float(np.float32(value)) if value_type == V.FLOAT32 else value
        assert metadata[key] == expected, key
        assert isinstance(metadata[key], type(value)), key
    for key, value, _, element_type in ARRAYS:
        if element_type == V.STRING:
            assert metadata[key] == value
            continue
        assert metadata[key].dtype == np.dtype(element_type.name.lower())
        assert metadata[key].tolist() == value, key
    io.save_gguf(again, tensors, metadata)
    assert again.read_bytes() == path.read_bytes()


def test_python_values_get_the_documented_types(tmp_path):
    cases = {
        "bool": (True, ["BOOL"]),
        "small": (0, ["UINT32"]),
        "u32": (2**32 - 1, ["UINT32"]),
        "i32": (-(2**31), ["INT32"]),
        "u64": (2**32, ["UINT64"]),
        "u64.max": (2**64 - 1, ["UINT64"]),
        "i64": (-(2**31) - 1, ["INT64"]),
        "float": (0.5, ["FLOAT32"]),
        "string": ("x", ["STRING"]),
        "ints": ([1, 2], ["ARRAY", "UINT32"]),
        "signed": ((1, -2), ["ARRAY", "INT32"]),
        "large": ([1, 2**40], ["ARRAY", "UINT64"]),
        "wide": ([-1, 2**40], ["ARRAY", "INT64"]),
        "floats": ([0.5, 1.0], ["ARRAY", "FLOAT32"]),
        "bools": ([True, False], ["ARRAY", "BOOL"]),
        "strings": (["a", ""], ["ARRAY", "STRING"]),
        "numpy scalar": (np.uint8(3), ["UINT8"]),
        "numpy float": (np.float64(0.1), ["FLOAT64"]),
        "numpy bool": (np.bool_(True), ["BOOL"]),
        "0-d": (np.array(3, np.int16), ["INT16"]),
        "numpy scalars": ([np.int8(1), np.int8(-1)], ["ARRAY", "INT8"]),
        "numpy array": (np.array([1.0, 2.0]), ["ARRAY", "FLOAT64"]),
        "numpy strings": (np.array(["a", "b"]), ["ARRAY", "STRING"]),
        "big endian array": (np.array([1, 2], ">u2"), ["ARRAY", "UINT16"]),
        "jax array": (jnp.array([1, 2], jnp.int32), ["ARRAY", "INT32"]),
        "typed": (io.GGUFInt(3, io.GGUFValueType.INT64), ["INT64"]),
    }
    path = tmp_path / "a.gguf"
    io.save_gguf(path, {}, {key: value for key, (value, _) in cases.items()})
    fields = fields_of(path)
    for key, (value, types) in cases.items():
        expected = np.asarray(value).tolist()
        assert fields[key] == (types, expected), key


def test_empty_arrays(tmp_path):
    path = tmp_path / "a.gguf"
    io.save_gguf(path, {}, {"list": [], "numbers": np.array([], np.int16)})
    assert fields_of(path) == {"list": (["ARRAY"], []), "numbers": (["ARRAY"], [])}
    _, metadata = io.load_gguf(path)
    assert metadata["list"] == []
    assert metadata["numbers"].shape == (0,)
    assert metadata["numbers"].dtype == np.int16


def test_typed_ints_behave_as_ints():
    value = io.GGUFInt(3, io.GGUFValueType.UINT8)
    assert int(value) == 3
    assert type(value + 1) is int
    assert repr(value) == "3"
    assert (jnp.ones(4) * value).sum() == 12
    for copied in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert int(copied) == 3
        assert copied.value_type == io.GGUFValueType.UINT8
    with pytest.raises(ValueError, match="got 256, expected 0 to 255 for UINT8"):
        io.GGUFInt(256, io.GGUFValueType.UINT8)


def test_strings_that_are_not_utf8_survive(tmp_path):
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    tokens = [b"\xe6\xa8", b"\xff", b"ok", b"\xed\xb3\xbf"]
    write_with_gguf_py(path, metadata=[("tokens", tokens, V.ARRAY, None), ("s", b"\xc3", V.STRING, None)])
    _, metadata = io.load_gguf(path)
    assert [token.encode("utf-8", "surrogateescape") for token in metadata["tokens"]] == tokens
    assert metadata["tokens"][2] == "ok"
    io.save_gguf(again, {}, metadata)
    assert again.read_bytes() == path.read_bytes()


def test_the_table_of_types_agrees_with_gguf_py_and_with_the_formats():
    for ggml_type, (block, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        if ggml_type == T.Q8_1:  # gguf-py gives the 40 bytes of an older ggml; the block is 36
            block_bytes = 36
        ours = _gguf_types.TENSOR_TYPES[ggml_type]
        assert (ours.name.upper(), ours.block, ours.block_bytes) == (ggml_type.name, block, block_bytes)
    for format in GGUF_FORMATS.values():
        ours = _gguf_types.TENSOR_TYPE_OF_NAME[format.name]
        assert (ours.number, ours.block, ours.block_bytes) == (
            format.ggml_type,
            format.block,
            format.block_bytes,
        )


@pytest.mark.parametrize("format", WEIGHT_FORMATS)
def test_quantized_tensors(tmp_path, format):
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    ggml_type = T[format.upper()]
    matrix = random_rows(format, 5)
    experts = random_rows(format, 2 * 7, seed=1).reshape(2, 7, -1)
    write_with_gguf_py(path, tensors=[("matrix", matrix, ggml_type), ("experts", experts, ggml_type)])
    tensors, metadata = io.load_gguf(path)
    k = 3 * gguf.GGML_QUANT_SIZES[ggml_type][0]
    assert tensors["matrix"].shape == (k, 5)
    assert tensors["experts"].shape == (2, k, 7)
    for name, raw in {"matrix": matrix, "experts": experts}.items():
        w = tensors[name]
        assert isinstance(w, QTensor)
        assert w.format.name == format
        np.testing.assert_array_equal(w.to_gguf_bytes(), raw)
        dense = gguf.quants.dequantize(raw, ggml_type)
        assert np.isfinite(dense).all()
        np.testing.assert_array_equal(w.dequantize(), np.swapaxes(dense, -1, -2))
    io.save_gguf(again, tensors, metadata)
    assert again.read_bytes() == path.read_bytes()


PLAIN = {
    "f32": np.array([[1.5, -0.0, np.inf], [1e-45, 3, 4]], np.float32),
    "f16": np.array([1.5, 6e-8, -65504], np.float16),
    "bf16": np.array([[[1.5, 3e38]]], ml_dtypes.bfloat16),
    "f64": np.array([0.1, 1e300, 5e-324]),
    "i8": np.array([[-128], [127]], np.int8),
    "i16": np.array([-32768, 32767], np.int16),
    "i32": np.array([[[[-(2**31), 2**31 - 1]]]], np.int32),
    "i64": np.array([-(2**63), 2**63 - 1, 2**53 + 1]),
}


@pytest.mark.parametrize("x64", [False, True])
def test_plain_tensors(tmp_path, x64):
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    raws = {name: array.view(np.uint8) if name == "bf16" else array for name, array in PLAIN.items()}
    write_with_gguf_py(path, tensors=[(name, raws[name], T[name.upper()]) for name in PLAIN])
    with jax.enable_x64(x64):
        tensors, metadata = io.load_gguf(path)
        for name, array in PLAIN.items():
            loaded = tensors[name]
            assert isinstance(loaded, jax.Array if x64 or name not in ("f64", "i64") else np.ndarray)
            assert loaded.dtype == array.dtype
            assert loaded.shape == array.shape
            assert np.asarray(loaded).tobytes() == array.tobytes()
        io.save_gguf(again, tensors, metadata)
    assert again.read_bytes() == path.read_bytes()


def test_saved_tensors_are_what_gguf_py_reads(tmp_path):
    path = tmp_path / "a.gguf"
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    swapped = np.array([1, -2], ">i4")
    w = quantize(jnp.asarray(np.random.default_rng(0).standard_normal((64, 3), np.float32)), "q4_0")
    io.save_gguf(path, {"w": w, "transposed": transposed, "swapped": swapped, "jax": jnp.arange(3.0)})
    read = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert list(read) == ["w", "transposed", "swapped", "jax"]
    assert read["w"].tensor_type == T.Q4_0
    assert read["w"].shape.tolist() == [64, 3]
    np.testing.assert_array_equal(read["w"].data, w.to_gguf_bytes())
    np.testing.assert_array_equal(read["transposed"].data, transposed)
    np.testing.assert_array_equal(read["swapped"].data, [1, -2])
    np.testing.assert_array_equal(read["jax"].data, [0, 1, 2])


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_alignment(tmp_path, alignment):
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    tensors = [("a", np.arange(3, dtype=np.int8), None), ("b", np.ones(5, np.float32), None)]
    write_with_gguf_py(path, tensors=tensors, alignment=alignment)
    loaded, metadata = io.load_gguf(path)
    header = io.read_gguf_header(path)
    assert metadata["general.alignment"] == header.alignment == alignment
    assert [t.data_offset for t in gguf.GGUFReader(path).tensors] == [t.offset for t in header.tensors.values()]
    io.save_gguf(again, loaded, metadata)
    assert again.read_bytes() == path.read_bytes()
    io.save_gguf(again, loaded, {**metadata, "general.alignment": np.uint32(alignment)})
    assert again.read_bytes() == path.read_bytes()


def test_version_2_reads_and_big_endian_does_not(tmp_path):
    path = tmp_path / "a.gguf"
    one = np.ones(8, np.float32)
    write_with_gguf_py(path, metadata=SCALARS, tensors=[("t", one, None)])
    _, metadata = io.load_gguf(path)
    data = bytearray(path.read_bytes())
    data[4] = 2
    path.write_bytes(data)
    assert io.read_gguf_header(path).version == 2
    tensors, older = io.load_gguf(path)
    assert older == metadata
    np.testing.assert_array_equal(tensors["t"], one)
    write_with_gguf_py(path, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(io.FormatError, match="version at byte 4: the file is big endian"):
        io.load_gguf(path)
