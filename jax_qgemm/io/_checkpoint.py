"""What GPTQ, AWQ and compressed-tensors directories have in common: modules of several tensors, and a configuration."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from jax_qgemm.formats import Format, QTensor
from jax_qgemm.formats.integer import GROUP_SIZES
from jax_qgemm.io._safetensors import SafetensorsDirectory, TensorInfo
from jax_qgemm.io._selection import progress_bar, select, to_array
from jax_qgemm.io._strict_json import Config
from jax_qgemm.io.errors import FormatError, shorten

Loaded = dict[str, "QTensor | jax.Array | np.ndarray"]
FLOATS = ("F16", "BF16", "F32")


class Plan(NamedTuple):
    """A weight whose small tensors were all checked.

    Attributes:
      format: what it will be.
      shape: (k, n).
      permuted: whether its rows are not sorted by group.
      build: reads its codes and makes it; only here do bytes reach a device.
    """

    format: Format
    shape: tuple[int, int]
    permuted: bool
    build: Callable[[], QTensor]


@dataclasses.dataclass(frozen=True)
class Module:
    """The tensors of one quantized layer.

    Attributes:
      directory: where they are.
      main: the name of the one that holds the codes, such as "qweight".
      parts: all of them, by the last part of their names.
    """

    directory: SafetensorsDirectory
    main: str
    parts: dict[str, TensorInfo]

    def fail(self, part: str, problem: str) -> NoReturn:
        self.parts.get(part, self.parts[self.main]).fail(problem)

    def part(self, name: str, dtypes: tuple[str, ...], ndim: int) -> TensorInfo:
        """The description of a tensor that must be there, of one of these dtypes and so many axes."""
        if name not in self.parts:
            self.fail(self.main, f"its module has no {name}")
        info = self.parts[name]
        if info.dtype not in dtypes:
            info.fail(f"got dtype {info.dtype}, expected {' or '.join(dtypes)}")
        if len(info.shape) != ndim or 0 in info.shape:
            info.fail(f"got shape {info.shape}, expected {ndim} axes, none of size 0")
        return info

    def expect_shape(self, name: str, shape: tuple[int, ...], why: str) -> None:
        if self.parts[name].shape != shape:
            self.fail(name, f"got shape {self.parts[name].shape}, expected {shape}: {why}")

    def read(self, name: str, rows: int | None = None) -> np.ndarray:
        """The tensor, or its first rows."""
        return self.directory.read(self.parts[name].name, rows)

    def read_scales(self, name: str) -> np.ndarray:
        scales = self.read(name)
        bad = int(np.count_nonzero(~np.isfinite(scales.astype(np.float32))))
        if bad:
            self.fail(name, f"{bad} of its {scales.size} values are NaN or infinite")
        return scales


def check_group_size(module: Module, part: str, group_size: int, k: int, groups: int) -> int:
    """The group size of the weight's format, -1 for one scale per column; `groups` is what `part` has of them."""
    if group_size != -1 and (group_size <= 0 or k % group_size):
        module.fail(part, f"group size {group_size} does not divide k = {k}")
    expected = 1 if group_size == -1 else k // group_size
    if groups != expected:
        module.fail(part, f"it has {groups} groups, expected {expected} of group size {group_size} in k = {k}")
    if group_size in GROUP_SIZES:
        return group_size
    if groups != 1:
        module.fail(part, f"group size {group_size}, expected one of {GROUP_SIZES} or one group per column")
    return -1


def act_order(module: Module, part: str, k: int, groups: int) -> np.ndarray | None:
    """The permutation that sorts the rows of k by group, None where they are sorted: see `QTensor`."""
    info = module.part(part, ("I32", "I64"), 1)
    module.expect_shape(part, (k,), f"one group for each of k = {k} rows")
    g_idx = module.read(part)
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        info.fail(f"its groups are {low} to {high}, expected 0 to {groups - 1}")
    counts = np.bincount(g_idx, minlength=groups)
    if (counts != k // groups).any():
        group = int(np.argmax(counts != k // groups))
        info.fail(f"group {group} has {counts[group]} rows, expected {k // groups} in every group")
    if (np.diff(g_idx) >= 0).all():
        return None
    return np.argsort(g_idx, kind="stable").astype(np.int32)


def read_config(
    directory: SafetensorsDirectory, method: str, *, others: tuple[str, ...] = (), agree: tuple[str, ...] = ()
) -> tuple[dict[str, Any], Config]:
    """config.json as it is, and the quantization's configuration, from there and from files of its own.

    Args:
      method: what quant_method must say, where it says anything.
      others: names of files whose whole content is a quantization's configuration.
      agree: keys that must have one value everywhere.
    """
    config = directory.config("config.json")
    found = [table for table in [config and config.table("quantization_config")] if table]
    found += [table for name in others if (table := directory.config(name))]
    if not found:
        places = " or ".join(["quantization_config in config.json", *others])
        raise FormatError(directory.path, "quantization_config", 0, f"there is no {places}")
    merged: dict[str, Any] = {}
    for table in found:
        for key, value in table.values.items():
            if merged.setdefault(key, value) != value and key in agree:
                table.fail(key, f"it differs from that of {found[0].path}")
    quantization = Config(found[0].path, found[0].name, merged)
    got = quantization.get("quant_method", str, method)
    if got != method:
        quantization.fail("quant_method", f"got {shorten(got)}, expected {method!r}")
    return {**(config.values if config else {}), "quantization_config": merged}, quantization


def find_modules(
    directory: SafetensorsDirectory,
    part_names: frozenset[str],
    main_of: Callable[[dict[str, TensorInfo]], str | None],
) -> dict[str, Module | TensorInfo]:
    """Modules under "<module>.weight", and the tensors that belong to none under their own names.

    Args:
      part_names: last parts of the names of a module's tensors.
      main_of: the one that holds the codes, or None where the module is not quantized.
    """
    parts_of: dict[str, dict[str, TensorInfo]] = {}
    for name, info in directory.tensors.items():
        prefix, _, last = name.rpartition(".")
        if last in part_names:
            parts_of.setdefault(prefix, {})[last] = info
    mains = {prefix: main_of(parts) for prefix, parts in parts_of.items()}
    entries: dict[str, Module | TensorInfo] = {}
    for name, info in directory.tensors.items():
        prefix, dot, last = name.rpartition(".")
        main = mains[prefix] if last in part_names else None
        if main is not None and last != main:
            continue
        key = name if main is None else f"{prefix}{dot}weight"
        if key in entries:
            info.fail(f"there are two tensors for {shorten(key)}")
        entries[key] = info if main is None else Module(directory, main, parts_of[prefix])
    return entries


def load(
    directory: SafetensorsDirectory,
    entries: dict[str, Module | TensorInfo],
    plan: Callable[[Module], Plan],
    tensors: Iterable[str] | Callable[[str], bool] | None,
    progress: bool | None,
) -> Loaded:
    selected = {name: entries[name] for name in select(entries, tensors)}
    plans = {name: plan(entry) for name, entry in selected.items() if isinstance(entry, Module)}
    sizes = {
        name: sum(info.nbytes for info in (entry.parts.values() if isinstance(entry, Module) else (entry,)))
        for name, entry in selected.items()
    }
    loaded: Loaded = {}
    with progress_bar(os.path.basename(os.path.normpath(directory.path)), sum(sizes.values()), progress) as advance:
        for name, entry in selected.items():
            loaded[name] = to_array(directory.read(name)) if isinstance(entry, TensorInfo) else plans[name].build()
            if advance is not None:
                advance(sizes[name])
    return loaded
