"""ggml's formats of 256-element super-blocks, whose sub-scales are quantized themselves: q2_k to q6_k.

Block layouts are those of ggml-common.h (block_q2_K and following). q2_k, q4_k and q5_k hold a minimum beside
each scale, quantized alike and subtracted. gguf-py has no quantizers for these formats; see
k_quants_search.py for ours.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jax_qgemm.formats import k_quants_search as search
from jax_qgemm.formats.bits import as_u16, flat, in_blocks, join_fields, low_bytes, split_fields
from jax_qgemm.formats.format import CodePlane, Fields, GGUFFormat, GroupPlane, f16_to_f32

BLOCK = 256


def sub_scaled(d: jax.Array, sub: jax.Array) -> jax.Array:
    """d * sub, float32 (..., blocks * g), of float16 bits (..., blocks) and integers (..., blocks * g)."""
    groups = in_blocks(sub, sub.shape[-1] // d.shape[-1]).astype(jnp.float32)
    return flat(f16_to_f32(d)[..., None] * groups)


@dataclasses.dataclass(frozen=True)
class _ScaleFormat(GGUFFormat):
    """d * sub_scale * qvalue, with signed sub-scales."""

    @property
    def _half(self) -> int:
        return 1 << (self.code_bits - 1)

    def qvalue(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.int32) - self._half

    @abc.abstractmethod
    def _sub_scale(self, stored: jax.Array) -> jax.Array:
        """int32 sub-scales of the plane's uint8."""

    def scale(self, fields: Fields) -> jax.Array:
        return sub_scaled(fields["scales"], self._sub_scale(fields["sub_scales"]))


