"""A directory of safetensors files from a stranger: every header is checked before the library opens the file.

The container is that of the safetensors repository's README, "Format": a little-endian u64, a JSON header of that many
bytes, the data, without holes or overlaps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import stat
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from jax_qgemm.io import _strict_json
from jax_qgemm.io._strict_json import Config
from jax_qgemm.io.errors import FormatError, shorten

_NUMPY_DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
# The library gives float8 as no NumPy array, bfloat16 in its later releases only.
_EXTENSION_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
DTYPES = _NUMPY_DTYPES | _EXTENSION_DTYPES

INDEX_NAME = "model.safetensors.index.json"
_INDEX_SUFFIX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
      name: its name.
      dtype: its dtype as safetensors spells it, such as "BF16".
      shape: its elements.
      path: the file.
      offset: of its data, in bytes from the start of the file.
      nbytes: of its data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    offset: int
    nbytes: int

    def fail(self, problem: str) -> NoReturn:
        raise FormatError(self.path, f"tensor {shorten(self.name)}", self.offset, problem)


class SafetensorsDirectory:
    """The tensors and the JSON files of a directory.

    Attributes:
      path: the directory.
      tensors: what the files hold, by name, in the order of the files and of the data in them.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._library = import_safetensors()
        self._real = os.path.realpath(self.path)
        self._names = sorted(os.listdir(self.path))
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        self.tensors = self._scan()

    def __enter__(self) -> SafetensorsDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def config(self, name: str) -> Config | None:
        """The JSON file of that name, None where there is none."""
        if name not in self._names:
            return None
        path = self._resolve(name, name)
        return Config(path, "", _strict_json.read_file(path, name))

    def read(self, name: str, rows: int | None = None) -> np.ndarray:
        """The tensor, or (of NumPy's own dtypes) its first rows, copied out of its file."""
        info = self.tensors[name]
        if info.dtype in _EXTENSION_DTYPES:
            raw = np.fromfile(info.path, np.uint8, info.nbytes, offset=info.offset)
            if raw.size != info.nbytes:
                info.fail(f"{raw.size} of its {info.nbytes} bytes could be read")
            return raw.view(DTYPES[info.dtype]).reshape(info.shape)
        try:
            if info.path not in self._files:
                opened = self._library.safe_open(info.path, framework="numpy")
                self._files[info.path] = self._stack.enter_context(opened)
            file = self._files[info.path]
            return file.get_tensor(name) if rows is None else file.get_slice(name)[:rows]
        except self._library.SafetensorError as error:
            info.fail(f"the safetensors library refuses it: {error}")

    def _resolve(self, name: str, field: str) -> str:
        """The real path of a file of the directory, which must be a regular one and lie in it."""
        path = os.path.join(self.path, name)
        if name != os.path.basename(name) or "\\" in name or "\0" in name or name in ("", ".", ".."):
            raise FormatError(self.path, field, 0, f"the file name {shorten(name)} leaves the directory")
        if name not in self._names:
            raise FormatError(path, field, 0, "there is no such file")
        real = os.path.realpath(path)
        if os.path.dirname(real) != self._real and not self._is_hub_blob(real):
            raise FormatError(path, field, 0, "a symbolic link that leaves the directory")
        try:
            mode = os.stat(real).st_mode
        except OSError as error:
            raise FormatError(path, field, 0, f"can't be opened: {error.strerror}") from None
        if not stat.S_ISREG(mode):
            raise FormatError(path, field, 0, "not a regular file")
        return real

    def _is_hub_blob(self, real: str) -> bool:
        # The Hugging Face cache: <repository>/snapshots/<revision>/<file> links to <repository>/blobs/<hash>.
        snapshots, _ = os.path.split(self._real)
        repository, last = os.path.split(snapshots)
        return last == "snapshots" and os.path.dirname(real) == os.path.join(repository, "blobs")

    def _scan(self) -> dict[str, TensorInfo]:
        index = self._index_name()
        if index is None:
            shards, listed = [self._single_file()], None
        else:
            listed = self._read_index(index)
            shards = sorted(set(listed.values()))
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for name, info in read_header(self._resolve(shard, "safetensors file")).items():
                if name in tensors:
                    info.fail(f"it is also in {tensors[name].path}")
                if listed is not None and listed.get(name, shard) != shard:
                    info.fail(f"the index says that it is in {shorten(listed[name])}")
                tensors[name] = info
        if listed is not None:
            # Another file, such as consolidated.safetensors, may be another copy; one of a numbered series is missing.
            strays = [n for n in self._names if re.search(r"-\d{5}-of-\d{5}\.safetensors$", n) and n not in shards]
            if strays:
                problem = f"it lists no tensor of the file {shorten(strays[0])}"
                raise FormatError(os.path.join(self.path, str(index)), "weight_map", 0, problem)
        for name in listed or ():
            if name not in tensors:
                raise FormatError(
                    os.path.join(self.path, str(index)), "weight_map", 0, f"no file has the tensor {shorten(name)}"
                )
        return tensors

    def _index_name(self) -> str | None:
        found = [name for name in self._names if name.endswith(_INDEX_SUFFIX)]
        if INDEX_NAME in found:
            return INDEX_NAME
        if len(found) > 1:
            self._fail(f"several indexes ({', '.join(map(shorten, found[:4]))}), expected one, or {INDEX_NAME}")
        return None if not found or "model.safetensors" in self._names else found[0]

    def _single_file(self) -> str:
        found = [name for name in self._names if name.endswith(".safetensors")]
        if "model.safetensors" in found:
            return "model.safetensors"
        if len(found) > 1:
            self._fail(f"{len(found)} safetensors files, but neither an index nor model.safetensors")
        if not found:
            pickles = [name for name in self._names if name.endswith(_PICKLES)]
            reason = f"; {shorten(pickles[0])} may be a pickle, which runs code when it is read" if pickles else ""
            self._fail(f"no safetensors file{reason}; convert the checkpoint to safetensors")
        return found[0]

    def _read_index(self, name: str) -> dict[str, str]:
        config = self.config(name)
        assert config is not None
        listed = config.get("weight_map", dict)
        if not listed:
            config.fail("weight_map", "missing or empty")
        for tensor, shard in listed.items():
            if not isinstance(shard, str) or not shard.endswith(".safetensors"):
                what = shorten(shard) if isinstance(shard, str) else f"a {type(shard).__name__}"
                config.fail("weight_map", f"tensor {shorten(tensor)} is in {what}, expected a .safetensors file")
        return listed

    def _fail(self, problem: str) -> NoReturn:
        raise FormatError(self.path, "safetensors file", 0, problem)


