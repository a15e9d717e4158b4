"""Damaged and hostile GGUF files: a FormatError that says where, and no memory taken on a number's word."""

import dataclasses
import gc
import os
import pickle
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jax_qgemm import io
from jax_qgemm.io._gguf_file import GGUFFile
from jax_qgemm.io._gguf_reader import read_header, read_tensor
from tests import gguf_builder as gb
from tests.gguf_builder import Entry, Tensor


def read_all(path):
    """Header and every tensor's bytes."""
    with GGUFFile(path) as file:
        header = read_header(file)
        return header, {name: read_tensor(file, info) for name, info in header.tensors.items()}


def u8_entry(key=b"k", value=b"\0"):
    return Entry(key, gb.UINT8, value)


def vector(name=b"t", *, dims=(8,), type=gb.F32, offset=0, ndim=None):
    return Tensor(name, dims, type, offset, ndim)


DATA = bytes(range(32))

# What: the file, the field that the error names, where that field starts, a word of the problem.
BAD_FILES = {
    "magic": (gb.build(magic=b"GGML"), "magic", "magic", "not a GGUF file"),
    "magic of a big endian tool": (gb.build(magic=b"FUGG"), "magic", "magic", "not a GGUF file"),
    "version 0": (gb.build(version=0), "version", "version", "version 0"),
    "version 1": (gb.build(version=1), "version", "version", "version 1"),
    "version 4": (gb.build(version=4), "version", "version", "version 4"),
    "big endian": (gb.build(version=3 << 24), "version", "version", "big endian"),
    "tensor count": (gb.build(tensor_count=2**64 - 1), "tensor count", "count of tensors", "entries"),
    "tensor count that wraps": (gb.build(tensor_count=2**59), "tensor count", "count of tensors", "entries"),
    "metadata count": (gb.build(metadata_count=2**63), "metadata count", "count of metadata", "entries"),
    "empty key": (gb.build([u8_entry(b"")]), "metadata key 0", ("key", 0), "empty"),
    "NUL in a key": (gb.build([u8_entry(b"a\0b")]), "metadata key 0", ("key", 0), "NUL"),
    "key that is not UTF-8": (gb.build([u8_entry(b"a\xff")]), "metadata key 0", ("key", 0), "UTF-8"),
    "key of a surrogate": (gb.build([u8_entry(b"\xed\xb3\xbf")]), "metadata key 0", ("key", 0), "UTF-8"),
    "long key": (gb.build([u8_entry(b"a" * 65536)]), "metadata key 0", ("key", 0), "65536 bytes"),
    "duplicate key": (gb.build([u8_entry(), u8_entry()]), "metadata key 1", ("key", 1), "duplicate"),
    "value type": (gb.build([Entry(b"k", 13, b"\0" * 8)]), "metadata 'k'", ("value type", 0), "type 13"),
    "bool of 2": (gb.build([Entry(b"k", gb.BOOL, b"\2")]), "metadata 'k'", ("value", 0), "BOOL of 2"),
    "array of arrays": (
        gb.build([Entry(b"k", gb.ARRAY, gb.array(gb.ARRAY, 1, gb.array(gb.UINT8, 1, b"\0")))]),
        "metadata 'k'", ("value", 0), "array of arrays",
    ),
    "empty array of arrays": (
        gb.build([Entry(b"k", gb.ARRAY, gb.array(gb.ARRAY, 0, b""))]),
        "metadata 'k'", ("value", 0), "array of arrays",
    ),
    "element type": (
        gb.build([Entry(b"k", gb.ARRAY, gb.array(99, 1, b"\0"))]), "metadata 'k'", ("value", 0), "type 99",
    ),
    "zero alignment": (
        gb.build([Entry(b"general.alignment", gb.UINT32, gb.u32(0))]),
        "metadata 'general.alignment'", ("value type", 0), "power of two",
    ),
    "alignment of 48": (
        gb.build([Entry(b"general.alignment", gb.UINT32, gb.u32(48))]),
        "metadata 'general.alignment'", ("value type", 0), "power of two",
    ),
    "alignment of type UINT64": (
        gb.build([Entry(b"general.alignment", gb.UINT64, gb.u64(32))]),
        "metadata 'general.alignment'", ("value type", 0), "UINT32",
    ),
    "alignment beyond UINT32": (
        gb.build([Entry(b"general.alignment", gb.UINT64, gb.u64(2**40))]),
        "metadata 'general.alignment'", ("value type", 0), "UINT32",
    ),
    "alignment that is true": (
        gb.build([Entry(b"general.alignment", gb.BOOL, b"\1")]),
        "metadata 'general.alignment'", ("value type", 0), "UINT32",
    ),
    "NUL in a name": (gb.build([], [vector(b"a\0")], DATA), "tensor name 0", ("name", 0), "NUL"),
    "name that is not UTF-8": (gb.build([], [vector(b"\xc3")], DATA), "tensor name 0", ("name", 0), "UTF-8"),
    "duplicate name": (
        gb.build([], [vector(), vector(offset=32)], DATA * 2), "tensor name 1", ("name", 1), "duplicate",
    ),
    "no dimensions": (gb.build([], [vector(dims=())], DATA), "tensor 't': dimensions", ("dims", 0), "0 dim"),
    "five dimensions": (
        gb.build([], [vector(dims=(1,) * 5)], DATA), "tensor 't': dimensions", ("dims", 0), "5 dim",
    ),
    "four billion dimensions": (
        gb.build([], [vector(ndim=2**32 - 1)], DATA), "tensor 't': dimensions", ("dims", 0), "4294967295 dim",
    ),
    "dimension of zero": (
        gb.build([], [vector(dims=(8, 0))], DATA), "tensor 't': dimensions", ("dims", 0), "zero",
    ),
    "elements that wrap to 8": (
        gb.build([], [vector(dims=(2**63 + 4, 2))], DATA), "tensor 't': dimensions", ("dims", 0), "2^63",
    ),
    "bytes that wrap to 32": (
        gb.build([], [vector(dims=(2**62 + 8,))], DATA),
        "tensor 't': offset", ("offset", 0), "leave the file",
    ),
    "part of a block": (
        gb.build([], [vector(dims=(33, 2), type=gb.Q4_0)], DATA * 2),
        "tensor 't': dimensions", ("dims", 0), "multiple of q4_0's 32",
    ),
    "tensor type": (gb.build([], [vector(type=42)], DATA), "tensor 't': type", ("type", 0), "type 42"),
    "removed tensor type": (gb.build([], [vector(type=4)], DATA), "tensor 't': type", ("type", 0), "type 4"),
    "misaligned offset": (
        gb.build([], [vector(offset=16)], DATA * 2), "tensor 't': offset", ("offset", 0), "multiple",
    ),
    "offset beyond the file": (
        gb.build([], [vector(offset=32)], DATA), "tensor 't': offset", ("offset", 0), "leave the file",
    ),
    "offset that wraps": (
        gb.build([], [vector(offset=2**64 - 32)], DATA),
        "tensor 't': offset", ("offset", 0), "leave the file",
    ),
    "size beyond the file": (
        gb.build([], [vector(dims=(9,))], DATA), "tensor 't': offset", ("offset", 0), "leave the file",
    ),
    "overlap": (
        gb.build([], [vector(b"b", offset=32), vector(b"a", dims=(9,))], DATA * 2),
        "tensor 'b': offset", ("offset", 0), "overlap those of tensor 'a'",
    ),
    "same data twice": (
        gb.build([], [vector(b"a"), vector(b"b")], DATA), "tensor 'b': offset", ("offset", 1), "overlap",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_FILES)
def test_error_names_field_and_offset(tmp_path, what):
    built, field, mark, problem = BAD_FILES[what]
    path = tmp_path / "bad.gguf"
    path.write_bytes(built.data)
    with pytest.raises(io.FormatError) as caught:
        read_all(path)
    assert caught.value.field == field
    assert caught.value.offset == built.marks[mark]
    assert problem in caught.value.problem
    for part in (str(path), field, f"byte {built.marks[mark]}", problem):
        assert part in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


def test_every_prefix_is_refused(tmp_path):
    data = gb.small().data
    path = tmp_path / "prefix.gguf"
    path.write_bytes(data)
    assert len(read_all(path)[1]) == 3
    for nbytes in range(len(data)):
        path.write_bytes(data[:nbytes])
        with pytest.raises(io.FormatError) as caught:
            read_all(path)
        assert 0 <= caught.value.offset <= nbytes
        with pytest.raises(io.FormatError):
            io.load_gguf(path)


@pytest.mark.parametrize("shortened", range(1, 164, 9))
def test_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch, shortened):
    data = gb.small().data
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(data)
    real = os.preadv
    reads = []

    def preadv(fd, buffers, offset):
        if len(reads) == 1:
            os.truncate(path, len(data) - shortened)
        reads.append(real(fd, buffers, offset))
        return reads[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(io.FormatError, match=f"no more data, but the file had {len(data)} bytes") as caught:
        read_all(path)
    assert "data" in caught.value.field
    assert caught.value.offset >= len(data) - shortened


def test_file_that_shrinks_before_its_header_is_read(tmp_path):
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(gb.small().data)
    with GGUFFile(path) as file:
        os.truncate(path, 2)
        with pytest.raises(io.FormatError, match="magic at byte 2: no more data"):
            read_header(file)


def test_short_reads_are_continued(tmp_path, monkeypatch):
    path = tmp_path / "slow.gguf"
    path.write_bytes(gb.small().data)
    header, tensors = read_all(path)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:7]], offset))
    slow_header, slow_tensors = read_all(path)
    assert slow_header.tensors == header.tensors
    assert slow_header.metadata.keys() == header.metadata.keys()
    for name, raw in tensors.items():
        np.testing.assert_array_equal(slow_tensors[name], raw)


