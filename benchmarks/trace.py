"""Where a device's time goes, from a trace of jax.profiler: shares by kind of kernel, and the gaps between kernels."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

OURS, PRODUCTS, COPIES, FUSIONS, GRAPHS, OTHER = (
    *("jax_qgemm", "other products", "copies", "XLA fusions"),
    *("CUDA graphs, not broken down", "other"),
)
IDLE = "idle"
_GROUPS = (
    (OURS, re.compile(r"jax_qgemm|^qmatmul")),
    (COPIES, re.compile(r"^mem(cpy|set)|copy|transpose", re.IGNORECASE)),
    (PRODUCTS, re.compile(r"gemm|gemv|cublas|cutlass|xmma|nvjet|\bdot\b|convolution", re.IGNORECASE)),
    (GRAPHS, re.compile(r"^(cuda)?graph", re.IGNORECASE)),
    (FUSIONS, re.compile(r"fusion|wrapped_|triton|reduce|softmax|gather|scatter|slice|sort|broadcast")),
)
# Lines of a GPU's plane that repeat in other words what its streams hold.
_DERIVED = re.compile(r"^(XLA|Framework|Steps|Source|Launch Stats|TensorFlow)")
# Operations of a CPU that contain others.
_CONTAINERS = re.compile(r"^(while|call|conditional)\b")
_MANGLED = re.compile(r"_ZN9jax_qgemm(\d+)")
_DEMANGLED = re.compile(r"jax_qgemm::(?:\w+::)*(\w+)")


@dataclasses.dataclass(frozen=True)
class Event:
    """One kernel or copy on the device."""

    name: str
    start_ns: float
    end_ns: float


def kernel_name(name: str) -> str:
    """A kernel's name without template arguments, parameters and the number that XLA adds."""
    if match := _MANGLED.search(name):
        return f"jax_qgemm::{name[match.end() : match.end() + int(match[1])]}"
    if match := _DEMANGLED.search(name):
        return f"jax_qgemm::{match[1]}"
    return re.sub(r"([._]\d+)+$", "", re.sub(r"^void ", "", name).split("<")[0].split("(")[0])


def group_of(name: str) -> str:
    return next((group for group, pattern in _GROUPS if pattern.search(name)), OTHER)


def device_events(data: Any) -> list[Event]:
    """What ran on a trace's GPUs or, where it has none, the operations that ran on the CPU.

    Args:
      data: a jax.profiler.ProfileData.
    """
    planes = list(data.planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    if gpus:
        lines = [line for plane in gpus for line in plane.lines if not _DERIVED.match(line.name or "")]
        found = [event for line in lines for event in line.events]
    else:
        host = [plane for plane in planes if plane.name == "/host:CPU"]
        events = [event for plane in host for line in plane.lines for event in line.events]
        found = [e for e in events if "hlo_op" in dict(e.stats) and not _CONTAINERS.match(e.name or "")]
    return [Event(e.name or "", e.start_ns, e.end_ns) for e in found]


def summarize(events: Iterable[Event], top: int = 25) -> dict[str, Any]:
    """Shares of the time from the first event to the end of the last.

    Where events overlap, the later one counts from the end of the earlier.

    Returns:
      `span_us`; `groups`, with the share, microseconds and number of events of each and of the gaps, "idle";
      `not_products`, the share of everything but matrix products; `kernels`, the longest of them by name.

    Raises:
      ValueError: no events.
    """
    ordered = sorted(events, key=lambda e: (e.start_ns, e.end_ns))
    if not ordered:
        raise ValueError("the trace holds nothing that ran on a device")
    begin = end = ordered[0].start_ns
    busy: dict[str, float] = collections.defaultdict(float)
    count: collections.Counter[str] = collections.Counter()
    for event in ordered:
        name = kernel_name(event.name)
        busy[name] += max(0.0, event.end_ns - max(event.start_ns, end))
        count[name] += 1
        end = max(end, event.end_ns)
    span = end - begin
    groups: dict[str, dict[str, float]] = {}
    for name in busy:
        group = groups.setdefault(group_of(name), {"us": 0.0, "events": 0})
        group["us"] += busy[name] / 1e3
        group["events"] += count[name]
    groups[IDLE] = {"us": (span - sum(busy.values())) / 1e3, "events": 0}
    for group in groups.values():
        group["share"] = group["us"] * 1e3 / span
    products = sum(groups[name]["share"] for name in (OURS, PRODUCTS) if name in groups)
    return {
        "span_us": span / 1e3,
        "not_products": 1 - products,
        "groups": dict(sorted(groups.items(), key=lambda item: -item[1]["us"])),
        "kernels": [
            {"name": name, "group": group_of(name), "us": ns / 1e3, "events": count[name]}
            for name, ns in sorted(busy.items(), key=lambda item: -item[1])[:top]
        ],
    }


def read_trace(folder: Path) -> list[Event]:
    """Events of the trace that jax.profiler wrote into a folder."""
    files = sorted(folder.glob("**/*.xplane.pb"))
    if not files:
        raise ValueError(f"jax.profiler wrote no trace into {folder}")
    return [event for file in files for event in device_events(ProfileData.from_file(str(file)))]
