"""The frozen description of a weight format: what every codec, kernel and test knows about it."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_qgemm.formats import layout

Fields = Mapping[str, jax.Array]
"""Logical parts of a weight. "codes" is uint8 (..., n, k); every other part is an unsigned integer array
(..., n, k / group), float values being kept as their bits."""


@dataclasses.dataclass(frozen=True)
class CodePlane:
    """Bits [shift, shift + bits) of every code, `bits` one of 1, 2, 4, 8."""

    name: str
    bits: int
    shift: int = 0


@dataclasses.dataclass(frozen=True)
class GroupPlane:
    """One value per row of n and `group` elements of k; group 0 is one value per row (per channel)."""

    name: str
    dtype: str
    group: int


Plane = CodePlane | GroupPlane


def columns(plane: Plane, k: int) -> int:
    """How many values of a plane a row of k elements has."""
    if isinstance(plane, CodePlane):
        return k
    return k // plane.group if plane.group else 1


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """An exact encoding of weights, each element being

        scale * (qvalue - zero_point) + minimum

    with an integer qvalue in [-128, 255], a float32 scale and, where the format has them, an integer zero_point and
    a float32 minimum per group of `group` elements of k. Two formats are equal if all their parameters are.

    Attributes:
      name: the name users write, such as "q4_k".
      block: k must be a multiple of it.
      group: elements of k that share a scale; 0 means the whole column (per channel).
      planes: the arrays of a QTensor in this format, in order; the first holds the low bits of the codes.
    """

    name: str
    block: int
    group: int
    planes: tuple[Plane, ...]

    @property
    def k_block(self) -> int:
        """Elements of k in one step of the planes' k axis: lcm(64, block, group)."""
        return math.lcm(layout.TILE_K, self.block, self.group or 1)

    @property
    def code_bits(self) -> int:
        return sum(p.bits for p in self.planes if isinstance(p, CodePlane))

    def __str__(self) -> str:
        return self.name

    # What a family defines.

    @property
    def scales_fit_float16(self) -> bool:
        """Whether scales are float16 or narrower, so that decoded weights may be float16."""
        return True

    @abc.abstractmethod
    def qvalue(self, codes: jax.Array) -> jax.Array:
        """int32 qvalues of uint8 codes of any shape."""

    @abc.abstractmethod
    def scale(self, fields: Fields) -> jax.Array:
        """float32 (..., n, k / group) scales, rounded exactly as the format's own decoder rounds them."""

    def zero_point(self, fields: Fields) -> jax.Array | None:
        """int32 (..., n, k / group), or None."""
        del fields
        return None

    def minimum(self, fields: Fields) -> jax.Array | None:
        """float32 (..., n, k / group), added to scale * qvalue, or None."""
        del fields
        return None

    @abc.abstractmethod
    def encode(self, w: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """Quantizes float32 (..., n, k).

        Returns:
          The fields, and a scalar bool: whether a scale left the range of its type and was clamped to it.
        """

    # What follows for all of them.

    def decode(self, fields: Fields) -> jax.Array:
        """float32 (..., n, k): the format's own value of every element, to the bit."""
        codes = fields["codes"]
        scale = self.scale(fields)
        grouped = (*codes.shape[:-1], scale.shape[-1], codes.shape[-1] // scale.shape[-1])
        qvalue = self.qvalue(codes).reshape(grouped)
        zero_point = self.zero_point(fields)
        if zero_point is not None:
            qvalue = qvalue - zero_point[..., None]
        value = qvalue.astype(jnp.float32) * scale[..., None]
        minimum = self.minimum(fields)
        if minimum is not None:
            value = uncontracted(value) + minimum[..., None]
        return value.reshape(codes.shape)

    def to_planes(self, fields: Fields) -> tuple[jax.Array, ...]:
        """Packs logical fields into the kernel layout; n and k are padded with zero codes and zero scales."""
        codes = fields["codes"]
        n, k = codes.shape[-2:]
        n_padded, k_padded = layout.round_up(n, layout.TILE_N), layout.round_up(k, self.k_block)
        planes = []
        for plane in self.planes:
            values = codes if isinstance(plane, CodePlane) else fields[plane.name]
            pad = [(0, 0)] * (values.ndim - 2) + [(0, n_padded - n), (0, columns(plane, k_padded) - values.shape[-1])]
            values = jnp.pad(values, pad)
            if isinstance(plane, CodePlane):
                planes.append(layout.pack_codes(values, plane.bits, plane.shift, self.k_block))
            else:
                planes.append(layout.pack_groups(values, k_padded // self.k_block if plane.group else 1))
        return tuple(planes)

    def from_planes(self, planes: tuple[jax.Array, ...], n: int, k: int) -> dict[str, jax.Array]:
        """The inverse of `to_planes`, without the padding."""
        fields: dict[str, jax.Array] = {}
        for plane, array in zip(self.planes, planes, strict=True):
            if isinstance(plane, CodePlane):
                part = layout.unpack_codes(array, plane.bits, plane.shift, self.k_block)[..., :n, :k]
                fields["codes"] = fields["codes"] | part if "codes" in fields else part
            else:
                fields[plane.name] = layout.unpack_groups(array)[..., :n, : columns(plane, k)]
        return fields

    def take_rows(self, planes: tuple[jax.Array, ...], rows: jax.Array, k: int) -> dict[str, jax.Array]:
        """Fields of single rows of n, (..., k) and (..., k / group), reading nothing of the other rows' groups."""
        fields: dict[str, jax.Array] = {}
        for plane, array in zip(self.planes, planes, strict=True):
            if isinstance(plane, CodePlane):
                part = layout.take_row_codes(array, rows, plane.bits, plane.shift, self.k_block)[..., :k]
                fields["codes"] = fields["codes"] | part if "codes" in fields else part
            else:
                fields[plane.name] = layout.take_row_groups(array, rows)[..., : columns(plane, k)]
        return fields

    def plane_shape(self, plane: Plane, n: int, k: int) -> tuple[int, int, int]:
        """Shape of a plane of an unbatched (k, n) weight."""
        n16, blocks = -(-n // layout.TILE_N), -(-k // self.k_block)
        if isinstance(plane, CodePlane):
            return n16, blocks, self.k_block // layout.TILE_K * layout.words_per_tile(plane.bits)
        if not plane.group:
            return n16, 1, 16
        return n16, blocks, 16 * (self.k_block // plane.group)

    def plane_dtype(self, plane: Plane) -> jnp.dtype:
        return jnp.dtype("uint32" if isinstance(plane, CodePlane) else plane.dtype)


@dataclasses.dataclass(frozen=True)
class GGUFFormat(Format):
    """A format with a GGUF block: `block` elements of k stored in `block_bytes` bytes.

    Attributes:
      block_bytes: bytes of one block.
      ggml_type: the number of the type in a GGUF file (ggml.h, enum ggml_type).
    """

    block_bytes: int
    ggml_type: int

    @abc.abstractmethod
    def from_bytes(self, blocks: jax.Array) -> dict[str, jax.Array]:
        """Fields of uint8 (..., n, k / block, block_bytes) blocks."""

    @abc.abstractmethod
    def to_bytes(self, fields: Fields) -> jax.Array:
        """The inverse of `from_bytes`."""


def f16_to_f32(bits: jax.Array) -> jax.Array:
    """float32 value of float16 bits held in uint16."""
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def f32_to_f16(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint16 bits of float32 values rounded to float16 and clamped to +-65504, and whether any was clamped."""
    limit = jnp.float32(65504.0)
    half = rounded(jnp.clip(value, -limit, limit), jnp.float16)
    overflow = jnp.any(jnp.abs(value) >= 65520.0)  # the first value that rounds to infinity
    return lax.bitcast_convert_type(half, jnp.uint16), overflow


def rounded(value: jax.Array, dtype: DTypeLike) -> jax.Array:
    """float32 values in float16 or bfloat16, rounded for good. Of a plain conversion, XLA keeps nothing on GPUs where
    one back to float32 follows (`xla_allow_excess_precision`), though bits were taken in between; a select stops it."""
    bits = lax.bitcast_convert_type(value.astype(dtype), jnp.uint16)
    quiet_nan = np.array(np.nan, dtype).view(np.uint16)
    return lax.bitcast_convert_type(jnp.where(jnp.isnan(value), quiet_nan, bits), dtype)


def uncontracted(product: jax.Array) -> jax.Array:
    """`product`, kept apart from a sum that follows. XLA would contract the two into one fma, which rounds once
    instead of twice; on the CPU an optimization_barrier does not stop it (jax 0.10.2), a select does."""
    return jnp.where(product == product, product, jnp.nan)


def largest_magnitude(x: jax.Array, keepdims: bool = False) -> jax.Array:
    """max|x| of float32 x along the last axis; NaN where there is one, which XLA's CPU backend loses in a maximum of
    floats over many rows. Magnitudes are ordered as their bits are, NaN last."""
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    return lax.bitcast_convert_type(jnp.max(bits, axis=-1, keepdims=keepdims), jnp.float32)


def exact_divide(value: ArrayLike, divisor: ArrayLike) -> jax.Array:
    """float32 value / divisor, rounded once to nearest, ties to even, whatever the backend: on GPUs XLA's own division
    is off by up to two units in the last place, and everywhere it turns one by a constant into a product."""
    value, divisor = jnp.broadcast_arrays(jnp.float32(value), jnp.float32(divisor))
    top, top_exponent = _significand(value)
    bottom, bottom_exponent = _significand(divisor)
    # Long division, eight bits at a time, of a top of which bottom goes in once.
    smaller = top < bottom
    top = jnp.where(smaller, 2 * top, top)
    exponent = top_exponent - bottom_exponent - smaller
    rest, quotient = top - bottom, jnp.uint32(1)
    for _ in range(3):
        rest = rest << 8
        quotient = quotient << 8 | rest // bottom
        rest = rest % bottom
    # 25 bits: one to round by, or more where the result is subnormal.
    dropped = (1 + jnp.clip(-126 - exponent, 0, 25)).astype(jnp.uint32)
    kept, half = quotient >> dropped, jnp.uint32(1) << (dropped - 1)
    below = quotient & (2 * half - 1)
    kept = kept + ((below > half) | ((below == half) & ((rest != 0) | (kept & 1 != 0))))
    bits = kept + (jnp.maximum(exponent + 126, 0).astype(jnp.uint32) << 23)
    bits = jnp.where(exponent > 127, jnp.uint32(0x7F800000), bits)
    # By their bits: threads of XLA take subnormal numbers for zeros.
    value_bits, divisor_bits = (lax.bitcast_convert_type(v, jnp.uint32) for v in (value, divisor))
    exact = lax.bitcast_convert_type(bits | ((value_bits ^ divisor_bits) & jnp.uint32(0x80000000)), jnp.float32)
    is_plain = [(v & 0x7FFFFFFF != 0) & (v & 0x7F800000 != 0x7F800000) for v in (value_bits, divisor_bits)]
    return jnp.where(is_plain[0] & is_plain[1], exact, value / divisor)


def _significand(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint32 m in [2**23, 2**24) and int32 e, |value| = m * 2**(e - 23); anything where value is 0 or not finite."""
    bits = lax.bitcast_convert_type(value, jnp.uint32) & 0x7FFFFFFF
    shift = jnp.maximum(lax.clz(bits | 1).astype(jnp.int32) - 8, 0)
    subnormal = bits < 0x800000
    significand = jnp.where(subnormal, bits << shift.astype(jnp.uint32), bits & 0x7FFFFF) | 0x800000
    return significand, jnp.where(subnormal, -126 - shift, (bits >> 23).astype(jnp.int32) - 127)


def exact_reciprocal(d: jax.Array) -> jax.Array:
    """1 / d rounded once, and 0 where d is 0 (ggml's `id = d ? 1/d : 0`)."""
    return jnp.where(d == 0, 0.0, exact_divide(1.0, jnp.where(d == 0, 1.0, d)))


def safe_reciprocal(d: jax.Array) -> jax.Array:
    """About 1 / d, and 0 where d is 0."""
    return jnp.where(d == 0, 0.0, 1.0 / jnp.where(d == 0, 1.0, d))