def many_strings():
    raw = b"".join(gb.string(b"%03x" % (i & 0xFFF)) for i in range(700_000))
    return [Entry(b"k", gb.ARRAY, gb.array(gb.STRING, 700_000, raw))]


def many_entries():
    return [u8_entry(b"%x" % i) for i in range(150_000)]


def wide_string():
    return [Entry(b"k", gb.STRING, gb.string(b"a" * (24 << 20) + "\U0001f600".encode()))]


def large_array():
    return [Entry(b"k", gb.ARRAY, gb.array(gb.BOOL, 60 << 20, bytes(60 << 20)))]


def narrow_string():
    return [Entry(b"k", gb.STRING, gb.string(b"a" * (24 << 20) + "\u4e00".encode()))]


LYING = {
    "string array": gb.build([Entry(b"k", gb.ARRAY, gb.array(gb.STRING, 2**40, bytes(64)))]),
    "number array": gb.build([Entry(b"k", gb.ARRAY, gb.array(gb.UINT8, 2**40, bytes(64)))]),
    "number array that wraps": gb.build([Entry(b"k", gb.ARRAY, gb.array(gb.UINT64, 2**61, bytes(64)))]),
    "string": gb.build([Entry(b"k", gb.STRING, gb.u64(2**62) + bytes(64))]),
    "counts": gb.build(tensor_count=2**40, metadata_count=2**40),
    "tensor": gb.build([], [vector(dims=(2**40,))], bytes(64)),
}