def read_header(path: str) -> dict[str, TensorInfo]:
    """Reads and checks the header of one file.

    Raises:
      FormatError: anything that the container's description does not allow.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        nbytes = int.from_bytes(file.read(8), "little")
        if size < 8 or nbytes > size - 8:
            raise FormatError(path, "header size", 0, f"{nbytes} bytes of header in a file of {size} bytes")
        if nbytes > _strict_json.MAX_BYTES:
            raise FormatError(path, "header size", 0, f"{nbytes} bytes, expected at most {_strict_json.MAX_BYTES}")
        raw = file.read(nbytes)
    if len(raw) != nbytes or not raw.startswith(b"{"):
        raise FormatError(path, "header", 8, "expected a JSON object, starting with {")
    header = _strict_json.parse(raw, path, "header", 8)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(path, "header __metadata__", 8, "expected strings by name")
    tensors = [_read_entry(path, name, entry, 8 + nbytes) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    end = 8 + nbytes
    for info in tensors:
        if info.offset != end:
            problem = "overlap those of another tensor" if info.offset < end else f"leave a hole after byte {end}"
            info.fail(f"its data, from byte {info.offset}, {problem}")
        end += info.nbytes
        if end > size:
            raise FormatError(
                path, f"tensor {shorten(info.name)}", 8, f"its data, to byte {end}, leave the file of {size} bytes"
            )
    if end != size:
        raise FormatError(path, "data", end, f"the tensors end there, but the file has {size} bytes")
    return {info.name: info for info in tensors}


def _read_entry(path: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    def fail(problem: str) -> NoReturn:
        raise FormatError(path, f"tensor {shorten(name)}", 8, problem)

    if not name.isprintable():
        fail("its name has characters that can't be printed")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        fail("expected a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        fail(f"dtype {shorten(dtype) if isinstance(dtype, str) else type(dtype).__name__} is not supported")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(v) is int and 0 <= v < 1 << 63 for v in numbers):
            fail(f"{what} must be a list of integers from 0 to 2^63 - 1")
    if len(shape) > 16 or len(offsets) != 2:
        fail("expected at most 16 axes and two data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        fail(f"data_offsets give it {end - begin} bytes, but it is {dtype} of shape {tuple(shape)}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def import_safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "reading and writing GPTQ, AWQ and compressed-tensors checkpoints needs the package safetensors: "
            "pip install 'jax_qgemm[checkpoints]'"
        ) from error
    return safetensors
