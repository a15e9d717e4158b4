"""Writing a directory of safetensors files and JSON."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_qgemm.formats import IntFormat, QTensor
from jax_qgemm.io._gguf_writer import atomic_file
from jax_qgemm.io._safetensors import DTYPES, INDEX_NAME, import_safetensors

MAX_SHARD_BYTES = 5 << 30
Parts = Callable[[QTensor], dict[str, np.ndarray]]
"""Gives a weight's tensors under the last parts of their names."""


class Planned(NamedTuple):
    """Tensors to write together.

    Attributes:
      nbytes: about how many bytes they have.
      load: gives them by name; called when it is their turn.
    """

    nbytes: int
    load: Callable[[], dict[str, np.ndarray]]


def int_weights(
    tensors: Mapping[str, Any], bits: Collection[int], what: str, *, permutation: bool
) -> dict[str, QTensor]:
    """The QTensors, all of which must be integers of one of these widths that a `what` checkpoint can hold."""
    weights = quantized_weights(tensors, what, permutation=permutation)
    for name, w in weights.items():
        if not isinstance(w.format, IntFormat) or w.format.bits not in bits:
            widths = " or ".join(map(str, bits))
            raise ValueError(f"tensors[{name!r}]: got format {w.format}, but {what} holds integers of {widths} bits")
        if w.global_scale is not None:
            raise ValueError(f"tensors[{name!r}]: {what} can't hold its global_scale")
    return weights


def quantized_weights(tensors: Mapping[str, Any], what: str, *, permutation: bool) -> dict[str, QTensor]:
    weights = {name: value for name, value in tensors.items() if isinstance(value, QTensor)}
    if not weights:
        raise ValueError("tensors: there is no QTensor among them")
    for name, w in weights.items():
        if name.rpartition(".")[2] != "weight":
            raise ValueError(f"tensors[{name!r}]: the name of a QTensor must end in 'weight'")
        if w.ndim != 2 or 0 in w.shape:
            raise ValueError(f"tensors[{name!r}]: got shape {w.shape}, expected (k, n), neither of them 0")
        if w.input_scale is not None:
            raise ValueError(f"tensors[{name!r}]: {what} can't hold its input_scale")
        if w.permutation is not None and not permutation:
            raise ValueError(f"tensors[{name!r}]: {what} can't hold its permutation")
    return weights


def one_format(weights: Mapping[str, QTensor], what: str) -> IntFormat:
    """The format of the first; the others must have its width and group size."""
    first, *rest = weights
    format = weights[first].format
    assert isinstance(format, IntFormat)
    for name in rest:
        other: Any = weights[name].format
        if (other.bits, other.group) != (format.bits, format.group):
            raise ValueError(
                f"tensors[{name!r}] is {other}, but tensors[{first!r}] is {format}: a {what} checkpoint has one width "
                "and one group size"
            )
    return format


def plan(tensors: Mapping[str, Any], parts: Mapping[str, Parts]) -> list[Planned]:
    """What `write` takes: `parts` has an entry for every QTensor."""
    planned = []
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors: names must be str, got {name!r}")
        if isinstance(value, QTensor):
            planned.append(Planned(value.nbytes, functools.partial(_load_parts, name, parts[name], value)))
            continue
        if not isinstance(value, (jax.Array, np.ndarray)):
            raise TypeError(f"tensors[{name!r}]: got {type(value).__name__}, expected a QTensor or an array")
        if np.dtype(value.dtype).newbyteorder("<") not in DTYPES.values():
            raise TypeError(f"tensors[{name!r}]: got an array of {value.dtype}, which safetensors can't hold")
        planned.append(Planned(value.nbytes, functools.partial(_load_array, name, value)))
    return planned


def _load_parts(name: str, parts: Parts, w: QTensor) -> dict[str, np.ndarray]:
    prefix = name.removesuffix("weight")
    return {prefix + last: np.ascontiguousarray(value) for last, value in parts(w).items()}


def _load_array(name: str, value: jax.Array | np.ndarray) -> dict[str, np.ndarray]:
    array = np.asarray(value)
    return {name: np.ascontiguousarray(array).reshape(array.shape)}


def write(
    path: str | os.PathLike[str],
    planned: list[Planned],
    files: Mapping[str, Mapping[str, Any]],
    max_shard_bytes: int,
) -> None:
    """Writes the safetensors files, then the JSON ones: a directory without its configuration is not complete.

    Args:
      files: JSON objects by file name.
    """
    import_safetensors()
    from safetensors.numpy import save_file

    texts = {name: _to_json(name, values) for name, values in files.items()}
    shards = _shards(planned, max_shard_bytes)
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    directory = os.fspath(path)
    os.makedirs(directory, exist_ok=True)
    written = {*names} if len(shards) == 1 else {*names, INDEX_NAME}
    others = [f for f in sorted(os.listdir(directory)) if ".safetensors" in f and f not in written]
    if others:
        raise ValueError(f"path: {directory} holds other safetensors files, such as {others[0]!r}")
    weight_map: dict[str, str] = {}
    total = 0
    for name, shard in zip(names, shards, strict=True):
        arrays: dict[str, np.ndarray] = {}
        for entry in shard:
            for key, value in entry.load().items():
                if key in arrays or key in weight_map:
                    raise ValueError(f"tensors: two of them would be written as {key!r}")
                arrays[key] = value
        with _replacing(os.path.join(directory, name)) as temporary:
            save_file(arrays, temporary, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
        total += sum(value.nbytes for value in arrays.values())
    if len(shards) > 1:
        texts[INDEX_NAME] = _to_json(INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, text in texts.items():
        with atomic_file(os.path.join(directory, name)) as file:
            file.write(text)


def _shards(planned: list[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for entry in planned:
        if shards[-1] and size + entry.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _to_json(name: str, values: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise type(error)(f"metadata: {name} can't hold it: {error}") from error


@contextlib.contextmanager
def _replacing(target: str) -> Iterator[str]:
    """A name to write to, whose file then takes the place of `target`."""
    temporary = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        os.chmod(temporary, mode)  # as the umask has it; the library lets only the owner read
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
