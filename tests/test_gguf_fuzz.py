"""Random GGUF files: whatever the bytes, the reader gives a consistent table or a FormatError."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jax_qgemm import io
from jax_qgemm.io._gguf_file import GGUFFile
from jax_qgemm.io._gguf_reader import read_header, read_tensor
from tests import gguf_builder as gb

SMALL = gb.small().data
_SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}

NUMBERS = st.one_of(
    st.sampled_from([0, 1, 7, 8, 9, 13, 31, 32, 64, 255, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 300),
)


@st.composite
def edits(draw):
    """A valid file with a few bytes or numbers overwritten, removed or repeated."""
    data = bytearray(SMALL)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["byte", "u32", "u64", "remove", "repeat", "insert"])):
            case "byte":
                data[at] = draw(st.integers(0, 255))
            case "u32":
                data[at : at + 4] = struct.pack("<I", draw(NUMBERS) & 0xFFFFFFFF)
            case "u64":
                data[at : at + 8] = struct.pack("<Q", draw(NUMBERS))
            case "remove":
                del data[at : at + draw(st.integers(1, 40))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 80))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=40))
        if not data:
            break
    return bytes(data)


def check(path, data):
    """Reads everything; returns the header, or None where it was refused."""
    path.write_bytes(data)
    refused = None
    try:
        with GGUFFile(path) as file:
            header = read_header(file)
            tensors = {name: read_tensor(file, info) for name, info in header.tensors.items()}
    except io.FormatError as error:
        refused = error
    if refused is not None:
        assert 0 <= refused.offset <= len(data)
        assert refused.field
        return None
    end = 0
    for info in sorted(header.tensors.values(), key=lambda info: info.offset):
        assert info.offset % header.alignment == 0
        assert end <= info.offset
        end = info.offset + info.nbytes
        assert end <= len(data)
        assert tensors[info.name].tobytes() == data[info.offset : end]
    return header


@settings(max_examples=1500, **_SETTINGS)
@given(edits())
def test_edited_files(tmp_path, data):
    tracemalloc.start()
    try:
        check(tmp_path / "fuzz.gguf", data)
        assert tracemalloc.get_traced_memory()[1] <= (64 << 20) + 4 * len(data)
    finally:
        tracemalloc.stop()


@settings(max_examples=300, **_SETTINGS)
@given(st.binary(max_size=400), st.integers(0, 3), st.integers(0, 3))
@example(b"", 0, 0)
def test_random_bytes_after_the_counts(tmp_path, body, tensor_count, metadata_count):
    head = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, metadata_count)
    check(tmp_path / "fuzz.gguf", head + body)


@settings(max_examples=400, **_SETTINGS)
@given(edits())
def test_what_is_accepted_is_what_gguf_py_reads(tmp_path, data):
    path = tmp_path / "fuzz.gguf"
    header = check(path, data)
    if header is None:
        return
    reader = gguf.GGUFReader(path)
    assert reader.alignment == header.alignment
    assert [(t.name, t.tensor_type.name.lower(), t.shape.tolist()[::-1], t.data_offset) for t in reader.tensors] == [
        (t.name, t.type, list(t.shape), t.offset) for t in header.tensors.values()
    ]
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(fields) == list(header.metadata)


# What save_gguf takes, as (value, its exact form in NumPy or Python, the gguf-py types).
_DTYPES = {t.name: np.dtype(t.name.lower()) for t in gguf.GGUFValueType if t.name[0] in "UIF"}


def numbers(type_name):
    dtype = _DTYPES[type_name]
    if dtype.kind == "f":
        return st.floats(width=32 if dtype.itemsize == 4 else 64).map(dtype.type)
    limits = np.iinfo(dtype)
    return st.integers(int(limits.min), int(limits.max)).map(dtype.type)


SCALARS = st.one_of(
    st.sampled_from(sorted(_DTYPES)).flatmap(lambda t: numbers(t).map(lambda v: (v, t))),
    st.booleans().map(lambda v: (v, "BOOL")),
    st.text().map(lambda v: (v, "STRING")),
)
ARRAYS = st.one_of(
    st.sampled_from(sorted(_DTYPES)).flatmap(
        lambda t: st.lists(numbers(t)).map(lambda v: (np.array(v, _DTYPES[t]), t))
    ),
    st.lists(st.booleans()).map(lambda v: (np.array(v, bool), "BOOL")),
    st.lists(st.text()).map(lambda v: (v, "STRING")),
)
KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(
    lambda key: key != "general.alignment" and not key.startswith("GGUF.")
)


def same(a, b):
    if isinstance(a, (str, list)):
        return a == b
    return np.asarray(a).tobytes() == np.asarray(b, np.asarray(a).dtype).tobytes()


@settings(max_examples=150, **_SETTINGS)
@given(st.dictionaries(KEYS, st.one_of(SCALARS, ARRAYS), max_size=6))
@pytest.mark.filterwarnings("error")
def test_metadata_round_trip(tmp_path, entries):
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    io.save_gguf(path, {}, {key: value for key, (value, _) in entries.items()})
    _, metadata = io.load_gguf(path)
    assert list(metadata) == list(entries)
    fields = gguf.GGUFReader(path).fields
    for key, (value, type_name) in entries.items():
        assert same(value, metadata[key])
        types = [t.name for t in fields[key].types]
        if isinstance(value, (list, np.ndarray)):
            assert isinstance(metadata[key], type(value))
            assert types[0] == "ARRAY"
            assert types[1:] in ([type_name], [])  # gguf-py has no type for empty arrays
            if len(value):
                assert same(np.asarray(value), fields[key].contents()) or same(value, fields[key].contents())
        else:
            assert types == [type_name]
            assert same(value, fields[key].contents())
    io.save_gguf(again, {}, metadata)
    assert again.read_bytes() == path.read_bytes()