@pytest.mark.parametrize("what", LYING)
def test_nothing_is_allocated_for_bytes_that_are_not_there(tmp_path, what):
    path = tmp_path / "lying.gguf"
    path.write_bytes(LYING[what].data)
    tracemalloc.start()
    try:
        with pytest.raises(io.FormatError):
            read_all(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def resident(field):
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(rf"^{field}:\s+(\d+) kB$", status, re.M)
    return int(kilobytes) << 10


# A header may hold long strings and large vocabularies, but not what takes many times its bytes in memory.
@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (many_strings, False),
        (large_array, False),
        (narrow_string, False),
        (wide_string, True),
        (many_entries, True),
    ],
)
def test_memory_is_bounded_by_the_bytes_read(tmp_path, make, refused):
    path = tmp_path / "large.gguf"
    path.write_bytes(gb.build(make()).data)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    if refused:
        with pytest.raises(io.FormatError, match="bytes of memory to decode"):
            read_all(path)
    else:
        read_all(path)
    assert resident("VmHWM") - before <= (64 << 20) + 4 * path.stat().st_size


def test_data_may_lie_in_any_order_with_gaps_and_without_padding_at_the_end(tmp_path):
    tensors = [vector(b"last", dims=(3,), offset=128), vector(b"first", dims=(2,))]
    data = struct.pack("<2f", 1, 2).ljust(128, b"\xff") + struct.pack("<3f", 3, 4, 5)
    path = tmp_path / "gaps.gguf"
    path.write_bytes(gb.build([], tensors, data).data)
    loaded, metadata = io.load_gguf(path)
    assert metadata == {}
    assert list(loaded) == ["last", "first"]
    np.testing.assert_array_equal(np.asarray(loaded["last"]), [3, 4, 5])
    np.testing.assert_array_equal(np.asarray(loaded["first"]), [1, 2])


def test_alignment_may_exceed_the_header(tmp_path):
    entry = Entry(b"general.alignment", gb.UINT32, gb.u32(4096))
    path = tmp_path / "aligned.gguf"
    path.write_bytes(gb.build([entry], [vector()], DATA, alignment=4096).data)
    header, tensors = read_all(path)
    assert header.alignment == 4096
    assert dataclasses.astuple(header.tensors["t"]) == ("t", "f32", (8,), 4096, 32)
    np.testing.assert_array_equal(tensors["t"], np.frombuffer(DATA, np.uint8))


def test_missing_file_and_directory_are_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        io.load_gguf(tmp_path / "none.gguf")
    with pytest.raises(IsADirectoryError):
        io.load_gguf(tmp_path)
