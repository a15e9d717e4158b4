"""Directories of safetensors: shards, indexes, and whatever a stranger may put there."""

import json
import os
import re
import struct
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import jax_qgemm as qg
from jax_qgemm import io
from jax_qgemm.io import _strict_json
from jax_qgemm.io._safetensors import SafetensorsDirectory, read_header
from tests import checkpoint_builder as cb

INDEX = "model.safetensors.index.json"
ORACLE = cb.random_weight(4, 64, 40, 32, symmetric=False, act_order=True)
CONFIG = cb.gptq_config(ORACLE, 32, 2)


# Shards.


def write_shards(path, tensors, split, config=CONFIG):
    """`split` gives the file of a name."""
    path.mkdir(exist_ok=True)
    weight_map = {name: split(name) for name in tensors}
    for shard in set(weight_map.values()):
        held = {name: np.ascontiguousarray(v) for name, v in tensors.items() if weight_map[name] == shard}
        save_file(held, path / shard)
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({"quantization_config": config}))
    return path


def by_part(name):
    return f"model-{name[-1]}.safetensors"


def test_a_module_whose_tensors_are_in_several_files(tmp_path):
    tensors = cb.gptq_tensors(ORACLE, 2) | {"norm.weight": np.ones(3, np.float32)}
    loaded, _ = io.load_gptq(write_shards(tmp_path / "a", tensors, by_part))
    cb.check_weight(loaded["layer.weight"], ORACLE, 32)
    assert loaded.keys() == {"layer.weight", "norm.weight"}


