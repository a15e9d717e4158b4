"""GPTQ checkpoints, as GPTQModel and AutoGPTQ write them: packed words in, QTensors out.

Layout (AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda.py; GPTQModel, gptqmodel/utils/model.py): qweight is int32
(k * bits / 32, n), the codes of a column one stream of bits along k, lowest first; qzeros int32 (groups, n * bits /
32), packed alike along n; scales (groups, n); g_idx int32 (k,), the group of every row. w = scale * (code - zero).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from jax_qgemm.formats import IntFormat, QTensor
from jax_qgemm.io import _checkpoint, _safetensors_writer
from jax_qgemm.io._checkpoint import FLOATS, Module, Plan
from jax_qgemm.io._repack import (
    INT_BITS,
    int_fields,
    int_format,
    int_format_of,
    int_weight,
    pack_words,
    unpack_words,
    words_for,
)
from jax_qgemm.io._safetensors import SafetensorsDirectory, TensorInfo
from jax_qgemm.io._strict_json import Config
from jax_qgemm.io.errors import shorten

CONFIG_NAME = "quantize_config.json"
_PARTS = frozenset({"qweight", "qzeros", "scales", "g_idx"})
_VERSIONS = {"gptq": 1, "gptq_v2": 2}


def load_gptq(
    path: str | os.PathLike[str],
    *,
    tensors: Iterable[str] | Callable[[str], bool] | None = None,
    version: Literal[1, 2] | None = None,
    wrapped: Literal["field", "word"] | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, QTensor | jax.Array | np.ndarray], dict[str, Any]]:
    """Loads a GPTQ checkpoint of 2, 3, 4 or 8 bits from a directory of safetensors. Nothing is dequantized.

    Every tensor but the packed codes is read and checked before the first weight is built. Rows of k that are not
    sorted by group (act-order) are sorted here, once, and the QTensor carries the permutation. Where all zero points of
    a weight are 2**(bits - 1), its format is symmetric and has none.

    Args:
      path: the directory, with config.json or quantize_config.json. Its files must not change meanwhile: the
        safetensors library maps them.
      tensors: which tensors to load: names as in the result, a predicate of the name, or None for all.
      version: how zero points are stored, 1 (minus one) or 2 (as they are); None asks checkpoint_format, and holds
        against it a configuration that says symmetric while the zero points say the other version.
      wrapped: what a version 1 checkpoint means by a stored zero point of all ones, 0 - 1: "field" wraps it around on
        its own; "word" adds one to all fields of a word in one addition, with carries, which undoes what GPTQModel
        does (3 bits, which it stores field by field, are read so in either case). None takes "word" where the
        configuration names GPTQModel as the writer, else "field" with a UserWarning if that matters.
      progress: whether to show a progress bar on stderr; None shows it on a terminal, from 256 MiB on.

    Returns:
      (tensors, metadata). The weight of a module is "<module>.weight", a QTensor of shape (k, n); every other tensor,
      such as a bias, is an array of its stored dtype, shape and name. metadata is config.json, with the quantization's
      configuration under "quantization_config", wherever it was.

    Raises:
      FormatError: the checkpoint is damaged, or would run as garbage: see docs/checkpoints.md. Or it needs a format
        that jax_qgemm does not have, such as a group size that is neither 16, 32, 64, 128, 256 nor all of k.
      ImportError: the package safetensors is missing.
      TypeError, ValueError: an argument is none of the above, or `tensors` names what is not there.
      OSError: a file can't be opened or read.
    """
    if version not in (None, 1, 2):
        raise ValueError(f"version must be 1, 2 or None, got {version!r}")
    if wrapped not in (None, "field", "word"):
        raise ValueError(f"wrapped must be 'field', 'word' or None, got {wrapped!r}")
    with SafetensorsDirectory(path) as directory:
        metadata, config = read_config(directory)
        settings = Settings(config, version, wrapped)
        entries = find_modules(directory)
        loaded = _checkpoint.load(directory, entries, settings.plan, tensors, progress)
    if settings.ambiguous:
        warnings.warn(
            f"{os.fspath(path)}: {sum(settings.ambiguous.values())} zero points of version 1, such as some of "
            f"{next(iter(settings.ambiguous))}, wrap around to 0. Writers differ in what that does to the next ones, "
            'and it may be a sign of version 2. See "Zero points of GPTQ" in docs/checkpoints.md, then pass '
            "wrapped='field', wrapped='word' or version=2",
            stacklevel=2,
        )
    return loaded, metadata


def read_config(directory: SafetensorsDirectory) -> tuple[dict[str, Any], Config]:
    agree = ("bits", "group_size", "sym", "checkpoint_format")
    return _checkpoint.read_config(directory, "gptq", others=(CONFIG_NAME,), agree=agree)


def find_modules(directory: SafetensorsDirectory) -> dict[str, Module | TensorInfo]:
    return _checkpoint.find_modules(directory, _PARTS, _main_of)


def _main_of(parts: dict[str, TensorInfo]) -> str | None:
    if "qweight" in parts:
        return "qweight"
    for name in ("qzeros", "g_idx"):
        if name in parts:
            parts[name].fail("its module has no qweight")
    return None


class Settings:
    """The configuration, checked; `plan` checks a module against it."""

    def __init__(self, config: Config, version: int | None, wrapped: str | None):
        self.bits = config.first(("bits", "w_bit"), int)
        if self.bits not in INT_BITS:
            config.fail("bits", f"got {self.bits}, expected one of {', '.join(map(str, INT_BITS))}")
        self.group_size = config.first(("group_size", "q_group_size"), int)
        if self.group_size is None or not (self.group_size == -1 or 0 < self.group_size < 1 << 31):
            got = shorten(str(self.group_size))
            config.fail("group_size", f"got {got}, expected -1 or an integer from 1 to 2^31 - 1")
        layout = config.first(("checkpoint_format", "format"), str, "gptq")
        if layout not in _VERSIONS:
            config.fail("checkpoint_format", f"got {shorten(layout)}, expected one of {', '.join(_VERSIONS)}")
        if config.get("is_marlin_format", bool, False):
            config.fail("is_marlin_format", "Marlin's own layout is not supported: export the checkpoint as gptq")
        # GPTQModel's overrides for single modules, by regular expressions; sizes tell as much, and can't hang.
        self.overrides = bool(config.get("dynamic", dict))
        self.symmetric = config.get("sym", bool) if version is None and not self.overrides else None
        self.ordered = config.get("desc_act", bool, False)
        self.version = version or _VERSIONS[layout]
        self.wrapped = wrapped or ("word" if _by_gptqmodel(config) else None)
        self.ambiguous: dict[str, int] = {}  # zero points that wrap around, by the name of their tensor

    def plan(self, module: Module) -> Plan:
        qweight = module.part("qweight", ("I32",), 2)
        scales = module.part("scales", FLOATS, 2)
        qzeros = module.part("qzeros", ("I32",), 2)
        (rows, n), groups = qweight.shape, scales.shape[0]
        module.expect_shape("scales", (groups, n), f"qweight has {n} columns")
        bits = self._bits(qzeros, n)
        module.expect_shape("qzeros", (groups, words_for(n, bits)), f"{groups} groups of {n} fields of {bits} bits")
        k, group_size = self._k(module, rows, groups, bits)
        format_size = _checkpoint.check_group_size(module, "scales", group_size, k, groups)
        permutation = None
        if "g_idx" in module.parts:
            permutation = _checkpoint.act_order(module, "g_idx", k, groups)
        elif self.ordered:
            module.fail("qweight", "its module has no g_idx, but the configuration says desc_act")
        zero_points = self._zero_points(module, bits, n)
        values = module.read_scales("scales")
        symmetric = bool((zero_points == 1 << (bits - 1)).all())
        format = int_format(bits, format_size, symmetric, values)
        scale_rows, zero_rows = (np.ascontiguousarray(a.T) for a in (values, zero_points))
        build = functools.partial(_build, module, format, (k, n), scale_rows, zero_rows, permutation)
        return Plan(format, (k, n), permutation is not None, build)

    def _bits(self, qzeros: TensorInfo, n: int) -> int:
        if not self.overrides:
            return self.bits
        for bits in (self.bits, *INT_BITS):
            if qzeros.shape[1] == words_for(n, bits):
                return bits
        qzeros.fail(f"got shape {qzeros.shape}, expected zero points of 2, 3, 4 or 8 bits for {n} columns")

    def _k(self, module: Module, rows: int, groups: int, bits: int) -> tuple[int, int]:
        """k, which the words of qweight may round up, and the group size."""
        group_size = self.group_size
        if "g_idx" in module.parts:
            (k,) = module.part("g_idx", ("I32", "I64"), 1).shape
        else:
            k = rows * 32 // bits if group_size == -1 else groups * group_size
        expected = words_for(k, bits)
        if rows != expected:
            module.fail("qweight", f"it has {rows} rows of words, expected {expected} for k = {k} of {bits} bits")
        if self.overrides and k % groups == 0:
            group_size = -1 if groups == 1 else k // groups
        return k, group_size

    def _zero_points(self, module: Module, bits: int, n: int) -> np.ndarray:
        """uint8 (groups, n)."""
        words = module.read("qzeros")
        half, top = 1 << (bits - 1), (1 << bits) - 1
        stored = unpack_words(words, bits, n)
        if self.symmetric and not (stored == half - (self.version == 1)).all():
            other = 3 - self.version
            advice = "; pass version=1 or version=2 to take them as they are"
            if (stored == half - (other == 1)).all():
                advice = f". Read as version {other} they are: pass version={other}"
            problem = f"its zero points, of version {self.version}, are not all {half}"
            module.fail("qzeros", f"the configuration says symmetric, but {problem}{advice}")
        if self.version == 2:
            return stored
        wraps = int(np.count_nonzero(stored == top))
        wrapped = "field" if bits == 3 and self.wrapped == "word" else self.wrapped
        if wraps and wrapped is None:
            self.ambiguous[module.parts["qzeros"].name] = wraps
        if wraps and wrapped == "word":
            ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
            return unpack_words((words.view(np.uint32) + ones).view(np.int32), bits, n)
        return (stored + 1).astype(np.uint8) & top


def _by_gptqmodel(config: Config) -> bool:
    meta = config.table("meta")
    quantizer = meta.values.get("quantizer") if meta else None
    names = quantizer if isinstance(quantizer, list) else [quantizer]
    return any(isinstance(name, str) and name.lower().startswith("gptqmodel") for name in names)


def _build(
    module: Module,
    format: IntFormat,
    shape: tuple[int, int],
    scales: np.ndarray,
    zero_points: np.ndarray,
    permutation: np.ndarray | None,
) -> QTensor:
    words = module.read("qweight")

    def codes(rows: slice) -> np.ndarray:
        return unpack_words(words[:, rows].T, format.bits, shape[0])

    return int_weight(format, shape, codes, scales, zero_points, permutation)


def save_gptq(
    path: str | os.PathLike[str],
    tensors: Mapping[str, QTensor | jax.Array | np.ndarray],
    metadata: Mapping[str, Any] | None = None,
    *,
    version: Literal[1, 2] | None = None,
    max_shard_bytes: int = _safetensors_writer.MAX_SHARD_BYTES,
) -> None:
    """Writes a GPTQ checkpoint: safetensors, config.json and quantize_config.json.

    Saving what `load_gptq` returned gives every tensor back byte for byte, with these exceptions, where the layout says
    one thing in several ways: a g_idx is always written; version 1 can't hold a zero point of 0 without wrapping
    around, so that such weights are refused (pass version=2); bits that pad the last word are zero.

    Args:
      path: a directory, made if need be, that holds no other safetensors files. Every file appears once complete.
      tensors: QTensors "<module>.weight" of shape (k, n), integers of one width and group size, and plain arrays.
        Most other readers want k and n to be multiples of 32.
      metadata: config.json; what "quantization_config" says of bits, group size and so on is replaced.
      version: of the zero points; None takes that of the metadata, else 2 where a zero point is stored, else 1.
      max_shard_bytes: where to start another file.

    Raises:
      TypeError, ValueError: a tensor that GPTQ can't hold, by name; or a directory with other safetensors files.
      ImportError: the package safetensors is missing.
      OSError: a file can't be written.
    """
    if version not in (None, 1, 2):
        raise ValueError(f"version must be 1, 2 or None, got {version!r}")
    config = dict(metadata or {})
    quantization = dict(config.get("quantization_config") or {})
    weights = _safetensors_writer.int_weights(tensors, INT_BITS, "GPTQ", permutation=True)
    format = _safetensors_writer.one_format(weights, "GPTQ")
    symmetric = all(int_format_of(w).symmetric for w in weights.values())
    if version is None:
        default = "gptq" if symmetric else "gptq_v2"
        version = 1 if quantization.get("checkpoint_format", default) == "gptq" else 2
    quantization |= {
        "quant_method": "gptq",
        "bits": format.bits,
        "group_size": format.group_size,
        "sym": symmetric and quantization.get("sym") is not False,
        "desc_act": quantization.get("desc_act") is True or any(w.permutation is not None for w in weights.values()),
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    quantization.pop("format", None)
    plan = _safetensors_writer.plan(tensors, {name: functools.partial(_parts, name, version) for name in weights})
    files = {"config.json": {**config, "quantization_config": quantization}, CONFIG_NAME: quantization}
    _safetensors_writer.write(path, plan, files, max_shard_bytes)


def _parts(key: str, version: int, w: QTensor) -> dict[str, np.ndarray]:
    (k, n), format = w.shape, int_format_of(w)
    bits, group_size = format.bits, format.group or k
    qweight = np.empty((words_for(k, bits), n), np.int32)
    scales: list[np.ndarray] = []
    zeros: list[np.ndarray] = []
    for rows, fields in int_fields(w):
        qweight[:, rows] = pack_words(fields["codes"], bits).T
        scales.append(fields["scales"])
        zeros.append(fields["zero_points"])
    zero_points = np.concatenate(zeros)
    if version == 1 and not zero_points.all():
        raise ValueError(f"tensors[{key!r}]: version 1 of GPTQ can't hold its zero points of 0: pass version=2")
    g_idx = np.arange(k, dtype=np.int32) // group_size
    if w.permutation is not None:
        g_idx = g_idx[np.argsort(np.asarray(w.permutation))]
    return {
        "qweight": qweight,
        "qzeros": pack_words(np.ascontiguousarray((zero_points - np.uint8(version == 1)).T), bits),
        "scales": np.ascontiguousarray(np.concatenate(scales).T),
        "g_idx": g_idx.astype(np.int32),
    }
