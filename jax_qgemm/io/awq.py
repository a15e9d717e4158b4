"""AWQ checkpoints, as AutoAWQ writes them: packed words in, QTensors out.

Layouts (AutoAWQ, awq/modules/linear/gemm.py, gemv.py and awq/utils/packing_utils.py), eight codes to an int32, w =
scale * (code - zero point):
  gemm: qweight (k, n / 8), qzeros (groups, n / 8), scales (groups, n); nibble i of a word is column
    (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight.
  gemv: qweight (n, k / 8), qzeros (n, width), scales (n, 8 * width), nibbles in order; width is groups / 8 rounded up
    to a multiple of 1, 2 or 4 words for groups of 128 and more, 64 or 32.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from jax_qgemm.formats import IntFormat, QTensor
from jax_qgemm.io import _checkpoint, _safetensors_writer
from jax_qgemm.io._checkpoint import FLOATS, Module, Plan
from jax_qgemm.io._repack import int_fields, int_format, int_weight, pack_words, unpack_words
from jax_qgemm.io._safetensors import SafetensorsDirectory, TensorInfo
from jax_qgemm.io._strict_json import Config
from jax_qgemm.io.errors import shorten

CONFIG_NAMES = ("quantize_config.json", "quant_config.json")
GROUP_SIZES = (-1, 32, 64, 128)
_PARTS = frozenset({"qweight", "qzeros", "scales"})
COLUMN_OF_NIBBLE = np.array([0, 2, 4, 6, 1, 3, 5, 7])
NIBBLE_OF_COLUMN = np.argsort(COLUMN_OF_NIBBLE)


def load_awq(
    path: str | os.PathLike[str],
    *,
    tensors: Iterable[str] | Callable[[str], bool] | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, QTensor | jax.Array | np.ndarray], dict[str, Any]]:
    """Loads an AWQ checkpoint, version "gemm" or "gemv", from a directory of safetensors. Nothing is dequantized.

    Every tensor but the packed codes is read and checked before the first weight is built. Where all zero points of a
    weight are 8, its format is symmetric and has none.

    Args:
      path: the directory, with config.json. Its files must not change meanwhile: the safetensors library maps them.
      tensors: which tensors to load: names as in the result, a predicate of the name, or None for all.
      progress: whether to show a progress bar on stderr; None shows it on a terminal, from 256 MiB on.

    Returns:
      (tensors, metadata), as `load_gptq` does: "<module>.weight" is a QTensor of shape (k, n).

    Raises:
      FormatError: the checkpoint is damaged, or of a version, width or group size (other than 32, 64, 128 or -1) that
        is not supported.
      ImportError: the package safetensors is missing.
      TypeError, ValueError: `tensors` is none of the above, or names what is not there.
      OSError: a file can't be opened or read.
    """
    with SafetensorsDirectory(path) as directory:
        metadata, config = read_config(directory)
        settings = Settings(config)
        loaded = _checkpoint.load(directory, find_modules(directory), settings.plan, tensors, progress)
    return loaded, metadata


def read_config(directory: SafetensorsDirectory) -> tuple[dict[str, Any], Config]:
    return _checkpoint.read_config(directory, "awq", others=CONFIG_NAMES, agree=("bits", "group_size", "version"))


def find_modules(directory: SafetensorsDirectory) -> dict[str, Module | TensorInfo]:
    return _checkpoint.find_modules(directory, _PARTS, _main_of)


def _main_of(parts: dict[str, TensorInfo]) -> str | None:
    if "qweight" not in parts and "qzeros" in parts:
        parts["qzeros"].fail("its module has no qweight")
    return "qweight" if "qweight" in parts else None


class Settings:
    """The configuration, checked; `plan` checks a module against it."""

    def __init__(self, config: Config):
        bits = config.first(("bits", "w_bit"), int)
        if bits != 4:
            config.fail("bits", f"got {bits}, expected 4")
        self.group_size = config.first(("group_size", "q_group_size"), int)
        if self.group_size not in GROUP_SIZES:
            config.fail("group_size", f"got {self.group_size}, expected one of {GROUP_SIZES}")
        version = config.first(("version", "checkpoint_format", "format"), str, "gemm").lower()
        if version not in ("gemm", "gemv"):
            config.fail("version", f"got {shorten(version)}, expected 'gemm' or 'gemv'")
        backend = config.get("backend", str, "autoawq")
        if backend != "autoawq":
            config.fail("backend", f"got {shorten(backend)}, whose packing is not supported: expected 'autoawq'")
        if not config.get("zero_point", bool, True):
            config.fail("zero_point", "got false, but the layouts gemm and gemv have zero points")
        self.along_k = version == "gemv"

    def plan(self, module: Module) -> Plan:
        qweight = module.part("qweight", ("I32",), 2)
        module.part("qzeros", ("I32",), 2)
        scales = module.part("scales", FLOATS, 2)
        if self.along_k:
            n, k = qweight.shape[0], 8 * qweight.shape[1]
            group_size = k if self.group_size == -1 else self.group_size
            groups = k // group_size
            width = gemv_width(groups, group_size)
            module.expect_shape("scales", (n, 8 * width), f"{groups} groups, and their padding, of {n} columns")
            module.expect_shape("qzeros", (n, width), f"{groups} groups, and their padding, of {n} columns")
        else:
            k, n = qweight.shape[0], 8 * qweight.shape[1]
            groups = scales.shape[0]
            module.expect_shape("scales", (groups, n), f"qweight has {n} columns")
            module.expect_shape("qzeros", (groups, n // 8), f"scales has {groups} groups of {n} columns")
        format_size = _checkpoint.check_group_size(module, "scales", self.group_size, k, groups)
        values, zero_points = module.read_scales("scales"), module.read("qzeros")
        if self.along_k:
            values = np.ascontiguousarray(values[:, :groups])
            zero_points = unpack_words(zero_points, 4, groups)
        else:
            values = np.ascontiguousarray(values.T)
            zero_points = np.ascontiguousarray(unpack_gemm(zero_points).T)
        symmetric = bool((zero_points == 8).all())
        format = int_format(4, format_size, symmetric, values)
        build = functools.partial(_build, module, self.along_k, format, (k, n), values, zero_points)
        return Plan(format, (k, n), False, build)


def gemv_width(groups: int, group_size: int) -> int:
    """Words of a row of qzeros."""
    multiple = {32: 4, 64: 2}.get(group_size, 1)
    return -(-groups // (8 * multiple)) * multiple


def unpack_gemm(words: np.ndarray) -> np.ndarray:
    """uint8 (rows, n) of int32 (rows, n / 8)."""
    nibbles = unpack_words(words, 4, 8 * words.shape[1]).reshape(*words.shape, 8)
    return nibbles[..., NIBBLE_OF_COLUMN].reshape(len(words), -1)


def _pack_gemm(codes: np.ndarray) -> np.ndarray:
    nibbles = codes.reshape(len(codes), -1, 8)[..., COLUMN_OF_NIBBLE]
    return pack_words(nibbles.reshape(codes.shape), 4)


def _build(
    module: Module,
    along_k: bool,
    format: IntFormat,
    shape: tuple[int, int],
    scales: np.ndarray,
    zero_points: np.ndarray,
) -> QTensor:
    words = module.read("qweight")

    def codes(rows: slice) -> np.ndarray:
        if along_k:
            return unpack_words(words[rows], 4, shape[0])
        return np.ascontiguousarray(unpack_gemm(words[:, rows.start // 8 : rows.stop // 8]).T)

    return int_weight(format, shape, codes, scales, zero_points)


def save_awq(
    path: str | os.PathLike[str],
    tensors: Mapping[str, QTensor | jax.Array | np.ndarray],
    metadata: Mapping[str, Any] | None = None,
    *,
    version: Literal["gemm", "gemv"] | None = None,
    max_shard_bytes: int = _safetensors_writer.MAX_SHARD_BYTES,
) -> None:
    """Writes an AWQ checkpoint: safetensors and config.json.

    Saving what `load_awq` returned gives every tensor back byte for byte, but that "gemv" fills up its scales and zero
    points with zeros.

    Args:
      path: a directory, made if need be, that holds no other safetensors files. Every file appears once complete.
      tensors: QTensors "<module>.weight" of shape (k, n), int4 of one group size (32, 64, 128 or -1), without a
        permutation, n (gemm) or k (gemv) a multiple of 8; and plain arrays.
      metadata: config.json; what "quantization_config" says of bits, group size and so on is replaced.
      version: the layout; None takes that of the metadata, else "gemm".
      max_shard_bytes: where to start another file.

    Raises:
      TypeError, ValueError: a tensor that AWQ can't hold, by name; or a directory with other safetensors files.
      ImportError: the package safetensors is missing.
      OSError: a file can't be written.
    """
    config = dict(metadata or {})
    quantization = dict(config.get("quantization_config") or {})
    if version is None:
        version = str(quantization.get("version", "gemm")).lower()  # type: ignore[assignment]
    if version not in ("gemm", "gemv"):
        raise ValueError(f"version must be 'gemm' or 'gemv', got {version!r}")
    weights = _safetensors_writer.int_weights(tensors, (4,), "AWQ", permutation=False)
    format = _safetensors_writer.one_format(weights, "AWQ")
    if format.group_size not in GROUP_SIZES:
        raise ValueError(f"tensors: got group size {format.group_size}, but AWQ has {GROUP_SIZES}")
    axis, along = (1, "n") if version == "gemm" else (0, "k")
    for name, w in weights.items():
        if w.shape[axis] % 8:
            raise ValueError(f"tensors[{name!r}]: {along} = {w.shape[axis]}, but AWQ's {version} needs a multiple of 8")
    for alias in ("w_bit", "q_group_size", "checkpoint_format", "format"):
        quantization.pop(alias, None)
    quantization |= {
        "quant_method": "awq",
        "bits": 4,
        "group_size": format.group_size,
        "version": version,
        "zero_point": True,
    }
    pack = _gemm_parts if version == "gemm" else _gemv_parts
    plan = _safetensors_writer.plan(tensors, dict.fromkeys(weights, pack))
    files = {"config.json": {**config, "quantization_config": quantization}}
    _safetensors_writer.write(path, plan, files, max_shard_bytes)


def _gemm_parts(w: QTensor) -> dict[str, np.ndarray]:
    k, n = w.shape
    qweight = np.empty((k, n // 8), np.int32)
    scales: list[np.ndarray] = []
    zeros: list[np.ndarray] = []
    for rows, fields in int_fields(w):
        qweight[:, rows.start // 8 : rows.stop // 8] = _pack_gemm(np.ascontiguousarray(fields["codes"].T))
        scales.append(fields["scales"])
        zeros.append(fields["zero_points"])
    qzeros = _pack_gemm(np.ascontiguousarray(np.concatenate(zeros).T))
    return {"qweight": qweight, "qzeros": qzeros, "scales": np.concatenate(scales).T}


def _gemv_parts(w: QTensor) -> dict[str, np.ndarray]:
    k, n = w.shape
    qweight = np.empty((n, k // 8), np.int32)
    padded: list[tuple[np.ndarray, np.ndarray]] = []
    for rows, fields in int_fields(w):
        groups = fields["scales"].shape[1]
        pad = [(0, 0), (0, 8 * gemv_width(groups, k // groups) - groups)]
        qweight[rows] = pack_words(fields["codes"], 4)
        padded.append((np.pad(fields["scales"], pad), pack_words(np.pad(fields["zero_points"], pad), 4)))
    scales, qzeros = (np.concatenate(values) for values in zip(*padded, strict=True))
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}