def test_shards_are_written_and_read(tmp_path):
    names = [f"layers.{i}.weight" for i in range(5)]
    tensors = {name: cb.quantized(qg.int4(32), 64, 16 * i + 16) for i, name in enumerate(names)}
    path = tmp_path / "new" / "a"
    io.save_gptq(path, tensors, max_shard_bytes=3000)
    files = sorted(f.name for f in path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    index = json.loads((path / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(files)
    held = {name: value for file in files for name, value in cb.tensors_of(path / file).items()}
    assert index["weight_map"].keys() == held.keys()
    assert index["metadata"]["total_size"] == sum(len(raw) for _, _, raw in held.values())
    loaded, _ = io.load_gptq(path)
    assert loaded.keys() == tensors.keys()
    for name, w in tensors.items():
        np.testing.assert_array_equal(cb.decoded(loaded[name]), cb.decoded(w))
    io.save_gptq(path, tensors, max_shard_bytes=3000)  # over itself
    with pytest.raises(ValueError, match=r"holds other safetensors files, such as 'model-00001-of-00004"):
        io.save_gptq(path, tensors)
    assert not list(path.glob("*.tmp"))


def test_nothing_is_left_of_a_save_that_fails(tmp_path, monkeypatch):
    def fail(arrays, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        io.save_gptq(tmp_path / "a", {"a.weight": cb.quantized(qg.int4(32))})
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("text", TypeError, "got str, expected a QTensor or an array"),
        (np.zeros(2, np.complex128), TypeError, "array of complex128"),
    ],
)
def test_what_safetensors_can_not_hold(tmp_path, value, error, message):
    with pytest.raises(error, match=message):
        io.save_gptq(tmp_path / "a", {"a.weight": cb.quantized(qg.int4(32)), "b": value})
    with pytest.raises(TypeError, match=r"metadata: config\.json can't hold it"):
        io.save_gptq(tmp_path / "a", {"a.weight": cb.quantized(qg.int4(32))}, {"x": object()})


def test_which_file_is_read(tmp_path):
    tensors = cb.gptq_tensors(ORACLE, 2)
    path = cb.write_directory(tmp_path / "a", tensors, CONFIG, "gptq_model-4bit.safetensors")
    cb.check_weight(io.load_gptq(path)[0]["layer.weight"], ORACLE, 32)
    save_file({"other": np.ones(1, np.float32)}, path / "consolidated.safetensors")
    with pytest.raises(io.FormatError, match="2 safetensors files, but neither an index"):
        io.load_gptq(path)
    os.rename(path / "gptq_model-4bit.safetensors", path / "model.safetensors")
    assert io.load_gptq(path)[0].keys() == {"layer.weight"}


def test_pickles_are_never_read(tmp_path):
    path = cb.write_directory(tmp_path / "a", cb.gptq_tensors(ORACLE, 2), CONFIG)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(io.FormatError, match=r"'pytorch_model.bin' may be a pickle.* convert the checkpoint"):
        io.load_gptq(path)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(io.FormatError, match="no safetensors file; convert"):
        io.load_gptq(path)


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError):
        io.load_gptq(tmp_path / "none")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        io.load_awq(tmp_path / "file")


def test_safetensors_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for load in (io.load_gptq, io.load_awq, io.load_compressed_tensors):
        with pytest.raises(ImportError, match=re.escape("pip install 'jax_qgemm[checkpoints]'")):
            load(tmp_path)
    with pytest.raises(ImportError, match="needs the package safetensors"):
        io.save_gptq(tmp_path / "a", {"a.weight": cb.quantized(qg.int4(32))})


# What leaves the directory, or is no file.


@pytest.fixture
def sharded(tmp_path):
    return write_shards(tmp_path / "a", cb.gptq_tensors(ORACLE, 2), by_part)


def edit_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shard", ["../b/model-x.safetensors", "/etc/model.safetensors", "..\\m.safetensors", ".."])
def test_a_shard_that_leaves_the_directory(sharded, shard):
    (sharded.parent / "b").mkdir()
    (sharded / "model-x.safetensors").rename(sharded.parent / "b" / "model-x.safetensors")
    edit_index(sharded, lambda names: names.update({"layer.g_idx": shard}))
    with pytest.raises(io.FormatError, match=r"leaves the directory|expected a \.safetensors file"):
        io.load_gptq(sharded)


@pytest.mark.parametrize("name", ["model-x.safetensors", "config.json", INDEX])
def test_a_symbolic_link_that_leaves_the_directory(sharded, name):
    (sharded.parent / "b").mkdir()
    (sharded / name).rename(sharded.parent / "b" / name)
    (sharded / name).symlink_to(f"../b/{name}")
    with pytest.raises(io.FormatError, match="symbolic link that leaves") as caught:
        io.load_gptq(sharded)
    assert caught.value.path == str(sharded / name)


def test_a_symbolic_link_within_the_directory(sharded):
    (sharded / "model-x.safetensors").rename(sharded / "blob")
    (sharded / "model-x.safetensors").symlink_to("blob")
    cb.check_weight(io.load_gptq(sharded)[0]["layer.weight"], ORACLE, 32)


def test_the_links_of_the_hugging_face_cache(tmp_path):
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    path = write_shards(repository / "snapshots" / "0123", cb.gptq_tensors(ORACLE, 2), by_part)
    for i, file in enumerate(sorted(path.iterdir())):
        file.rename(repository / "blobs" / str(i))
        file.symlink_to(f"../../blobs/{i}")
    cb.check_weight(io.load_gptq(path)[0]["layer.weight"], ORACLE, 32)
    (path / "config.json").unlink()
    (path / "config.json").symlink_to("../../../other")
    with pytest.raises(io.FormatError, match="symbolic link that leaves"):
        io.load_gptq(path)


@pytest.mark.parametrize("name", ["model-x.safetensors", "config.json", INDEX])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("missing", path)])
def test_what_is_no_file_is_not_opened(sharded, name, make):
    (sharded / name).unlink()
    make(sharded / name)  # opening a pipe would wait for ever
    with pytest.raises(io.FormatError, match=r"not a regular file|can't be opened"):
        io.load_gptq(sharded)


def test_a_missing_shard(sharded):
    (sharded / "model-x.safetensors").unlink()
    with pytest.raises(io.FormatError, match="no such file") as caught:
        io.load_gptq(sharded)
    assert caught.value.path == str(sharded / "model-x.safetensors")


