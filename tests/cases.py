"""The table of formats, shapes and types that the products are tested over, and random weights for it.

A weight is made without the code under test, as far as it goes: GGUF blocks of random bytes are decoded by
gguf-py, integer formats by their formula, and the planes are packed here, from the description of the layout.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
from pairwise import cover

import jax_qgemm as qg
from jax_qgemm.formats import FORMAT_NAMES, GGUF_FORMATS, CodePlane, Format, GGUFFormat, IntFormat
from jax_qgemm.formats.integer import GROUP_SIZES, SCALE_DTYPES
from jax_qgemm.testing import check_product, product_limit

_INTS = {"int2": qg.int2, "int3": qg.int3, "int4": qg.int4, "int8": qg.int8}
INT_FORMATS: tuple[Format, ...] = tuple(
    make(group, symmetric=symmetric, scale_dtype=dtype)
    for make in _INTS.values()
    for group, symmetric, dtype in itertools.product((*GROUP_SIZES, -1), (True, False), SCALE_DTYPES)
)
ALL_FORMATS: tuple[Format, ...] = (*GGUF_FORMATS.values(), *INT_FORMATS)
FORMATS: tuple[Format, ...] = (
    *GGUF_FORMATS.values(),
    qg.int4(16),
    qg.int4(32, symmetric=False, scale_dtype="bfloat16"),
    qg.int4(64, scale_dtype="float32"),
    qg.int4(128, symmetric=False),
    qg.int4(256, scale_dtype="bfloat16"),
    qg.int4(-1, symmetric=False, scale_dtype="float32"),
    qg.int8(-1),
    qg.int8(128, symmetric=False, scale_dtype="bfloat16"),
    qg.int2(64, symmetric=False, scale_dtype="float32"),
    qg.int3(32),
)
"""Every GGUF format, and integers with every width, group size and scale type."""
assert {f.name for f in FORMATS} == set(FORMAT_NAMES), "a format of the registry has no row here"

M = (0, 1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 129, 257)
N = (1, 3, 16, 31, 127, 509, 1056)
K = ("one block", "three blocks", "1024", "tail")
X = ("float16", "bfloat16", "float32", "float32 highest")
DATA = ("normal", "offset", "large")
OPS = ("product", "transposed")


def k_of(kind: str, format: Format) -> int:
    """Elements of k. A tail is a multiple of the block, not of a kernel's tile: odd where the block is 1."""
    tail = 777 if format.block == 1 else (5 if format.block == 256 else 11) * format.block
    return {"one block": format.block, "three blocks": 3 * format.block, "1024": 1024, "tail": tail}[kind]


@dataclasses.dataclass(frozen=True)
class Case:
    format: Format
    m: int
    n: int
    k_kind: str
    x_type: str
    data: str = "normal"
    op: str = "product"
    transform: str = "jit"

    @property
    def k(self) -> int:
        return k_of(self.k_kind, self.format)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(getattr(ml_dtypes, self.x_type, None) or self.x_type.removesuffix(" highest"))

    @property
    def precision(self) -> str | None:
        return "highest" if self.x_type.endswith("highest") else None

    @property
    def limit(self) -> float:
        minimums = any(p.name == "minimums" for p in self.format.planes)
        return product_limit(self.dtype, minimums=minimums, highest=self.precision is not None)

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(str(self).encode()))

    def __str__(self) -> str:
        shape = f"m{self.m}-n{self.n}-k{self.k}"
        words = (self.transform, self.op, self.format, shape, self.x_type, self.data)
        return "-".join(map(str, words)).replace(" ", "_")


_FACTORS = {"format": FORMATS, "m": M, "n": N, "k_kind": K, "x_type": X, "data": DATA, "op": OPS}


def kernel_cases() -> list[Case]:
    """What `make test` runs on any machine: every pair of values, about 300 cases."""
    return [Case(**row) for row in cover(_FACTORS, seed=1)]


def gpu_kernel_cases() -> list[Case]:
    """What `make test-gpu` adds: the same over every integer format, 3,000 cases."""
    return [Case(**row) for row in cover(_FACTORS | {"format": ALL_FORMATS}, seed=2, count=3000)]


def transform_cases(transforms: tuple[str, ...], formats: tuple[Format, ...], m: tuple[int, ...]) -> list[Case]:
    factors = {"transform": transforms, "format": formats, "m": m, "n": N[:-1], "k_kind": K, "x_type": X}
    return [Case(**row) for row in cover(factors, seed=3)]


@dataclasses.dataclass(frozen=True)
class FusedCase(Case):
    """``activation(scale * x @ w + bias) + residual``; gated, n counts the columns of the result, a multiple of 16."""

    activation: str | None = None
    scale: bool = False
    bias: str | None = None  # their types
    residual: str | None = None
    out_dtype: str = "float32"
    gated: bool = False

    def __str__(self) -> str:
        kind = "gated" if self.gated else "fused"
        words = (kind, self.activation, self.scale, self.bias, self.residual, self.out_dtype, super().__str__())
        return "-".join(map(str, words))


