"""The doctor: what a checkpoint contains, and which of the known traps are in it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from jax_qgemm.formats import GGUF_FORMATS
from jax_qgemm.io import _compressed_tensors_config, _evidence, awq, compressed_tensors, gptq
from jax_qgemm.io import _gguf_types as types
from jax_qgemm.io._checkpoint import Module, Plan
from jax_qgemm.io._safetensors import DTYPES, SafetensorsDirectory, TensorInfo
from jax_qgemm.io._strict_json import Config
from jax_qgemm.io.errors import FormatError, shorten
from jax_qgemm.io.gguf import read_gguf_header

_FEW = 6  # a layer unlike the others in more tensors is of another kind, not damaged


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that a user of the checkpoint should know.

    Attributes:
      severity: "error": it can't be loaded, or not without saying more; "warning": it may run as garbage; "note".
      where: the tensor, file or key.
      problem: what is wrong, and what to do.
    """

    severity: Literal["error", "warning", "note"]
    where: str
    problem: str


@dataclasses.dataclass(frozen=True)
class TensorSummary:
    """One tensor as a reader would return it.

    Attributes:
      name: its name.
      format: that of its QTensor, or its dtype.
      shape: that of its QTensor, (k, n), or as it is stored.
      nbytes: in the file, scales and zero points included.
      quantized: whether it is a QTensor.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    quantized: bool

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=object))


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """What `inspect` found; `str` of it is a table.

    Attributes:
      path: the checkpoint.
      kind: "gguf", "gptq", "awq" or "compressed-tensors".
      details: version, bits and so on, in words.
      tensors: those that were understood.
      findings: errors first.
    """

    path: str
    kind: str
    details: str
    tensors: tuple[TensorSummary, ...]
    findings: tuple[Finding, ...]

    @property
    def loadable(self) -> bool:
        """Whether there is no error among the findings."""
        return all(f.severity != "error" for f in self.findings)

    def __str__(self) -> str:
        rows = [("format", "tensors", "elements", "bytes", "bits each")]
        of_format: dict[str, list[TensorSummary]] = collections.defaultdict(list)
        for tensor in sorted(self.tensors, key=lambda t: not t.quantized):
            of_format[tensor.format].append(tensor)
        for format, tensors in [*of_format.items(), ("all", list(self.tensors))]:
            size, nbytes = sum(t.size for t in tensors), sum(t.nbytes for t in tensors)
            rows.append((format, f"{len(tensors):,}", f"{size:,}", f"{nbytes:,}", f"{8 * nbytes / max(size, 1):.2f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.path}: {self.kind}, {self.details}", ""]
        for first, *others in rows:
            cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
            lines.append("  ".join(cells))
        lines += [""] + [f"{f.severity}: {f.where}: {f.problem}" for f in self.findings]
        return "\n".join(lines if self.findings else [*lines, "nothing suspicious"])


def inspect(path: str | os.PathLike[str]) -> CheckpointReport:
    """Says what a GGUF file or a GPTQ, AWQ or compressed-tensors directory contains, and which known traps are in it.

    Nothing is loaded: of GGUF files the header alone is read, of the others also all scales, zero points and g_idx, and
    a few rows of at most eight packed weights.

    Found are, beside everything that the readers refuse: zero points of the other GPTQ version, by the evidence of the
    values; zero points of version 1 that wrapped around; AWQ zero points packed in another order than the codes, or
    stored minus one; layers that lack tensors which the others have; act-order, which does not go with splitting k.

    Args:
      path: the file or directory.

    Returns:
      The report; `print` it.

    Raises:
      FormatError: not a checkpoint of these kinds, or its headers are damaged.
      ImportError: a directory, and the package safetensors is missing.
      OSError: a file can't be opened or read.
    """
    name = os.fspath(path)
    if not os.path.isdir(name):
        if name.endswith(".safetensors"):
            raise FormatError(name, "path", 0, "one file of a checkpoint: pass the directory that has its config.json")
        return _inspect_gguf(name)
    with SafetensorsDirectory(name) as directory:
        kind = _kind(directory)
        return {"gptq": _inspect_gptq, "awq": _inspect_awq, "compressed-tensors": _inspect_compressed}[kind](directory)


class _Doctor:
    """Collects findings."""

    def __init__(self) -> None:
        self.tensors: list[TensorSummary] = []
        self.findings: list[Finding] = []

    def add(self, severity: Literal["error", "warning", "note"], where: str, problem: str) -> None:
        self.findings.append(Finding(severity, where, problem))

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Turns a FormatError into a finding."""
        try:
            yield
        except FormatError as error:
            self.add("error", f"{os.path.basename(error.path)}: {error.field}", error.problem)

    def modules(
        self, entries: dict[str, Module | TensorInfo], plan: Callable[[Module], Plan]
    ) -> list[tuple[Module, Plan]]:
        """Plans every module; gives those that could be loaded."""
        good = []
        ordered = 0
        for name, entry in entries.items():
            if isinstance(entry, TensorInfo):
                dtype = DTYPES[entry.dtype].name
                self.tensors.append(TensorSummary(name, dtype, entry.shape, entry.nbytes, False))
                continue
            with self.watch():
                planned = plan(entry)
                nbytes = sum(info.nbytes for info in entry.parts.values())
                self.tensors.append(TensorSummary(name, str(planned.format), planned.shape, nbytes, True))
                good.append((entry, planned))
                ordered += planned.permuted
        if ordered:
            problem = "act-order: rows of k are gathered, so that k can't be split between devices by slicing x"
            self.add("note", f"{ordered} weights", problem)
        return good

    def report(self, path: str, kind: str, details: str) -> CheckpointReport:
        for finding in _uneven_layers([t.name for t in self.tensors]):
            self.add(*finding)
        order = ("error", "warning", "note")
        findings = sorted(self.findings, key=lambda f: order.index(f.severity))
        return CheckpointReport(path, kind, details, tuple(self.tensors), tuple(findings))