def test_index_and_files_that_disagree(sharded):
    edit_index(sharded, lambda names: names.update({"layer.extra": "model-x.safetensors"}))
    with pytest.raises(io.FormatError, match=r"no file has the tensor 'layer\.extra'"):
        io.load_gptq(sharded)
    edit_index(sharded, lambda names: names.pop("layer.extra"))
    edit_index(sharded, lambda names: names.update({"layer.g_idx": "model-t.safetensors"}))
    edit_index(sharded, lambda names: names.update({"x": "model-x.safetensors"}))
    with pytest.raises(io.FormatError, match=r"the index says that it is in 'model-t\.safetensors'"):
        io.load_gptq(sharded)


def test_a_tensor_in_two_files(sharded):
    save_file({"layer.g_idx": ORACLE.g_idx, "y": ORACLE.g_idx}, sharded / "model-y.safetensors")
    edit_index(sharded, lambda names: names.update({"y": "model-y.safetensors"}))
    with pytest.raises(io.FormatError, match=r"it is also in|the index says"):
        io.load_gptq(sharded)


@pytest.mark.parametrize(
    "index",
    [
        b"", b"[]", b"null", b"{", b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": ["x"]}}', b'{"weight_map": {"a": "x.bin"}}', b"\xff", b"[" * 10_000,
        b'{"weight_map": ' + b'{"a":' * 10_000, b'{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}',
        b'{"weight_map": NaN}', b'{"weight_map": ' + b"1" * 5000 + b"}",
    ],
)  # fmt: skip
def test_bad_index(sharded, index):
    (sharded / INDEX).write_bytes(index)
    with pytest.raises(io.FormatError) as caught:
        io.load_gptq(sharded)
    assert caught.value.path == str(sharded / INDEX)


@pytest.mark.parametrize(
    "config",
    [
        b"", b"[]", b"[" * 10_000, b'{"quantization_config": ' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"quantization_config": []}', b'{"quantization_config": 1}', b'{"a": 1, "a": 1}', b'{"a": Infinity}', b"\xff",
    ],
)  # fmt: skip
def test_bad_config_file(sharded, config):
    (sharded / "config.json").write_bytes(config)
    for load in (io.load_gptq, io.load_awq, io.load_compressed_tensors):
        with pytest.raises(io.FormatError) as caught:
            load(sharded)
        assert caught.value.path == str(sharded / "config.json")


def test_files_of_json_are_bounded(sharded, monkeypatch):
    monkeypatch.setattr(_strict_json, "MAX_BYTES", 100)
    with pytest.raises(io.FormatError, match=r"bytes, expected at most 100"):
        io.load_gptq(sharded)


# Headers.

