"""Activations quantized to 8 bits, for products with quantized weights.

What is said of ggml is how its quantize_row_q8_1_ref (ggml-quants.c) and quantize_q8_1
(ggml-cuda/quantize.cu) do.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from jax_qgemm.formats.bits import as_u16, flat, in_blocks, low_bytes
from jax_qgemm.formats.format import exact_divide, f32_to_f16, largest_magnitude, rounded
from jax_qgemm.formats.ggml_legacy import absmax_int8, round_away

BLOCK = 32
BLOCK_BYTES = 36
_LARGEST = 127 * 65504.0  # its scale is the largest finite float16
# Below this times the largest code a largest magnitude counts as zero: there, backends that take subnormal numbers for
# zeros would in the end give other bytes than those that do not.
_TINY = 2.0**-100
Convention = Literal["cpu", "cuda"]


class ActivationFormat(NamedTuple):
    """The types of the arrays of `QActivations`; group 0 is one scale per token, None what there is not."""

    codes: str
    scales: str
    sums: str | None
    group: int
    largest: int  # magnitude of a code


ACTIVATION_FORMATS = {
    "q8_1": ActivationFormat("int8", "float16", "int16", BLOCK, 127),
    "int8": ActivationFormat("int8", "float32", None, 0, 127),
    "fp8": ActivationFormat("float8_e4m3fn", "float32", None, 0, 448),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QActivations:
    """Quantized activations of logical shape (..., k):

        x ~ scale * code

    A pytree; its leaves are the arrays that the format has. Format and type are static. From `quantize_activations`.

    Attributes:
      format: "int8" and "fp8" have one scale per token, a row along k; "q8_1" one for every 32 elements.
      codes: (..., k), int8, or float8_e4m3fn for "fp8".
      scales: (..., 1) float32, or (..., k / 32) float16 for "q8_1".
      sums: int16 (..., k / 32), the sum of the codes of each group, for products with weights that have minimums; None
        but for "q8_1".
      dtype: the type that x had, which products give by default.
    """

    format: str = dataclasses.field(metadata={"static": True})
    codes: jax.Array
    scales: jax.Array
    sums: jax.Array | None = None
    dtype: np.dtype = dataclasses.field(default=np.dtype(np.float32), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    def __repr__(self) -> str:
        shape = getattr(self.codes, "shape", self.codes)  # inside a transform leaves may be anything
        return f"QActivations({self.format}, shape={shape}, of {self.dtype})"

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """scale * code (..., k), multiplied in float32 (for "q8_1" exactly), rounded to `dtype`."""
        groups = self.scales.shape[-1]
        grouped = in_blocks(self.codes, self.codes.shape[-1] // groups).astype(jnp.float32)
        return flat(grouped * self.scales.astype(jnp.float32)[..., None]).astype(dtype)

    def check(self, name: str = "x") -> None:
        """Raises unless the arrays are those of the format, which nothing checks when they are put in.

        Raises:
          TypeError: an array of another type.
          ValueError: an unknown format, or an array of another shape.
        """
        kind = activation_format(self.format)
        *rows, k = np.shape(self.codes) or (0,)
        if k == 0 or (kind.group and k % kind.group):
            raise ValueError(f"codes of {name} ({self.format}) have shape {np.shape(self.codes)}, expected (..., k)")
        per_group = (*rows, k // kind.group if kind.group else 1)
        for part, dtype, shape in (
            ("codes", kind.codes, (*rows, k)), ("scales", kind.scales, per_group), ("sums", kind.sums, per_group),
        ):  # fmt: skip
            array: Any = getattr(self, part)
            got = None if array is None else getattr(array, "dtype", type(array).__name__)
            if got != (None if dtype is None else jnp.dtype(dtype)):
                raise TypeError(f"{part} of {name} ({self.format}) must be {dtype}, got {got}")
            if array is not None and array.shape != shape:
                raise ValueError(f"{part} of {name} ({self.format}) have shape {array.shape}, expected {shape}")


def _deserialize_aux(data: bytes | bytearray) -> tuple[str, np.dtype]:
    format, dtype = json.loads(bytes(data))
    return format, jnp.dtype(dtype)


export.register_pytree_node_serialization(
    QActivations,
    serialized_name="jax_qgemm.QActivations",
    serialize_auxdata=lambda aux: json.dumps([aux[0], aux[1].name]).encode(),
    deserialize_auxdata=_deserialize_aux,
)


def activation_format(format: Any) -> ActivationFormat:
    if not (isinstance(format, str) and format in ACTIVATION_FORMATS):
        known = ", ".join(ACTIVATION_FORMATS)
        raise ValueError(f"unknown activation format {format!r}; known formats: {known}")
    return ACTIVATION_FORMATS[format]


def quantize(x: jax.Array, format: str) -> tuple[jax.Array, ...]:
    """Codes and scales of x (..., k), and of "q8_1" sums: `quantize_activations` says which. In jnp, for any platform;
    the CUDA kernel gives the same bytes."""
    return _per_group(x) if format == "q8_1" else _per_token(x, format)


def _per_group(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    groups = _groups(x)
    top = largest_magnitude(groups, keepdims=True)
    codes, d = absmax_int8(jnp.where(top < 127 * _TINY, 0.0, groups))
    return flat(codes), rounded(d, jnp.float16), _sums(codes)


def _per_token(x: jax.Array, format: str) -> tuple[jax.Array, jax.Array]:
    kind = ACTIVATION_FORMATS[format]
    x = x.astype(jnp.float32)
    top = largest_magnitude(x, keepdims=True)
    top = jnp.where(top < kind.largest * _TINY, 0.0, top)
    scales = jnp.where(jnp.isinf(top), jnp.nan, exact_divide(top, kind.largest))
    is_plain = (top > 0) & (top < jnp.inf)
    # The largest element becomes the largest code, within two roundings: no code needs to be clipped.
    factor = jnp.where(is_plain, exact_divide(kind.largest, jnp.where(is_plain, top, 1.0)), 0.0)
    # Without a barrier XLA may compute what belongs to a token once for every element.
    scales, factor = lax.optimization_barrier((scales, factor))
    scaled = jnp.where(factor > 0, x * factor, 0.0)
    codes = jnp.round(scaled) if format == "int8" else _rounded_to_e4m3(scaled)
    return codes.astype(kind.codes), scales


def _rounded_to_e4m3(value: jax.Array) -> jax.Array:
    """float32 values up to 448 that float8_e4m3fn holds, ties to even. Conversions by way of another type round twice,
    which these values survive."""
    bits = lax.bitcast_convert_type(value, jnp.int32)
    exponent = jnp.maximum((bits >> 23) & 0xFF, 127 - 6)  # of the smallest normal number, which subnormal ones share
    step, inverse = (lax.bitcast_convert_type(e << 23, jnp.float32) for e in (exponent - 3, 254 + 3 - exponent))
    return jnp.round(value * inverse) * step


def q8_1_to_bytes(x: Any, convention: Convention) -> jax.Array:
    """ggml's block_q8_1 of activations: float16 d, float16 s, 32 int8 codes.

    ggml stores in s what is cheap for the side that computes it, so that two conventions exist:
      "cpu": code = round(x * (1 / d)), s = d * sum(code) with d not yet rounded.
      "cuda": code = round(x / d), s = sum(x), added in the order of a butterfly over the 32 lanes of a warp.

    An s beyond the range of float16 is clamped to +-65504, where ggml stores Inf.

    Args:
      x: as in `quantize_activations`.

    Returns:
      uint8 (..., k / 32 * 36).

    Raises:
      TypeError, ValueError: as `quantize_activations`; a convention other than these two.
    """
    if convention not in ("cpu", "cuda"):
        raise ValueError(f'convention must be "cpu" or "cuda", got {convention!r}')
    check_activations(x, BLOCK)
    groups = _groups(jnp.asarray(x))
    codes, d = absmax_int8(groups)
    if convention == "cpu":
        s = d * _sums(codes).astype(jnp.float32)
    else:
        codes = round_away(exact_divide(groups, jnp.where(d == 0, 1.0, d)[..., None])).astype(jnp.int8)
        while groups.shape[-1] > 1:
            low, high = jnp.split(groups, 2, axis=-1)
            groups = low + high
        s = groups[..., 0]
    scales = lax.bitcast_convert_type(rounded(d, jnp.float16), jnp.uint16)
    parts = [low_bytes(scales), low_bytes(f32_to_f16(s)[0])]
    return flat(jnp.concatenate([*parts, lax.bitcast_convert_type(codes, jnp.uint8)], axis=-1))


def q8_1_from_bytes(raw: Any) -> QActivations:
    """QActivations of ggml's block_q8_1, uint8 (..., k / 32 * 36), of either convention: the sums are those
    of the codes, the stored s is not read.

    Raises:
      TypeError: raw is not uint8.
      ValueError: its last axis is not a positive multiple of 36.
    """
    if getattr(raw, "dtype", None) != np.uint8:
        raise TypeError(f"raw must be a uint8 array, got {getattr(raw, 'dtype', type(raw).__name__)}")
    if raw.ndim < 1 or raw.shape[-1] == 0 or raw.shape[-1] % BLOCK_BYTES:
        raise ValueError(
            f"raw must have shape (..., row bytes) with row bytes a positive multiple of {BLOCK_BYTES}, "
            f"got {tuple(raw.shape)}"
        )
    blocks = in_blocks(jnp.asarray(raw), BLOCK_BYTES)
    codes = lax.bitcast_convert_type(blocks[..., 4:], jnp.int8)
    scales = lax.bitcast_convert_type(as_u16(blocks[..., :2]), jnp.float16)
    return QActivations("q8_1", flat(codes), scales, _sums(codes))


def _sums(codes: jax.Array) -> jax.Array:
    return jnp.sum(codes, axis=-1, dtype=jnp.int16)


def check_activations(x: Any, block: int) -> None:
    """Raises unless x is a float array (..., k), k a positive multiple of `block`."""
    if not hasattr(x, "dtype") or x.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        got = getattr(x, "dtype", None) or type(x).__name__
        raise TypeError(f"x must be a float16, bfloat16 or float32 array, got {got}")
    if x.ndim < 1 or x.shape[-1] == 0 or x.shape[-1] % block:
        multiple = f" a positive multiple of {block}" if block > 1 else " positive"
        raise ValueError(f"x must have shape (..., k) with k{multiple}, got {tuple(x.shape)}")


def _groups(x: jax.Array) -> jax.Array:
    """float32 (..., k / 32, 32), clamped to what float16 scales can express; infinities stay."""
    x = x.astype(jnp.float32)
    return in_blocks(jnp.where(jnp.isinf(x), x, jnp.clip(x, -_LARGEST, _LARGEST)), BLOCK)