_FLOATS = ("float16", "bfloat16", "float32")
_FUSED_FACTORS = {
    "format": FORMATS,
    "m": M,
    "n": N,
    "k_kind": K,
    "x_type": X,
    "activation": (None, "silu", "gelu", "gelu_tanh", "relu"),
    "scale": (False, True),
    "bias": (None, *_FLOATS),
    "residual": (None, *_FLOATS),
    "out_dtype": _FLOATS,
    "gated": (False, True),
}


def fused_cases() -> list[FusedCase]:
    """Every pair of values, about 250 cases."""
    return _fused_cases(_FUSED_FACTORS)


def gpu_fused_cases() -> list[FusedCase]:
    """What `make test-gpu` adds: the same over every integer format, 1,500 cases."""
    return _fused_cases(_FUSED_FACTORS | {"format": ALL_FORMATS}, count=1500)


def _fused_cases(factors: dict[str, Any], count: int = 0) -> list[FusedCase]:
    rows = cover(factors, seed=4, count=count)
    return [FusedCase(**row | {"n": -(-row["n"] // 16) * 16 if row["gated"] else row["n"]}) for row in rows]


# Random operands.


def random_x(case: Case, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal data; with a mean four times its deviation; or near the end of the result's range."""
    x = rng.standard_normal(shape)
    if case.data == "offset":
        x = x + 4
    elif case.data == "large":
        x = x * (60 if case.dtype == np.float16 else 1e15)
    return x.astype(np.float32).astype(case.dtype)


def check_case_product(case: Case, out: Any, x: np.ndarray, dense: np.ndarray) -> None:
    """Checks a product with an x of 16 bits whose mean is far from zero, where Hopper's kernels round weights once to
    the type of x, against the weights as they are or so rounded: the roundings
    of a column add up there, beyond what the limit allows. All others against the weights as they are."""
    group = case.format.group if isinstance(case.format, IntFormat) else 1
    exact = case.m <= 8 or group == 0 or (case.m <= 64 and group >= 64)
    rounds = case.data == "offset" and not exact and case.dtype.itemsize == 2
    try:
        check_product(out, x, dense, case.limit)
    except AssertionError:
        if not rounds:
            raise
        check_product(out, x, dense.astype(np.float32).astype(case.dtype), case.limit)


def _signed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random values of either sign and of magnitude 0.5 to 1.5."""
    return rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)


# Where a block holds its float16 values, and a magnitude that makes weights of about 1.
_HALVES = {
    "q4_0": ((0, 0.2),),
    "q4_1": ((0, 0.2), (2, 1.5)),
    "q5_0": ((0, 0.1),),
    "q5_1": ((0, 0.1), (2, 1.5)),
    "q8_0": ((0, 0.013),),
    "q2_k": ((80, 0.07), (82, 0.1)),
    "q3_k": ((108, 0.02),),
    "q4_k": ((0, 0.003), (2, 0.02)),
    "q5_k": ((0, 0.0015), (2, 0.02)),
    "q6_k": ((208, 0.0006),),
    "iq4_nl": ((0, 0.015),),
    "iq4_xs": ((0, 0.0007),),
}


def random_blocks(
    format: GGUFFormat, n: int, k: int, rng: np.random.Generator, *, any_scale: bool = False
) -> np.ndarray:
    """uint8 (n, row bytes): random bytes, but for the float16 fields, which are finite.

    Args:
      any_scale: scales take any finite value, instead of those that give weights of about 1.
    """
    blocks = rng.integers(0, 256, (n, k // format.block, format.block_bytes), np.uint8)
    for offset, magnitude in _HALVES.get(format.name, ()):
        if any_scale:
            bits = rng.integers(0, 1 << 16, blocks.shape[:-1], np.uint16)
            bits = np.where(bits >> 10 & 31 == 31, bits & 0x83FF, bits)
        else:
            half = magnitude * _signed(rng, blocks.shape[:-1])
            bits = half.astype(np.float16).view(np.uint16)
        blocks[..., offset] = bits & 255
        blocks[..., offset + 1] = bits >> 8
    if format.name == "mxfp4" and not any_scale:
        blocks[..., 0] = rng.integers(124, 129, blocks.shape[:-1])
    if format.name == "nvfp4" and not any_scale:
        blocks[..., :4] = rng.integers(40, 64, (*blocks.shape[:-1], 4))
    return blocks.reshape(n, -1)


def gguf_py_dequantize(raw: np.ndarray, format: GGUFFormat) -> np.ndarray:
    """float32 (n, k) of uint8 (n, row bytes), by gguf-py."""
    with np.errstate(over="ignore", invalid="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(format.ggml_type))


@functools.cache
def _bank(format: GGUFFormat) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Fields and gguf-py's values of the largest weight: those of the cases are cut out of it."""
    raw = random_blocks(format, max(N), 1280, np.random.default_rng(zlib.crc32(format.name.encode())))
    blocks = raw.reshape(len(raw), -1, format.block_bytes)
    fields = {name: np.asarray(value) for name, value in jax.jit(format.from_bytes)(blocks).items()}
    return fields, gguf_py_dequantize(raw, format)


def _random_gguf(format: GGUFFormat, n: int, k: int, rng: np.random.Generator) -> tuple[dict[str, Any], np.ndarray]:
    fields, values = _bank(format)
    row = int(rng.integers(len(values) - n + 1))
    block = int(rng.integers((values.shape[1] - k) // format.block + 1))
    total = values.shape[1]

    def cut(a: np.ndarray) -> np.ndarray:
        size = total // a.shape[1]  # elements of k that one entry stands for
        return a[row : row + n, block * format.block // size : (block * format.block + k) // size]

    return {name: cut(a) for name, a in fields.items()}, cut(values)


def _random_ints(
    format: IntFormat, n: int, k: int, rng: np.random.Generator, magnitude: float
) -> tuple[dict[str, Any], np.ndarray]:
    groups = k // format.group if format.group else 1
    levels = 1 << format.bits
    scale = _signed(rng, (n, groups)) * magnitude * 2 / levels
    stored = scale.astype(getattr(ml_dtypes, format.scale_dtype, None) or format.scale_dtype)
    q = rng.integers(0, levels, (n, k))
    zero = np.full((n, groups), levels // 2) if format.symmetric else rng.integers(0, levels, (n, groups))
    fields = {
        "codes": (q - 128 if format.bits == 8 else q).astype(np.uint8),
        "scales": stored.view(np.uint32 if format.scale_dtype == "float32" else np.uint16),
    }
    if not format.symmetric:
        fields["zero_points"] = zero.astype(np.uint8)
    repeat = functools.partial(np.repeat, repeats=k // groups, axis=1)
    return fields, repeat(stored.astype(np.float32)) * (q - repeat(zero)).astype(np.float32)


def random_weight(
    format: Format,
    n: int,
    k: int,
    rng: np.random.Generator,
    *,
    batch: int | None = None,
    magnitude: float = 1.0,
) -> tuple[qg.QTensor, np.ndarray]:
    """A QTensor and its dense values, float64 (k, n); both with a leading axis of `batch`.

    Args:
      magnitude: of the weights, for integer formats.
    """
    if batch is not None:
        weights = [random_weight(format, n, k, rng, magnitude=magnitude) for _ in range(batch)]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(w for w, _ in weights))
        return stacked, np.stack([dense for _, dense in weights])
    if isinstance(format, GGUFFormat):
        fields, rows = _random_gguf(format, n, k, rng)
    else:
        assert isinstance(format, IntFormat)
        fields, rows = _random_ints(format, n, k, rng, magnitude)
    return pack(fields, format, n, k), rows.T.astype(np.float64)


# The kernel layout, from its description (jax_qgemm/formats/layout.py), by index.

_lane, _run, _e = np.meshgrid(np.arange(32), np.arange(8), np.arange(4), indexing="ij")
_ROW = _lane // 4 + 8 * (_run % 2)
_COLUMN = 16 * (_run // 2) + 2 * (_lane % 4) + (_e >> 1) + 8 * (_e & 1)


def _pack_codes(codes: np.ndarray, bits: int, shift: int, k_block: int) -> np.ndarray:
    n, k = codes.shape
    tiles = (codes >> shift & (1 << bits) - 1).reshape(n // 16, 16, k // 64, 64).swapaxes(1, 2)
    runs = tiles[:, :, _ROW, _COLUMN].astype(np.uint32)
    words = np.zeros((*runs.shape[:3], bits), np.uint32)
    fields = 8 // bits
    for run, e in itertools.product(range(8), range(4)):
        words[..., run // fields] |= runs[..., run, e] << np.uint32(8 * e + bits * (run % fields))
    vector = min(bits, 4)
    words = words.reshape(*words.shape[:3], bits // vector, vector).swapaxes(2, 3)
    return words.reshape(n // 16, k // k_block, -1)


def pack(fields: dict[str, np.ndarray], format: Format, n: int, k: int) -> qg.QTensor:
    n_padded, k_padded = -n % 16 + n, -k % format.k_block + k
    planes = []
    for plane in format.planes:
        if isinstance(plane, CodePlane):
            codes = np.zeros((n_padded, k_padded), np.uint8)
            codes[:n, :k] = fields["codes"]
            planes.append(_pack_codes(codes, plane.bits, plane.shift, format.k_block))
        else:
            per_block = format.k_block // plane.group if plane.group else 1
            blocks = k_padded // format.k_block if plane.group else 1
            values = np.zeros((n_padded, blocks * per_block), fields[plane.name].dtype)
            values[:n, : fields[plane.name].shape[1]] = fields[plane.name]
            values = values.reshape(n_padded // 16, 2, 8, blocks, per_block).transpose(0, 3, 2, 4, 1)
            planes.append(values.reshape(n_padded // 16, blocks, -1))
    return qg.QTensor(tuple(planes), format, (k_padded - k, n_padded - n))
