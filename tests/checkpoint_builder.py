"""Checkpoint directories put together element by element, from the published layouts alone, and what they mean."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import jax_qgemm as qg
from jax_qgemm.testing import check_product, product_limit

DTYPES = ("float16", "bfloat16", "float32")
N = 37
Tensors = dict[str, np.ndarray]


def write_directory(
    path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any], name: str = "model.safetensors"
) -> Path:
    path.mkdir(exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path / name)
    (path / "config.json").write_text(json.dumps({"model_type": "test", "quantization_config": config}))
    return path


def pack_stream(values: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """int32 words: element i of `axis` takes bits [i * bits, (i + 1) * bits), a loop over every bit."""
    values = np.moveaxis(values, axis, -1)
    rows = values.reshape(-1, values.shape[-1])
    words = np.zeros((len(rows), -(-rows.shape[1] * bits // 32)), np.uint32)
    for r, row in enumerate(rows.tolist()):
        stream = 0
        for i, value in enumerate(row):
            assert 0 <= value < 1 << bits
            stream |= value << (bits * i)
        for w in range(words.shape[1]):
            words[r, w] = stream >> (32 * w) & 0xFFFFFFFF
    words = words.reshape(*values.shape[:-1], -1)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


@dataclasses.dataclass
class Weight:
    """w[i, j] = scales[g_idx[i], j] * (codes[i, j] - zero_points[g_idx[i], j]), everything unsigned.

    Attributes:
      codes: (k, n).
      zero_points: (groups, n).
      scales: (groups, n), float16, bfloat16 or float32.
      g_idx: (k,).
    """

    bits: int
    codes: np.ndarray
    zero_points: np.ndarray
    scales: np.ndarray
    g_idx: np.ndarray

    def dense(self) -> np.ndarray:
        """float64 (k, n)."""
        out = np.empty(self.codes.shape)
        scales = self.scales.astype(np.float64)
        for i, j in np.ndindex(*out.shape):
            group = self.g_idx[i]
            out[i, j] = scales[group, j] * (int(self.codes[i, j]) - int(self.zero_points[group, j]))
        return out


def random_weight(
    bits: int,
    k: int,
    n: int,
    group_size: int,
    *,
    symmetric: bool,
    act_order: bool = False,
    dtype: str = "float16",
    seed: int = 0,
    low_zero: int = 0,
) -> Weight:
    rng = np.random.default_rng([seed, bits, k, n, group_size + 1, symmetric, act_order])
    size = k if group_size == -1 else group_size
    groups, top = k // size, (1 << bits) - 1
    zero_points = rng.integers(low_zero, top + 1, (groups, n))
    zero_points[0, :2] = low_zero, top
    if symmetric:
        zero_points[:] = 1 << (bits - 1)
    g_idx = np.arange(k) // size
    if act_order:
        g_idx = rng.permutation(g_idx)
    scales = rng.uniform(0.5, 1.5, (groups, n)) * rng.choice([-1, 1], (groups, n)) / (1 << bits)
    stored = scales.astype(getattr(ml_dtypes, dtype, dtype))
    return Weight(bits, rng.integers(0, top + 1, (k, n)), zero_points, stored, g_idx.astype(np.int32))


def gptq_tensors(w: Weight, version: int = 1, prefix: str = "layer") -> dict[str, np.ndarray]:
    stored = w.zero_points - 1 if version == 1 else w.zero_points
    return {
        f"{prefix}.qweight": pack_stream(w.codes, w.bits, 0),
        f"{prefix}.qzeros": pack_stream(stored & ((1 << w.bits) - 1), w.bits, 1),
        f"{prefix}.scales": w.scales,
        f"{prefix}.g_idx": w.g_idx,
    }


def gptq_config(w: Weight, group_size: int, version: int = 1, **extra: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": w.bits,
        "group_size": group_size,
        "desc_act": True,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        **extra,
    }


def weight_of(loaded: tuple[Any, Any], name: str = "layer.weight") -> qg.QTensor:
    """A weight of what a reader returned."""
    w = loaded[0][name]
    assert isinstance(w, qg.QTensor)
    return w


def decoded(w: Any) -> np.ndarray:
    assert isinstance(w, qg.QTensor)
    return np.asarray(w.dequantize())


def check_weight(w: Any, oracle: Weight, group_size: int) -> None:
    """Values to the bit, format and product."""
    assert isinstance(w, qg.QTensor)
    dense = oracle.dense()
    symmetric = bool((oracle.zero_points == 1 << (oracle.bits - 1)).all())
    make: Any = {2: qg.int2, 3: qg.int3, 4: qg.int4, 8: qg.int8}[oracle.bits]
    assert w.format == make(group_size, symmetric=symmetric, scale_dtype=oracle.scales.dtype.name)
    assert w.shape == dense.shape
    np.testing.assert_array_equal(decoded(w), dense.astype(np.float32))
    x = np.random.default_rng(1).standard_normal((3, len(dense))).astype(np.float32)
    check_product(qg.matmul(jnp.asarray(x), w), x, dense, product_limit(np.float32))


def tensors_of(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """dtype, shape and bytes of every tensor of a safetensors file, read without the library."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]])
        for name, entry in header.items()
    }


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = tensors_of(a / "model.safetensors"), tensors_of(b / "model.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        assert first[name] == second[name], name


def replaced(part: str, value: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {f"layer.{part}": value(tensors[f"layer.{part}"])}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if name != f"layer.{part}"}


def with_value(index: Any, number: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = number
        return array

    return change


def quantized(format: Any, k: int = 64, n: int = 40) -> qg.QTensor:
    return qg.quantize(jnp.asarray(np.random.default_rng(3).standard_normal((k, n), np.float32)), format)


def container(header: Any, data: bytes = b"", nbytes: int | None = None) -> bytes:
    """A safetensors file of this header, an object or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if nbytes is None else nbytes) + text + data


def entry(begin: int = 0, end: int = 8, dtype: object = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
