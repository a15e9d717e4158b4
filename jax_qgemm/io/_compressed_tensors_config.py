"""What the configuration of a compressed-tensors checkpoint says of its weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_qgemm.io._strict_json import Config
from jax_qgemm.io.errors import shorten

# The formats that can be read, by what they are called in a configuration; mixed-precision leaves it to the groups.
_FORMATS = {
    "pack-quantized": "int",
    "int-quantized": "int",
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
    "mixed-precision": None,
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How weights are quantized.

    Attributes:
      kind: "int", "nvfp4" or "mxfp4".
      bits: of one value.
      symmetric: whether there are no zero points.
      group_size: elements of k that share a scale, -1 for one scale per column.
      unpacked: one value a byte, as int-quantized has them.
    """

    kind: str
    bits: int
    symmetric: bool
    group_size: int
    unpacked: bool = False

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        how = "a byte each" if self.unpacked else "packed"
        return f"{self.bits}-bit {kind} with group size {self.group_size}, {how}"

    def matches(self, weight: Scheme, k: int) -> bool:
        """Whether this one, of a configuration, describes a weight whose only group may be all of k."""
        sizes = (weight.group_size, k) if weight.group_size == -1 else (weight.group_size,)
        return self.group_size in sizes and dataclasses.replace(self, group_size=weight.group_size) == weight

    @property
    def format(self) -> str:
        if self.kind != "int":
            return f"{self.kind}-pack-quantized"
        return "int-quantized" if self.unpacked else "pack-quantized"

    def to_json(self) -> dict[str, Any]:
        strategies = {"nvfp4": "tensor_group", "mxfp4": "group", "int": "channel" if self.group_size == -1 else "group"}
        weights = {
            "num_bits": self.bits,
            "type": "int" if self.kind == "int" else "float",
            "symmetric": self.symmetric,
            "strategy": strategies[self.kind],
            "group_size": None if self.group_size == -1 else self.group_size,
            "dynamic": False,
        }
        if self.kind == "mxfp4":
            weights["scale_dtype"] = "torch.uint8"
        return weights


NVFP4 = Scheme("nvfp4", 4, True, 16)
MXFP4 = Scheme("mxfp4", 4, True, 32)


def read_schemes(config: Config) -> list[Scheme]:
    """The schemes of all config_groups.

    Raises:
      FormatError: a configuration that is none, or of weights that can't be read.
    """
    format = config.get("format", str, "mixed-precision")
    _check_format(config, format)
    for key in ("transform_config", "sparsity_config"):
        extra = config.table(key)
        if extra is None:
            continue
        if key == "transform_config" and extra.values.get("config_groups"):
            config.fail(key, "its transforms would have to be applied to x: not supported")
        if key == "sparsity_config" and extra.get("format", str, "dense") != "dense":
            config.fail(key, f"weights stored as {shorten(extra.values['format'])} are not supported")
    groups = config.table("config_groups")
    if groups is None or not groups.values:
        config.fail("config_groups", "missing or empty")
    schemes = []
    for name in groups.values:
        group = groups.table(name)
        weights = group and group.table("weights")
        if group is None or weights is None:
            continue  # a group for activations alone
        own_format = group.get("format", str, format)
        _check_format(group, own_format)
        schemes.append(_read_scheme(weights, own_format))
    if not schemes:
        config.fail("config_groups", "no group has weights")
    return schemes


def _check_format(config: Config, format: str) -> None:
    if format not in _FORMATS:
        config.fail("format", f"got {shorten(format)}, expected one of {', '.join(_FORMATS)}")


def _read_scheme(weights: Config, format: str) -> Scheme:
    bits = weights.get("num_bits", int, 8)
    kind = weights.get("type", str, "int").lower()
    symmetric = weights.get("symmetric", bool, True)
    group_size = weights.get("group_size", int)
    strategy = weights.get("strategy", str)
    if strategy is None:
        strategy = "group" if group_size is not None and group_size > 0 else "channel"
    strategy = strategy.lower()
    if weights.values.get("dynamic"):
        weights.fail("dynamic", "weights that are quantized as they are used are not supported")
    if kind == "float" and bits == 4 and symmetric:
        scheme = {16: NVFP4, 32: MXFP4}.get(group_size or 0)
        if scheme is None:
            weights.fail("group_size", f"got {group_size} for 4-bit floats, expected 16 (nvfp4) or 32 (mxfp4)")
        return scheme
    if kind != "int":
        weights.fail("type", f"{bits}-bit {shorten(kind)} is not supported, expected 'int', or 4-bit 'float'")
    if bits not in (4, 8):
        weights.fail("num_bits", f"got {bits}, expected 4 or 8")
    if strategy == "group":
        if group_size is None or group_size <= 0:
            weights.fail("group_size", f"got {group_size}, expected a positive integer")
    elif strategy in ("channel", "tensor"):
        group_size = -1
    else:
        weights.fail("strategy", f"got {shorten(strategy)}, expected 'group', 'channel' or 'tensor'")
    unpacked = format == "int-quantized"
    if unpacked and bits != 8:
        weights.fail("num_bits", f"got {bits}, expected 8 in int-quantized")
    return Scheme("int", bits, symmetric, group_size, unpacked)