def _uneven_layers(names: list[str]) -> Iterator[tuple[Literal["warning", "note"], str, str]]:
    """Layers that lack tensors which nearly all of their siblings have, or have what these lack.

    A layer is the outermost number of a name: experts within one may differ.
    """
    tensors_of: dict[str, dict[str, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
        if number is not None:
            tensors_of[".".join(parts[:number])][parts[number]].add(".".join(parts[number + 1 :]))
    for stem, layers in tensors_of.items():
        counts = collections.Counter(rest for tensors in layers.values() for rest in tensors)
        usual = {rest for rest, count in counts.items() if count * 10 >= len(layers) * 9}
        rare = {rest for rest, count in counts.items() if count * 10 <= len(layers)}
        for layer, tensors in layers.items():
            unlike = [f"no {rest}" for rest in sorted(usual - tensors)]
            unlike += [f"{rest}, which others lack" for rest in sorted(tensors & rare)]
            if len(unlike) > _FEW:
                yield "note", f"{stem}.{layer}", f"unlike the other layers in {len(unlike)} tensors"
            elif unlike:
                yield "warning", f"{stem}.{layer}", f"unlike the other layers: {'; '.join(unlike)}"


def _kind(directory: SafetensorsDirectory) -> str:
    config = directory.config("config.json")
    tables: list[Config | None] = [config and config.table("quantization_config")]
    tables += [directory.config(name) for name in awq.CONFIG_NAMES]
    for table in tables:
        if table:
            default = "awq" if table.values.get("version") in ("GEMM", "GEMV", "gemm", "gemv") else "gptq"
            kind = table.get("quant_method", str, default)
            if kind not in ("gptq", "awq", "compressed-tensors"):
                table.fail("quant_method", f"got {shorten(kind)}, expected gptq, awq or compressed-tensors")
            return kind
    raise FormatError(directory.path, "quantization_config", 0, "there is none: the checkpoint is not quantized")


def _inspect_gguf(path: str) -> CheckpointReport:
    header = read_gguf_header(path)
    doctor = _Doctor()
    for info in header.tensors.values():
        plain = types.TENSOR_TYPE_OF_NAME[info.type].dtype is not None
        quantized = not plain and info.type in GGUF_FORMATS and len(info.shape) > 1
        shape = (*info.shape[:-2], *reversed(info.shape[-2:])) if quantized else info.shape
        doctor.tensors.append(TensorSummary(info.name, info.type, shape, info.nbytes, quantized))
        if not plain and not quantized:
            doctor.add("error", info.name, f"type {info.type} of shape {info.shape} can't be loaded: leave it out")
    architecture = header.metadata.get("general.architecture")
    return doctor.report(path, "gguf", f"version {header.version}, architecture {architecture!r}")


def _inspect_gptq(directory: SafetensorsDirectory) -> CheckpointReport:
    doctor = _Doctor()
    _, config = gptq.read_config(directory)
    settings = gptq.Settings(config, None, None)
    entries = gptq.find_modules(directory)
    good = doctor.modules(entries, settings.plan)
    if settings.ambiguous:
        where = f"{len(settings.ambiguous)} tensors such as {next(iter(settings.ambiguous))}"
        problem = f"{sum(settings.ambiguous.values())} zero points of version 1 wrap around to 0"
        doctor.add("warning", where, f"{problem}: pass wrapped='field' or 'word'")
    by_values = _evidence.version_by_values([_evidence.gptq_offset(*found) for found in _evidence.sample(good)])
    if by_values not in (None, settings.version):
        problem = f"labelled version {settings.version}, but the mean of the weights speaks for version {by_values}"
        doctor.add("warning", "zero points", f"{problem}: pass version={by_values}")
    details = f"version {settings.version}, {settings.bits} bits, group size {settings.group_size}"
    return doctor.report(directory.path, "gptq", details)


def _inspect_awq(directory: SafetensorsDirectory) -> CheckpointReport:
    doctor = _Doctor()
    _, config = awq.read_config(directory)
    settings = awq.Settings(config)
    good = doctor.modules(awq.find_modules(directory), settings.plan)
    if not settings.along_k:
        found = [_evidence.awq_gemm(*found) for found in _evidence.sample(good)]
        if found and sum(disordered for _, disordered in found) * 2 > len(found):
            problem = "packed in another order than the codes: columns have the zero points of their neighbours"
            doctor.add("warning", "zero points", problem)
        elif _evidence.version_by_values([offset for offset, _ in found]) == 1:
            doctor.add("warning", "zero points", "one too small: they look stored minus one, as GPTQ's version 1 does")
    version = "gemv" if settings.along_k else "gemm"
    return doctor.report(directory.path, "awq", f"version {version}, 4 bits, group size {settings.group_size}")


def _inspect_compressed(directory: SafetensorsDirectory) -> CheckpointReport:
    doctor = _Doctor()
    _, config = compressed_tensors.read_config(directory)
    schemes = _compressed_tensors_config.read_schemes(config)
    entries = compressed_tensors.find_modules(directory)
    doctor.modules(entries, functools.partial(compressed_tensors.plan, schemes))
    if not any(isinstance(entry, Module) for entry in entries.values()):
        doctor.add("error", "config_groups", "no tensor of the checkpoint is quantized")
    formats = sorted({scheme.format for scheme in schemes})
    return doctor.report(directory.path, "compressed-tensors", ", ".join(formats))
