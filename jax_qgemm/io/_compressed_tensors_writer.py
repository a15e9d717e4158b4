"""Writing a compressed-tensors checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jax_qgemm.formats import IntFormat, QTensor
from jax_qgemm.io import _compressed_tensors_config, _safetensors_writer
from jax_qgemm.io._compressed_tensors_config import MXFP4, NVFP4, Scheme
from jax_qgemm.io._repack import int_fields, int_format_of, pack_words, unpack_weight, words_for
from jax_qgemm.io._strict_json import Config
from jax_qgemm.io.errors import FormatError


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, Any] | None,
    max_shard_bytes: int,
) -> None:
    config = dict(metadata or {})
    quantization = dict(config.get("quantization_config") or {})
    weights = _safetensors_writer.quantized_weights(tensors, "compressed-tensors", permutation=True)
    configured = _configured_schemes(quantization)
    schemes = {name: _scheme_of(name, w, configured) for name, w in weights.items()}
    if not all(any(s.matches(schemes[name], w.shape[0]) for s in configured) for name, w in weights.items()):
        quantization |= _new_groups(schemes)
    quantization["quant_method"] = "compressed-tensors"
    quantization["quantization_status"] = "compressed"
    plan = _safetensors_writer.plan(tensors, {name: _PARTS[scheme.format] for name, scheme in schemes.items()})
    files = {"config.json": {**config, "quantization_config": quantization}}
    _safetensors_writer.write(path, plan, files, max_shard_bytes)


def _configured_schemes(quantization: dict[str, Any]) -> list[Scheme]:
    """Those that the metadata already have."""
    if "config_groups" not in quantization:
        return []
    try:
        return _compressed_tensors_config.read_schemes(Config("metadata", "quantization_config", quantization))
    except FormatError as error:
        raise ValueError(f"metadata: {error.field}: {error.problem}") from error


def _scheme_of(name: str, w: QTensor, configured: list[Scheme]) -> Scheme:
    format = w.format
    if isinstance(format, IntFormat) and format.bits in (4, 8):
        if w.global_scale is not None:
            raise ValueError(f"tensors[{name!r}]: compressed-tensors can't hold the global_scale of {format}")
        packed = Scheme("int", format.bits, format.symmetric, format.group_size)
        unpacked = Scheme("int", format.bits, format.symmetric, format.group_size, unpacked=True)
        wanted = [s for s in configured if s.matches(unpacked, w.shape[0])]
        return unpacked if wanted else packed
    if format.name == "nvfp4" and w.permutation is None:
        return NVFP4
    if format.name == "mxfp4" and w.permutation is None and w.global_scale is None:
        return MXFP4
    extra = "a permutation" if w.permutation is not None else "a global_scale" if w.global_scale is not None else None
    what = f"{format} with {extra}" if extra and format.name in ("nvfp4", "mxfp4") else str(format)
    raise ValueError(f"tensors[{name!r}]: compressed-tensors can't hold {what}: it has int4, int8, nvfp4 and mxfp4")


def _new_groups(schemes: dict[str, Scheme]) -> dict[str, Any]:
    targets: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        targets.setdefault(scheme, []).append(name.removesuffix("weight").removesuffix("."))
    groups = {
        f"group_{i}": {
            "targets": names,
            "weights": scheme.to_json(),
            "input_activations": None,
            "output_activations": None,
            "format": scheme.format,
        }
        for i, (scheme, names) in enumerate(targets.items())
    }
    formats = {scheme.format for scheme in targets}
    return {"config_groups": groups, "format": formats.pop() if len(formats) == 1 else "mixed-precision", "ignore": []}


def _packed_parts(w: QTensor) -> dict[str, np.ndarray]:
    k, n = w.shape
    format = int_format_of(w)
    packed = np.empty((n, words_for(k, format.bits)), np.int32)
    scales: list[np.ndarray] = []
    zeros: list[np.ndarray] = []
    for rows, fields in int_fields(w):
        packed[rows] = pack_words(fields["codes"], format.bits)
        scales.append(fields["scales"])
        zeros.append(fields["zero_points"])
    parts = {
        "weight_packed": packed,
        "weight_scale": np.concatenate(scales),
        "weight_shape": np.array([n, k], np.int64),
    }
    if not format.symmetric:
        parts["weight_zero_point"] = pack_words(np.ascontiguousarray(np.concatenate(zeros).T), format.bits).T
    return parts | _g_idx(w)


def _int8_parts(w: QTensor) -> dict[str, np.ndarray]:
    k, n = w.shape
    weight = np.empty((n, k), np.int8)
    scales: list[np.ndarray] = []
    zeros: list[np.ndarray] = []
    for rows, fields in int_fields(w):
        weight[rows] = (fields["codes"] ^ 0x80).view(np.int8)
        scales.append(fields["scales"])
        zeros.append(fields["zero_points"])
    parts = {"weight": weight, "weight_scale": np.concatenate(scales)}
    if not int_format_of(w).symmetric:
        parts["weight_zero_point"] = (np.concatenate(zeros) ^ 0x80).view(np.int8)
    return parts | _g_idx(w)


def _g_idx(w: QTensor) -> dict[str, np.ndarray]:
    if w.permutation is None:
        return {}
    k = w.shape[0]
    groups = np.arange(k, dtype=np.int32) // (w.format.group or k)
    return {"weight_g_idx": groups[np.argsort(np.asarray(w.permutation))]}


def _fp4_parts(w: QTensor) -> dict[str, np.ndarray]:
    k, n = w.shape
    packed = np.empty((n, k // 2), np.uint8)
    scales: list[np.ndarray] = []
    for rows, fields in unpack_weight(w):
        codes = fields["codes"]
        packed[rows] = codes[:, ::2] | codes[:, 1::2] << 4
        scales.append(fields["scales"])
    parts = {"weight_packed": packed, "weight_scale": np.concatenate(scales)}
    if w.format.name == "nvfp4":
        parts["weight_scale"] = parts["weight_scale"].view(ml_dtypes.float8_e4m3fn)
        factor = np.float32(1 if w.global_scale is None else np.asarray(w.global_scale))
        parts["weight_global_scale"] = np.array([np.float32(1) / factor], np.float32)
    return parts


_PARTS: dict[str, _safetensors_writer.Parts] = {
    "pack-quantized": _packed_parts,
    "int-quantized": _int8_parts,
    "nvfp4-pack-quantized": _fp4_parts,
    "mxfp4-pack-quantized": _fp4_parts,
}