@dataclasses.dataclass(frozen=True)
class Q3_K(_ScaleFormat):
    """d * (sub_scale - 32) * (code - 4)."""

    def _sub_scale(self, stored: jax.Array) -> jax.Array:
        return stored.astype(jnp.int32) - 32

    def encode(self, w: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        fit, overflow = search.fit_scales(w, self.group, search.Uniform(-4, 3), -32, 31)
        return {
            "codes": fit["codes"],
            "sub_scales": (fit["sub_scales"] + 32).astype(jnp.uint8),
            "scales": fit["scales"],
        }, overflow

    def from_bytes(self, blocks: jax.Array) -> dict[str, jax.Array]:
        high, low, sub, d = jnp.split(blocks, (32, 96, 108), axis=-1)
        low = flat(split_fields(in_blocks(low, 32), 2))
        sub_low, sub_high = split_fields(sub[..., :8], 4), split_fields(sub[..., 8:], 2)
        return {
            "codes": flat(low | (split_fields(high, 1) << 2)),
            "sub_scales": flat(sub_low | (sub_high << 4)),
            "scales": as_u16(d),
        }

    def to_bytes(self, fields: Fields) -> jax.Array:
        codes = in_blocks(fields["codes"], BLOCK)
        sub = in_blocks(fields["sub_scales"], 16)
        parts = (
            join_fields(codes >> 2, 1),
            flat(join_fields(in_blocks(codes, 128), 2)),
            join_fields(sub, 4),
            join_fields(sub >> 4, 2),
            low_bytes(fields["scales"]),
        )
        return jnp.concatenate(parts, axis=-1)


@dataclasses.dataclass(frozen=True)
class Q6_K(_ScaleFormat):
    """d * sub_scale * (code - 32), sub_scale an int8."""

    def _sub_scale(self, stored: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(stored, jnp.int8).astype(jnp.int32)

    def encode(self, w: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        fit, overflow = search.fit_scales(w, self.group, search.Uniform(-32, 31), -128, 127)
        return {
            "codes": fit["codes"],
            "sub_scales": lax.bitcast_convert_type(fit["sub_scales"].astype(jnp.int8), jnp.uint8),
            "scales": fit["scales"],
        }, overflow

    def from_bytes(self, blocks: jax.Array) -> dict[str, jax.Array]:
        low, high, sub, d = jnp.split(blocks, (128, 192, 208), axis=-1)
        low = flat(split_fields(in_blocks(low, 64), 4))
        high = flat(split_fields(in_blocks(high, 32), 2))
        return {"codes": flat(low | (high << 4)), "sub_scales": flat(sub), "scales": as_u16(d)}

    def to_bytes(self, fields: Fields) -> jax.Array:
        halves = in_blocks(in_blocks(fields["codes"], BLOCK), 128)
        parts = (
            flat(join_fields(halves, 4)),
            flat(join_fields(halves >> 4, 2)),
            in_blocks(fields["sub_scales"], 16),
            low_bytes(fields["scales"]),
        )
        return jnp.concatenate(parts, axis=-1)


@dataclasses.dataclass(frozen=True)
class _MinimumFormat(GGUFFormat):
    """d * sub_scale * code - dmin * sub_minimum, with unsigned sub-scales and sub-minimums."""

    def qvalue(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.int32)

    @abc.abstractmethod
    def _sub_fields(self, fields: Fields) -> tuple[jax.Array, jax.Array]:
        """uint8 sub-scales and sub-minimums."""

    def scale(self, fields: Fields) -> jax.Array:
        return sub_scaled(fields["scales"], self._sub_fields(fields)[0])

    def minimum(self, fields: Fields) -> jax.Array:
        return -sub_scaled(fields["minimums"], self._sub_fields(fields)[1])


@dataclasses.dataclass(frozen=True)
class Q2_K(_MinimumFormat):
    """Sub-scale and sub-minimum are the low and the high nibble of one byte."""

    def _sub_fields(self, fields: Fields) -> tuple[jax.Array, jax.Array]:
        return fields["sub_scales"] & 15, fields["sub_scales"] >> 4

    def encode(self, w: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        fit, overflow = search.fit_scales_and_minimums(w, self.group, 3, 15)
        return {
            "codes": fit["codes"],
            "sub_scales": (fit["sub_scales"] + 16 * fit["sub_minimums"]).astype(jnp.uint8),
            "scales": fit["scales"],
            "minimums": fit["minimums"],
        }, overflow

    def from_bytes(self, blocks: jax.Array) -> dict[str, jax.Array]:
        sub, codes, d, dmin = jnp.split(blocks, (16, 80, 82), axis=-1)
        codes = flat(split_fields(in_blocks(codes, 32), 2))
        return {
            "codes": flat(codes),
            "sub_scales": flat(sub),
            "scales": as_u16(d),
            "minimums": as_u16(dmin),
        }

    def to_bytes(self, fields: Fields) -> jax.Array:
        halves = in_blocks(in_blocks(fields["codes"], BLOCK), 128)
        parts = (
            in_blocks(fields["sub_scales"], 16),
            flat(join_fields(halves, 2)),
            low_bytes(fields["scales"]),
            low_bytes(fields["minimums"]),
        )
        return jnp.concatenate(parts, axis=-1)


@dataclasses.dataclass(frozen=True)
class Q45_K(_MinimumFormat):
    """q4_k and q5_k: 6-bit sub-scales and sub-minimums, packed into 12 bytes."""

    def _sub_fields(self, fields: Fields) -> tuple[jax.Array, jax.Array]:
        return fields["sub_scales"], fields["sub_minimums"]

    def encode(self, w: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        fit, overflow = search.fit_scales_and_minimums(w, self.group, (1 << self.code_bits) - 1, 63)
        return {
            "codes": fit["codes"],
            "sub_scales": fit["sub_scales"].astype(jnp.uint8),
            "sub_minimums": fit["sub_minimums"].astype(jnp.uint8),
            "scales": fit["scales"],
            "minimums": fit["minimums"],
        }, overflow

    def from_bytes(self, blocks: jax.Array) -> dict[str, jax.Array]:
        d, dmin, sub, high, codes = jnp.split(blocks, (2, 4, 16, self.block_bytes - 128), axis=-1)
        codes = flat(split_fields(in_blocks(codes, 32), 4))
        if self.code_bits == 5:
            codes = codes | (split_fields(high, 1) << 4)
        # Bytes 0-3 and 4-7 hold sub-scales and sub-minimums 0-3, and in their upper two bits those of 4-7,
        # whose lower four bits share bytes 8-11.
        scale, minimum, low = jnp.split(sub, 3, axis=-1)
        return {
            "codes": flat(codes),
            "sub_scales": flat(jnp.concatenate([scale & 63, (low & 15) | (scale >> 6 << 4)], axis=-1)),
            "sub_minimums": flat(jnp.concatenate([minimum & 63, (low >> 4) | (minimum >> 6 << 4)], axis=-1)),
            "scales": as_u16(d),
            "minimums": as_u16(dmin),
        }

    def to_bytes(self, fields: Fields) -> jax.Array:
        codes = in_blocks(fields["codes"], BLOCK)
        scale, scale_end = jnp.split(in_blocks(fields["sub_scales"], 8), 2, axis=-1)
        minimum, minimum_end = jnp.split(in_blocks(fields["sub_minimums"], 8), 2, axis=-1)
        parts = [
            low_bytes(fields["scales"]),
            low_bytes(fields["minimums"]),
            scale | (scale_end >> 4 << 6),
            minimum | (minimum_end >> 4 << 6),
            (scale_end & 15) | (minimum_end << 4),
        ]
        if self.code_bits == 5:
            parts.append(join_fields(codes >> 4, 1))
        return jnp.concatenate([*parts, flat(join_fields(in_blocks(codes, 64), 4))], axis=-1)


_D = GroupPlane("scales", "uint16", BLOCK)
_DMIN = GroupPlane("minimums", "uint16", BLOCK)
_SUB_16 = GroupPlane("sub_scales", "uint8", 16)
_SUB_32 = (GroupPlane("sub_scales", "uint8", 32), GroupPlane("sub_minimums", "uint8", 32))
_CODES = CodePlane("codes", 4)

FORMATS = (
    Q2_K("q2_k", BLOCK, 16, (CodePlane("codes", 2), _SUB_16, _D, _DMIN), block_bytes=84, ggml_type=10),
    Q3_K(
        "q3_k",
        BLOCK,
        16,
        (CodePlane("codes", 2), CodePlane("high_bits", 1, shift=2), _SUB_16, _D),
        block_bytes=110,
        ggml_type=11,
    ),
    Q45_K("q4_k", BLOCK, 32, (_CODES, *_SUB_32, _D, _DMIN), block_bytes=144, ggml_type=12),
    Q45_K(
        "q5_k",
        BLOCK,
        32,
        (_CODES, CodePlane("high_bits", 1, shift=4), *_SUB_32, _D, _DMIN),
        block_bytes=176,
        ggml_type=13,
    ),
    Q6_K(
        "q6_k",
        BLOCK,
        16,
        (_CODES, CodePlane("high_bits", 2, shift=4), _SUB_16, _D),
        block_bytes=210,
        ggml_type=14,
    ),
)