EIGHT = bytes(8)
BAD_FILES = {
    "empty": b"",
    "seven bytes": b"\2\0\0\0\0\0\0",
    "no header": cb.container(b""),
    "header beyond the file": cb.container({}, nbytes=100),
    "header of 2^64 - 1 bytes": cb.container({}, nbytes=2**64 - 1),
    "no object": cb.container(b"[]"),
    "a space first": cb.container(b" {}"),
    "not JSON": cb.container(b"{]"),
    "not UTF-8": cb.container(b'{"\xff": 1}'),
    "nested": cb.container(b'{"a":' * 10_000),
    "nested arrays": cb.container(b'{"a":' + b"[" * 10_000),
    "key twice": cb.container(b'{"a": %b, "a": %b}' % (2 * (json.dumps(cb.entry()).encode(),)), EIGHT),
    "key twice, escaped": cb.container(b'{"a": %b, "\\u0061": %b}' % (2 * (json.dumps(cb.entry()).encode(),)), EIGHT),
    "dtype twice": cb.container(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT),
    "metadata of a number": cb.container({"__metadata__": {"a": 1}}),
    "metadata of a list": cb.container({"__metadata__": []}),
    "entry of a list": cb.container({"a": [1]}),
    "entry without a dtype": cb.container({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT),
    "entry with more": cb.container({"a": {**cb.entry(), "x": 1}}, EIGHT),
    "unknown dtype": cb.container({"a": cb.entry(dtype="F4")}, EIGHT),
    "dtype of a number": cb.container({"a": cb.entry(dtype=4)}, EIGHT),
    "shape of floats": cb.container({"a": cb.entry(shape=[2.0])}, EIGHT),
    "shape of true": cb.container({"a": cb.entry(0, 4, shape=[True])}, bytes(4)),
    "negative shape": cb.container({"a": cb.entry(shape=[-2])}, EIGHT),
    "two negative axes": cb.container({"a": cb.entry(shape=[-1, -2])}, EIGHT),
    "shape of a number": cb.container({"a": {**cb.entry(), "shape": 2}}, EIGHT),
    "shape that wraps": cb.container({"a": cb.entry(shape=[2**62 + 2])}, EIGHT),
    "many axes": cb.container({"a": cb.entry(0, 4, shape=[1] * 17)}, bytes(4)),
    "one offset": cb.container({"a": {**cb.entry(), "data_offsets": [8]}}, EIGHT),
    "offsets the wrong way": cb.container({"a": cb.entry(8, 0)}, EIGHT),
    "offset below zero": cb.container({"a": cb.entry(-8, 0)}, EIGHT),
    "huge offsets": cb.container({"a": cb.entry(2**70, 2**70 + 8)}, EIGHT),
    "other size": cb.container({"a": cb.entry(shape=[3])}, EIGHT),
    "size past the end": cb.container({"a": cb.entry(0, 16, shape=[4])}, EIGHT),
    "data left over": cb.container({"a": cb.entry()}, bytes(9)),
    "hole": cb.container({"a": cb.entry(8, 16)}, bytes(16)),
    "overlap": cb.container({"a": cb.entry(), "b": cb.entry(4, 12)}, bytes(12)),
    "overlap in a file of the right size": cb.container({"a": cb.entry(), "b": cb.entry(4, 12)}, bytes(16)),
    "same data twice": cb.container({"a": cb.entry(), "b": cb.entry()}, EIGHT),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_header(tmp_path, what):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_FILES[what])
    tracemalloc.start()
    try:
        with pytest.raises(io.FormatError) as caught:
            SafetensorsDirectory(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.path == str(path)
    assert 0 <= caught.value.offset <= len(BAD_FILES[what])


def test_header_of_an_insane_size(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate((1 << 30) + 8)  # sparse
    with pytest.raises(io.FormatError, match="expected at most"):
        SafetensorsDirectory(tmp_path)


def test_what_a_good_header_says(tmp_path):
    tensors = {"b": cb.entry(4, 12), "a": cb.entry(0, 4, "BF16", (2, 1)), "c": cb.entry(12, 12, shape=[0])}
    header = {"__metadata__": {"format": "pt"}, **tensors}
    path = tmp_path / "model.safetensors"
    path.write_bytes(cb.container(header, struct.pack("<2H2f", 0x3F80, 0xC000, 1.5, -2.5)))
    infos = read_header(str(path))
    start = path.stat().st_size - 12
    assert [(i.name, i.dtype, i.shape, i.offset, i.nbytes) for i in infos.values()] == [
        ("a", "BF16", (2, 1), start, 4),
        ("b", "F32", (2,), start + 4, 8),
        ("c", "F32", (0,), start + 12, 0),
    ]
    with SafetensorsDirectory(tmp_path) as directory:
        np.testing.assert_array_equal(directory.read("a"), np.array([[1], [-2]], ml_dtypes.bfloat16))
        np.testing.assert_array_equal(directory.read("b"), np.array([1.5, -2.5], np.float32))
        assert directory.read("c").shape == (0,)


@pytest.mark.parametrize("name", ["\\ud800", "a\\n\\u001b[31m"])
def test_names_that_a_terminal_should_not_see(tmp_path, name):
    header = b'{"%b": %b}' % (name.encode(), json.dumps(cb.entry()).encode())
    (tmp_path / "model.safetensors").write_bytes(cb.container(header, EIGHT))
    with pytest.raises(io.FormatError, match="characters that can't be printed"):
        SafetensorsDirectory(tmp_path)


def test_a_shard_that_the_index_forgets(tmp_path):
    for i in (1, 2):
        save_file({f"t{i}": np.ones(2, np.float32)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    index = {"weight_map": {"t1": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(io.FormatError, match="lists no tensor of the file 'model-00002-of-00002"):
        SafetensorsDirectory(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_file_that_shrinks(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(8, dtype)}, path)
    with SafetensorsDirectory(tmp_path) as directory:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(io.FormatError):
            directory.read("a")
