"""What the benchmarks share: formats by name, random weights, where a figure was measured, result files."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_qgemm as qg
from jax_qgemm.formats import Format, GGUFFormat, GroupPlane, IntFormat, get_format
from jax_qgemm.ops.integer_primitive import X_FORMATS

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
_INT_FAMILY = {"int2": qg.int2, "int3": qg.int3, "int4": qg.int4, "int8": qg.int8}


def parse_format(text: str) -> Format:
    """A format as the benchmarks' command lines write it.

    "q4_0"; "int4", in groups of 128; "int4:32", in groups of 32; "int8:-1", per channel; "int4:128:asymmetric".
    """
    name, *options = text.split(":")
    if not options:
        return get_format(name)
    if name not in _INT_FAMILY or options[1:] not in ([], ["asymmetric"]) or not re.fullmatch(r"-?\d+", options[0]):
        raise ValueError(f"expected a format such as q4_0, int4, int4:32, int8:-1 or int4:128:asymmetric, got {text!r}")
    return _INT_FAMILY[name](int(options[0]), symmetric=len(options) == 1)


def remarks(row: dict[str, Any]) -> str:
    """What a printed measurement has to say besides its time."""
    # What we measure is one custom call; anything else in the graph is timed with it.
    extra = {op: count for op, count in row.get("ops", {}).items() if op != "custom-call"}
    text = f"  also in the graph: {extra}" if extra and not row["kind"].startswith("xla_") else ""
    return text + ("  HOST-BOUND" if row.get("host_bound") else "")


def parse_kind(text: str) -> tuple[Format, Callable[[Any, Any], Any]]:
    """A format and the product with weights of it: "int4", or "int4/fp8" for quantized x."""
    name, slash, x_format = text.partition("/")
    if slash and x_format not in X_FORMATS:
        raise ValueError(f"expected one of {', '.join(X_FORMATS)} behind the slash, got {text!r}")
    return parse_format(name), functools.partial(qg.matmul, x_format=x_format) if slash else qg.matmul


def parse_shapes(text: str, named: dict[str, str]) -> list[tuple[int, int]]:
    """(n, k) of "4096x4096,28672x4096", or of the list that a name stands for."""
    text = named.get(text, text)
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", text):
        raise ValueError(f"expected shapes such as 4096x4096,28672x4096 or one of {', '.join(named)}, got {text!r}")
    return [(int(n), int(k)) for n, k in (shape.split("x") for shape in text.split(","))]


@functools.partial(jax.jit, static_argnames=("format", "k", "n"))
def random_weight(format: Format, k: int, n: int, seed: int) -> qg.QTensor:
    """A weight of random codes with scales near 2^-6, made on the device: what a kernel reads, without the cost of
    quantizing."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(format.planes))
    planes = []
    for key, plane in zip(keys, format.planes, strict=True):
        bits = jax.random.bits(key, format.plane_shape(plane, n, k), format.plane_dtype(plane))
        if isinstance(plane, GroupPlane) and plane.name in ("scales", "minimums"):
            bits = _moderate(format, plane, bits)
        elif plane.name == "zero_points":
            bits = bits & ((1 << format.code_bits) - 1)
        planes.append(bits)
    return qg.QTensor(tuple(planes), format, (-k % format.k_block, -n % 16))


def _moderate(format: Format, plane: GroupPlane, bits: jax.Array) -> jax.Array:
    if plane.dtype == "uint8":  # e8m0, ue4m3
        return bits % 8 + (120 if plane.group == 32 else 40)
    dtype = format.scale_dtype if isinstance(format, IntFormat) else "float16"
    values = (bits % 256).astype(jnp.float32) / 256 * 2.0**-6 + 2.0**-7
    return lax.bitcast_convert_type(values.astype(dtype), bits.dtype)


def random_x(m: int, k: int, dtype: Any, seed: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((m, k), np.float32)).astype(dtype)


def bits_per_weight(format: Format) -> float:
    """Bits of one weight as stored in a checkpoint: the floor counts these bytes, not the kernel layout's."""
    if isinstance(format, GGUFFormat):
        return 8 * format.block_bytes / format.block
    return plane_bits(format)


def plane_bits(format: Format) -> float:
    """Bits of one weight in the kernel layout, without padding and values per channel."""
    groups = [p for p in format.planes if isinstance(p, GroupPlane) and p.group]
    return format.code_bits + sum(8 * np.dtype(p.dtype).itemsize / p.group for p in groups)


def tree_bytes(tree: Any) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tree))


def commit() -> str:
    """The commit of this tree, "-dirty" where its sources were changed; JAX_QGEMM_COMMIT where it has no history."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()

    head = git("rev-parse", "HEAD")
    if not head:
        return os.environ.get("JAX_QGEMM_COMMIT", "unknown")
    return head + ("-dirty" if git("status", "--porcelain", "--", "cuda", "jax_qgemm") else "")


def environment() -> dict[str, Any]:
    """What a result file says of where it was measured."""
    return {
        "commit": commit(),
        "device": device_name(),
        "platform_version": getattr(jax.devices()[0].client, "platform_version", ""),
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


def results_path(name: str) -> Path:
    """benchmarks/results/<device>-<name>.json"""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "_")
    return RESULTS / f"{kind}-{name}.json"


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Writes the results and where they were measured to `results_path(name)`."""
    path = results_path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")
    return path
