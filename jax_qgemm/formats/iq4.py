"""ggml's formats of 4-bit indices into a table of 16 non-uniform levels: iq4_nl and iq4_xs.

Block layouts are those of ggml-common.h (block_iq4_nl, block_iq4_xs), the table is its kvalues_iq4nl.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_qgemm.formats import k_quants_search as search
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
from jax_qgemm.formats.format import CodePlane, Fields, GGUFFormat, GroupPlane, f16_to_f32
from jax_qgemm.formats.k_quants import BLOCK as SUPER_BLOCK
from jax_qgemm.formats.k_quants import sub_scaled

TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_LEVELS = search.Table(TABLE)


@dataclasses.dataclass(frozen=True)
class IQ4_NL(GGUFFormat):
    """d * table[code], in blocks of 32."""

    def qvalue(self, codes: jax.Array) -> jax.Array:
        return jnp.asarray(TABLE, jnp.int32)[codes]

    def scale(self, fields: Fields) -> jax.Array:
        return f16_to_f32(fields["scales"])

    def encode(self, w: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        fit, overflow = search.fit_block_scale(w, self.block, _LEVELS)
        return {"codes": fit["codes"], "scales": fit["scales"]}, overflow

    def from_bytes(self, blocks: jax.Array) -> dict[str, jax.Array]:
        return {"codes": flat(split_fields(blocks[..., 2:], 4)), "scales": as_u16(blocks[..., :2])}

    def to_bytes(self, fields: Fields) -> jax.Array:
        codes = in_blocks(fields["codes"], self.block)
        return jnp.concatenate([low_bytes(fields["scales"]), join_fields(codes, 4)], axis=-1)


@dataclasses.dataclass(frozen=True)
class IQ4_XS(GGUFFormat):
    """d * (sub_scale - 32) * table[code], in super-blocks of 256 with 6-bit sub-scales."""

    def qvalue(self, codes: jax.Array) -> jax.Array:
        return jnp.asarray(TABLE, jnp.int32)[codes]

    def scale(self, fields: Fields) -> jax.Array:
        return sub_scaled(fields["scales"], fields["sub_scales"].astype(jnp.int32) - 32)

    def encode(self, w: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        fit, overflow = search.fit_scales(w, self.group, _LEVELS, -32, 31)
        return {
            "codes": fit["codes"],
            "sub_scales": (fit["sub_scales"] + 32).astype(jnp.uint8),
            "scales": fit["scales"],
        }, overflow

    def from_bytes(self, blocks: jax.Array) -> dict[str, jax.Array]:
        d, sub_high, sub_low, codes = jnp.split(blocks, (2, 4, 8), axis=-1)
        # Sub-scale i has its low four bits in nibble i of four bytes, its high two in field i of two.
        sub = split_sequence(sub_low, 4) | (split_sequence(sub_high, 2) << 4)
        codes = flat(split_fields(in_blocks(codes, 16), 4))
        return {"codes": flat(codes), "sub_scales": flat(sub), "scales": as_u16(d)}

    def to_bytes(self, fields: Fields) -> jax.Array:
        sub = in_blocks(fields["sub_scales"], 8)
        codes = in_blocks(in_blocks(fields["codes"], SUPER_BLOCK), self.group)
        parts = (
            low_bytes(fields["scales"]),
            join_sequence(sub >> 4, 2),
            join_sequence(sub, 4),
            flat(join_fields(codes, 4)),
        )
        return jnp.concatenate(parts, axis=-1)


FORMATS = (
    IQ4_NL(
        "iq4_nl",
        32,
        32,
        (CodePlane("codes", 4), GroupPlane("scales", "uint16", 32)),
        block_bytes=18,
        ggml_type=20,
    ),
    IQ4_XS(
        "iq4_xs",
        SUPER_BLOCK,
        32,
        (
            CodePlane("codes", 4),
            GroupPlane("sub_scales", "uint8", 32),
            GroupPlane("scales", "uint16", SUPER_BLOCK),
        ),
        block_bytes=136,
        ggml_type=23,
    ),
)
