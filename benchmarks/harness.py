"""Timing on the GPU: many products inside one jitted function, over more distinct weights than the L2 cache holds."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_qgemm as qg
from jax_qgemm.formats import Format, GGUFFormat, GroupPlane, IntFormat

ROTATED_BYTES = 256 << 20
RESULTS = Path(__file__).parent / "results"


def random_weight(format: Format, k: int, n: int, seed: int) -> qg.QTensor:
    """A weight of random codes with scales near 2^-6: what a kernel reads, without the cost of quantizing."""
    rng = np.random.default_rng(seed)
    planes = []
    for plane in format.planes:
        shape, dtype = format.plane_shape(plane, n, k), format.plane_dtype(plane)
        bits = rng.integers(0, 1 << (8 * dtype.itemsize), size=shape, dtype=np.uint64).astype(dtype)
        if isinstance(plane, GroupPlane) and plane.name in ("scales", "minimums"):
            bits = _moderate(format, plane, bits)
        elif plane.name == "zero_points":
            bits = bits & ((1 << format.code_bits) - 1)
        planes.append(jnp.asarray(bits))
    block = format.k_block
    return qg.QTensor(tuple(planes), format, (-k % block, -n % 16))


def _moderate(format: Format, plane: GroupPlane, bits: np.ndarray) -> np.ndarray:
    if plane.dtype == "uint8":  # e8m0, ue4m3
        return (bits % 8 + (120 if plane.group == 32 else 40)).astype(bits.dtype)
    dtype = format.scale_dtype if isinstance(format, IntFormat) else "float16"
    values = (bits % 256).astype(np.float32) / 256 * 2.0**-6 + 2.0**-7
    return np.asarray(jnp.asarray(values).astype(dtype)).view(bits.dtype)


def bits_per_weight(format: Format) -> float:
    """Bits of one weight as stored in a checkpoint: the floor counts these bytes, not the kernel layout's."""
    if isinstance(format, GGUFFormat):
        return 8 * format.block_bytes / format.block
    return plane_bits(format)


def plane_bits(format: Format) -> float:
    """Bits of one weight in the kernel layout, without padding and values per channel."""
    groups = [p for p in format.planes if isinstance(p, GroupPlane) and p.group]
    return format.code_bits + sum(8 * np.dtype(p.dtype).itemsize / p.group for p in groups)


def rotate(make: Callable[[int], Any]) -> list[Any]:
    """As many distinct weights as exceed ROTATED_BYTES, at least eight."""
    first = make(0)
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(first))
    return [first, *(make(i) for i in range(1, max(8, -(-ROTATED_BYTES // size))))]


def time_products(product: Callable[[Any, Any], Any], x: Any, weights: Sequence[Any], repeats: int = 9) -> float:
    """Median seconds of one product, of all weights in turn inside one jitted function."""
    calls = max(1, 48 // len(weights))

    @jax.jit
    def run(x, weights):
        # Distinct x for each pass over the weights, or equal products would be computed once.
        return [product(x * (1 + i), w) for i in range(calls) for w in weights]

    jax.block_until_ready(run(x, weights))
    start = time.perf_counter()
    jax.block_until_ready(run(x, weights))
    # Several runs in flight hide the host's part; slow ones (on a CPU) need no such thing.
    in_flight = max(1, min(8, int(0.1 / (time.perf_counter() - start))))
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(in_flight):
            out = run(x, weights)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / (in_flight * calls * len(weights)))
    return statistics.median(samples)


def read_bandwidth() -> float:
    """Bytes per second of a reduction over 2 GiB, the read bandwidth that this run can be held to."""
    data = jnp.ones((1 << 29,), jnp.float32)
    total = jax.jit(jnp.sum)
    jax.block_until_ready(total(data))
    samples = []
    for _ in range(9):
        start = time.perf_counter()
        out = [total(data) for _ in range(8)]
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / 8)
    return data.nbytes / statistics.median(samples)


def environment() -> dict[str, Any]:
    """What a result file says of where it was measured."""
    device = jax.devices()[0]

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False
        )
        return done.stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD")
        + ("-dirty" if git("status", "--porcelain", "--", "cuda", "jax_qgemm") else ""),
        "device": device_name(),
        "platform_version": getattr(device.client, "platform_version", ""),
        "jax": jax.__version__,
        "jax_qgemm": qg.build_info().version,
        "cuda": qg.build_info().cuda_version,
    }


def device_name() -> str:
    """The GPU's name, or the CPU's with its number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return f"{models[0] if models else 'CPU'}, {os.cpu_count()} cores"


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Writes benchmarks/results/<device>-<name>.json."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "_")
    path = RESULTS / f"{kind}-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")
    return path
