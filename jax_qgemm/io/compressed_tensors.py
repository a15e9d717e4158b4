"""compressed-tensors checkpoints, as llm-compressor writes them: packed words in, QTensors out.

Layouts (compressed-tensors, src/compressed_tensors/compressors and quantization/lifecycle/forward.py), of a layer of n
outputs and k inputs:
  pack-quantized: weight_packed int32 (n, k * bits / 32), a stream of bits along k, lowest first, of values plus
    2**(bits - 1); weight_scale (n, groups); weight_zero_point int32 (n * bits / 32, groups), packed alike along n;
    weight_shape (n, k); weight_g_idx int32 (k,), all -1 where it is not used. w = scale * (value - zero point).
  int-quantized: weight int8 (n, k), weight_scale (n, groups), weight_zero_point int8 (n, groups).
  nvfp4-pack-quantized: weight_packed uint8 (n, k / 2), two e2m1 values a byte, the first one low; weight_scale
    float8_e4m3fn (n, k / 16); weight_global_scale float32 (1,). w = value * weight_scale / weight_global_scale.
  mxfp4-pack-quantized: the same with weight_scale uint8 (n, k / 32), w = value * 2**(weight_scale - 127).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jax_qgemm.formats import GGUF_FORMATS, Format, IntFormat, QTensor
from jax_qgemm.io import _checkpoint, _compressed_tensors_config, _compressed_tensors_writer, _safetensors_writer
from jax_qgemm.io._checkpoint import FLOATS, Module, Plan
from jax_qgemm.io._compressed_tensors_config import Scheme
from jax_qgemm.io._repack import int_format, int_weight, pack_weight, unpack_words, words_for
from jax_qgemm.io._safetensors import SafetensorsDirectory, TensorInfo
from jax_qgemm.io._strict_json import Config

_PARTS = frozenset(
    {
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "weight_global_scale",
    }
)


def load_compressed_tensors(
    path: str | os.PathLike[str],
    *,
    tensors: Iterable[str] | Callable[[str], bool] | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, QTensor | jax.Array | np.ndarray], dict[str, Any]]:
    """Loads a compressed-tensors checkpoint from a directory of safetensors. Nothing is dequantized.

    | format | QTensor |
    | --- | --- |
    | pack-quantized, 4 and 8 bits | int4, int8; asymmetric where there is a weight_zero_point |
    | int-quantized, 8 bits | int8 |
    | nvfp4-pack-quantized | nvfp4, with global_scale = 1 / weight_global_scale |
    | mxfp4-pack-quantized | mxfp4 |

    Every tensor but the packed codes is read and checked before the first weight is built. What a layer is follows from
    its tensors; the configuration must have a group that says the same. Names in `targets` and `ignore` are not
    matched. The quantization of activations is left to the caller: it is in the metadata, and scales of activations
    (input_scale, input_global_scale) come as arrays. Rows that are not sorted by group (actorder) are sorted here,
    once, and the QTensor carries the permutation.

    Args:
      path: the directory, with config.json. Its files must not change meanwhile: the safetensors library maps them.
      tensors: which tensors to load: names as in the result, a predicate of the name, or None for all.
      progress: whether to show a progress bar on stderr; None shows it on a terminal, from 256 MiB on.

    Returns:
      (tensors, metadata), as `load_gptq` does: "<module>.weight" is a QTensor of shape (k, n).

    Raises:
      FormatError: the checkpoint is damaged, disagrees with its configuration, or is of a format that is not supported:
        float8 weights, blocks, 2:4 sparsity, transforms (rotations) that would have to be applied to x.
      ImportError: the package safetensors is missing.
      TypeError, ValueError: `tensors` is none of the above, or names what is not there.
      OSError: a file can't be opened or read.
    """
    with SafetensorsDirectory(path) as directory:
        metadata, config = read_config(directory)
        entries = find_modules(directory)
        schemes = _compressed_tensors_config.read_schemes(config)
        if not any(isinstance(entry, Module) for entry in entries.values()):
            config.fail("config_groups", "no tensor of the checkpoint is quantized")
        loaded = _checkpoint.load(directory, entries, functools.partial(plan, schemes), tensors, progress)
    return loaded, metadata


def read_config(directory: SafetensorsDirectory) -> tuple[dict[str, Any], Config]:
    return _checkpoint.read_config(directory, "compressed-tensors")


def find_modules(directory: SafetensorsDirectory) -> dict[str, Module | TensorInfo]:
    return _checkpoint.find_modules(directory, _PARTS, _main_of)


def _main_of(parts: dict[str, TensorInfo]) -> str | None:
    if "weight_packed" in parts:
        if "weight" in parts:
            parts["weight"].fail("its module also has a weight_packed")
        return "weight_packed"
    others = parts.keys() - {"weight"}
    if not others:
        return None
    if "weight" not in parts:
        parts[min(others)].fail("its module has neither weight nor weight_packed")
    if parts["weight"].dtype != "I8":
        parts["weight"].fail(f"got dtype {parts['weight'].dtype} beside {min(others)}, expected I8: not supported")
    return "weight"


def plan(schemes: list[Scheme], module: Module) -> Plan:
    """Checks a module."""
    if module.main == "weight_packed" and module.parts["weight_packed"].dtype == "U8":
        _refuse(module, "weight_zero_point", "weight_shape")
        return _plan_fp4(schemes, module)
    _refuse(module, "weight_global_scale")
    return _plan_int8(schemes, module) if module.main == "weight" else _plan_packed(schemes, module)


def _refuse(module: Module, *parts: str) -> None:
    for part in parts:
        if part in module.parts:
            module.fail(part, f"not expected beside {module.main} of dtype {module.parts[module.main].dtype}")


def _plan_packed(schemes: list[Scheme], module: Module) -> Plan:
    packed = module.part("weight_packed", ("I32",), 2)
    module.part("weight_shape", ("I64", "I32"), 1)
    module.expect_shape("weight_shape", (2,), "n and k")
    n, k = (int(v) for v in module.read("weight_shape"))
    if n != packed.shape[0] or k <= 0:
        module.fail("weight_shape", f"it says n = {n}, k = {k}, but weight_packed has shape {packed.shape}")
    fitting = [bits for bits in (4, 8) if packed.shape[1] == words_for(k, bits)]
    bits = next((s.bits for s in schemes if s.kind == "int" and s.bits in fitting), 0)
    if not bits:
        words = "; ".join(f"{words_for(k, bits)} words for {bits} bits" for bits in (4, 8))
        packed.fail(f"got shape {packed.shape}, expected, with k = {k} and a config group of that width: {words}")
    scales = _read_scales(module, n)
    zero_points = None
    if "weight_zero_point" in module.parts:
        zero_points = _read_zero_points(module, n, scales.shape[1], bits)
    return _plan_int(schemes, module, bits, (k, n), scales, zero_points)


def _plan_int8(schemes: list[Scheme], module: Module) -> Plan:
    n, k = module.part("weight", ("I8",), 2).shape
    scales = _read_scales(module, n)
    zero_points = None
    if "weight_zero_point" in module.parts:
        zero_points = _signed_zero_points(module, scales.shape, 8)
    return _plan_int(schemes, module, 8, (k, n), scales, zero_points)


def _plan_int(
    schemes: list[Scheme],
    module: Module,
    bits: int,
    shape: tuple[int, int],
    scales: np.ndarray,
    zero_points: np.ndarray | None,
) -> Plan:
    (k, n), groups = shape, scales.shape[1]
    symmetric = zero_points is None
    group_size = -1 if groups == 1 else k // groups
    if groups > k or k % groups:
        module.fail("weight_scale", f"it has {groups} groups, which do not divide k = {k}")
    scheme = Scheme("int", bits, symmetric, group_size, module.main == "weight")
    if not any(s.matches(scheme, k) for s in schemes):
        module.fail(module.main, f"it is {scheme}, but no group of config_groups says so")
    format_size = _checkpoint.check_group_size(module, "weight_scale", group_size, k, groups)
    permutation = None
    if "weight_g_idx" in module.parts and not _is_unused(module, k):
        permutation = _checkpoint.act_order(module, "weight_g_idx", k, groups)
    format = int_format(bits, format_size, symmetric, scales)
    if zero_points is None:
        zero_points = np.empty((n, 0), np.uint8)
    build = functools.partial(_build_int, module, format, shape, scales, zero_points, permutation)
    return Plan(format, shape, permutation is not None, build)


def _build_int(
    module: Module,
    format: IntFormat,
    shape: tuple[int, int],
    scales: np.ndarray,
    zeros: np.ndarray,
    order: np.ndarray | None,
) -> QTensor:
    stored = module.read(module.main)

    def codes(rows: slice) -> np.ndarray:
        if module.main == "weight":
            return stored[rows].view(np.uint8) ^ 0x80
        return unpack_words(stored[rows], format.bits, shape[0])

    return int_weight(format, shape, codes, scales, zeros, order)


def _read_scales(module: Module, n: int) -> np.ndarray:
    """Scales (n, groups); one for the whole tensor is one for every column."""
    ndim = len(module.parts["weight_scale"].shape) if "weight_scale" in module.parts else 2
    info = module.part("weight_scale", FLOATS, min(ndim, 2))
    if info.shape not in ((), (1,), (1, 1)) and info.shape[0] != n:
        info.fail(f"got shape {info.shape}, expected one row for each of n = {n} columns")
    scales = module.read_scales("weight_scale")
    scales = scales.reshape(scales.shape[0] if scales.ndim else 1, -1)
    return np.ascontiguousarray(np.broadcast_to(scales, (n, scales.shape[1])))


def _read_zero_points(module: Module, n: int, groups: int, bits: int) -> np.ndarray:
    """uint8 (n, groups), shifted to [0, 2**bits - 1] as the codes are."""
    if module.parts["weight_zero_point"].dtype == "I8":  # not packed: releases up to 0.8
        return _signed_zero_points(module, (n, groups), bits)
    module.part("weight_zero_point", ("I32",), 2)
    module.expect_shape("weight_zero_point", (words_for(n, bits), groups), f"{groups} groups of {n} columns")
    return np.ascontiguousarray(unpack_words(module.read("weight_zero_point").T, bits, n).T)


def _signed_zero_points(module: Module, shape: tuple[int, ...], bits: int) -> np.ndarray:
    info = module.part("weight_zero_point", ("I8",), 2)
    module.expect_shape("weight_zero_point", shape, "one for each of weight_scale")
    zero_points = module.read("weight_zero_point")
    half = 1 << (bits - 1)
    if zero_points.min() < -half or zero_points.max() >= half:
        info.fail(f"its values go from {zero_points.min()} to {zero_points.max()}, expected {-half} to {half - 1}")
    return (zero_points.astype(np.int16) + half).astype(np.uint8)


def _is_unused(module: Module, k: int) -> bool:
    module.part("weight_g_idx", ("I32", "I64"), 1)
    module.expect_shape("weight_g_idx", (k,), f"one group for each of k = {k} rows")
    return bool((module.read("weight_g_idx") == -1).all())


def _plan_fp4(schemes: list[Scheme], module: Module) -> Plan:
    n, half_k = module.part("weight_packed", ("U8",), 2).shape
    k = 2 * half_k
    name, group = ("nvfp4", 16) if "weight_global_scale" in module.parts else ("mxfp4", 32)
    if not any(s.kind == name for s in schemes):
        module.fail("weight_packed", f"it is {name}, but no group of config_groups says so")
    format = GGUF_FORMATS[name]
    if k % format.block:
        module.fail("weight_packed", f"k = {k}, expected a multiple of {format.block} for {name}")
    if "weight_g_idx" in module.parts and not _is_unused(module, k):
        module.fail("weight_g_idx", f"rows that are not sorted by group are not supported in {name}")
    info = module.part("weight_scale", ("F8_E4M3",) if name == "nvfp4" else ("U8", "F8_E8M0"), 2)
    module.expect_shape("weight_scale", (n, k // group), f"one for {group} elements of k = {k}")
    scales = module.read("weight_scale").view(np.uint8)
    global_scale = None
    if name == "nvfp4":
        global_scale = _read_global_scale(module)
        if (scales >= 0x7F).any():
            info.fail("it has values that are negative or NaN")
    elif (scales == 0xFF).any():
        info.fail("it has values that are NaN")
    build = functools.partial(_build_fp4, module, format, (k, n), scales, global_scale)
    return Plan(format, (k, n), False, build)


def _read_global_scale(module: Module) -> float:
    info = module.part("weight_global_scale", ("F32",), len(module.parts["weight_global_scale"].shape))
    if info.nbytes != 4:
        info.fail(f"got shape {info.shape}, expected one value")
    divisor = np.float32(module.read("weight_global_scale").reshape(()))
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.float32(1) / divisor
    if not (0 < divisor < np.inf and 0 < factor < np.inf):
        info.fail(f"got {divisor}, expected a positive number whose reciprocal is finite")
    return float(factor)


def _build_fp4(
    module: Module, format: Format, shape: tuple[int, int], scales: np.ndarray, global_scale: float | None
) -> QTensor:
    packed = module.read("weight_packed")

    def codes(rows: slice) -> np.ndarray:
        return np.stack([packed[rows] & 15, packed[rows] >> 4], axis=-1).reshape(-1, shape[0])

    return pack_weight(format, shape, codes, {"scales": scales}, global_scale=global_scale)


def save_compressed_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, QTensor | jax.Array | np.ndarray],
    metadata: Mapping[str, Any] | None = None,
    *,
    max_shard_bytes: int = _safetensors_writer.MAX_SHARD_BYTES,
) -> None:
    """Writes a compressed-tensors checkpoint: safetensors and config.json.

    int4 becomes pack-quantized; int8 too, unless the metadata's configuration has a group for int-quantized weights of
    its kind; nvfp4 and mxfp4 become nvfp4- and mxfp4-pack-quantized. Where the metadata's configuration already says
    what every QTensor is, it is kept; else config_groups are made anew, with the modules' names as targets.

    Saving what `load_compressed_tensors` returned gives every tensor back byte for byte, with these exceptions, where
    the layout says one thing in several ways: weight_global_scale is the reciprocal of a rounded reciprocal; a
    weight_scale of one value for a whole tensor has one row for every column; weight_g_idx is written only where rows
    are not sorted by group, weight_shape as int64, zero points of pack-quantized weights packed; bits that pad the last
    word are zero.

    Args:
      path: a directory, made if need be, that holds no other safetensors files. Every file appears once complete.
      tensors: QTensors "<module>.weight" of shape (k, n), int4, int8, nvfp4 or mxfp4, and plain arrays.
      metadata: config.json.
      max_shard_bytes: where to start another file.

    Raises:
      TypeError, ValueError: a tensor that compressed-tensors can't hold, by name; or a directory with other safetensors
        files.
      ImportError: the package safetensors is missing.
      OSError: a file can't be written.
    """
    _compressed_tensors_writer.save(path, tensors, metadata, max_shard_bytes)
