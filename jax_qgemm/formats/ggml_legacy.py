"""ggml's formats of 32-element blocks with one float16 scale: q4_0, q4_1, q5_0, q5_1 and q8_0.

Block layouts are those of ggml-common.h (block_q4_0 and following); the quantizers are those of gguf-py, to
the byte.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jax_qgemm.formats.bits import (
    as_u16,
    flat,
    in_blocks,
    join_fields,
    join_sequence,
    low_bytes,
    split_fields,
    split_sequence,
)
from jax_qgemm.formats.format import (
    CodePlane,
    Fields,
    GGUFFormat,
    GroupPlane,
    exact_divide,
    exact_reciprocal,
    f16_to_f32,
    f32_to_f16,
    largest_magnitude,
    uncontracted,
)

BLOCK = 32


@dataclasses.dataclass(frozen=True)
class LegacyFormat(GGUFFormat):
    """d * (code - zero), or d * code + m where the format has minimums."""

    bits: int
    has_minimum: bool

    @property
    def _zero(self) -> int:
        return 0 if self.has_minimum else 1 << (self.bits - 1)

    def qvalue(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.int32) - self._zero

    def scale(self, fields: Fields) -> jax.Array:
        return f16_to_f32(fields["scales"])

    def minimum(self, fields: Fields) -> jax.Array | None:
        return f16_to_f32(fields["minimums"]) if self.has_minimum else None

    def encode(self, w: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        blocks = in_blocks(w, BLOCK)
        top = (1 << self.bits) - 1
        if self.has_minimum:
            low, high = jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)
            d = exact_divide(high - low, top)
            scaled = (blocks - low[..., None]) * exact_reciprocal(d)[..., None]
            rounding = jnp.float32(0.5)
        else:
            # The element of largest magnitude, the first of equals, is mapped to code 0.
            index = jnp.argmax(jnp.abs(blocks), axis=-1, keepdims=True)
            low = None
            d = jnp.take_along_axis(blocks, index, axis=-1)[..., 0] / -self._zero
            scaled = blocks * exact_reciprocal(d)[..., None]
            rounding = jnp.float32(self._zero + 0.5)
        rounded = jnp.trunc(uncontracted(scaled) + rounding)
        codes = jnp.clip(rounded, 0, top).astype(jnp.uint8).reshape(w.shape)
        scales, overflow = f32_to_f16(d)
        fields = {"codes": codes, "scales": scales}
        if low is not None:
            fields["minimums"], minimum_overflow = f32_to_f16(low)
            overflow = overflow | minimum_overflow
        return fields, overflow

    def from_bytes(self, blocks: jax.Array) -> dict[str, jax.Array]:
        fields = {"scales": as_u16(blocks[..., 0:2])}
        head = 2
        if self.has_minimum:
            fields["minimums"] = as_u16(blocks[..., 2:4])
            head = 4
        codes = split_fields(blocks[..., -16:], 4)
        if self.bits == 5:
            codes = codes | (split_sequence(blocks[..., head : head + 4], 1) << 4)
        fields["codes"] = flat(codes)
        return fields

    def to_bytes(self, fields: Fields) -> jax.Array:
        codes = in_blocks(fields["codes"], BLOCK)
        parts = [low_bytes(fields["scales"])]
        if self.has_minimum:
            parts.append(low_bytes(fields["minimums"]))
        if self.bits == 5:
            parts.append(join_sequence(codes >> 4, 1))
        return jnp.concatenate([*parts, join_fields(codes, 4)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Q8_0(GGUFFormat):
    """d * q with signed 8-bit q."""

    def qvalue(self, codes: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.int32)

    def scale(self, fields: Fields) -> jax.Array:
        return f16_to_f32(fields["scales"])

    def encode(self, w: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        qvalue, d = absmax_int8(in_blocks(w, BLOCK))
        scales, overflow = f32_to_f16(d)
        codes = lax.bitcast_convert_type(qvalue, jnp.uint8).reshape(w.shape)
        return {"codes": codes, "scales": scales}, overflow

    def from_bytes(self, blocks: jax.Array) -> dict[str, jax.Array]:
        return {"codes": flat(blocks[..., 2:]), "scales": as_u16(blocks[..., :2])}

    def to_bytes(self, fields: Fields) -> jax.Array:
        return jnp.concatenate([low_bytes(fields["scales"]), in_blocks(fields["codes"], BLOCK)], axis=-1)


def absmax_int8(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 (..., size) codes round(x / d) and float32 (...,) d = max|x| / 127, as ggml's
    quantize_row_q8_0_ref has them: x is multiplied by the rounded 1 / d."""
    d = exact_divide(largest_magnitude(blocks), 127)
    scaled = uncontracted(blocks * exact_reciprocal(d)[..., None])
    return jnp.clip(round_away(scaled), -128, 127).astype(jnp.int8), d


def round_away(value: jax.Array) -> jax.Array:
    """Nearest integers, halves away from zero (C's roundf)."""
    magnitude = jnp.abs(value)
    floor = jnp.floor(magnitude)
    return jnp.sign(value) * (floor + (magnitude - floor >= 0.5))


def _legacy(name: str, ggml_type: int, bits: int, has_minimum: bool) -> LegacyFormat:
    codes = [CodePlane("codes", 4)]
    if bits == 5:
        codes.append(CodePlane("high_bits", 1, shift=4))
    groups = [GroupPlane(p, "uint16", BLOCK) for p in ("scales", "minimums")[: 1 + has_minimum]]
    return LegacyFormat(
        name=name,
        block=BLOCK,
        group=BLOCK,
        planes=(*codes, *groups),
        block_bytes=BLOCK * bits // 8 + 2 * len(groups),
        ggml_type=ggml_type,
        bits=bits,
        has_minimum=has_minimum,
    )


FORMATS = (
    _legacy("q4_0", 2, 4, has_minimum=False),
    _legacy("q4_1", 3, 4, has_minimum=True),
    _legacy("q5_0", 6, 5, has_minimum=False),
    _legacy("q5_1", 7, 5, has_minimum=True),
    Q8_0(
        name="q8_0",
        block=BLOCK,
        group=BLOCK,
        planes=(CodePlane("codes", 8), GroupPlane("scales", "uint16", BLOCK)),
        block_bytes=34,
        ggml_type=8,
    ),
)
