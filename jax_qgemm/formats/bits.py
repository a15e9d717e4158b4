"""Bit fields of the bytes of ggml's blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def low_bytes(bits: jax.Array) -> jax.Array:
    """uint16 (...,) -> its two bytes, uint8 (..., 2), little-endian."""
    return lax.bitcast_convert_type(bits, jnp.uint8)


def as_u16(pair: jax.Array) -> jax.Array:
    """uint8 (..., 2) -> uint16 (...,), little-endian."""
    return lax.bitcast_convert_type(pair, jnp.uint16)


def split_fields(packed: jax.Array, bits: int) -> jax.Array:
    """uint8 (..., width) -> (..., width * 8 / bits): the lowest `bits` of every byte, then the next."""
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
    fields = (packed[..., None, :] >> shifts) & ((1 << bits) - 1)
    return fields.reshape(*packed.shape[:-1], packed.shape[-1] * 8 // bits)


def join_fields(fields: jax.Array, bits: int) -> jax.Array:
    """The inverse of `split_fields`, of the low `bits` bits of each element."""
    parts = fields.reshape(*fields.shape[:-1], 8 // bits, fields.shape[-1] * bits // 8) & ((1 << bits) - 1)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
    return jnp.sum(parts << shifts, axis=-2, dtype=jnp.uint8)  # bit fields are disjoint: a sum is an or


def split_sequence(packed: jax.Array, bits: int) -> jax.Array:
    """uint8 (..., width) -> (..., width * 8 / bits): the fields of byte 0 from the lowest, then of byte 1."""
    return flat(split_fields(packed[..., None], bits))


def join_sequence(fields: jax.Array, bits: int) -> jax.Array:
    """The inverse of `split_sequence`, of the low `bits` bits of each element."""
    return flat(join_fields(in_blocks(fields, 8 // bits), bits))


def in_blocks(values: jax.Array, size: int) -> jax.Array:
    """(..., k) -> (..., k / size, size)."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // size, size)


def flat(values: jax.Array) -> jax.Array:
    """(..., blocks, size) -> (..., blocks * size), the inverse of `in_blocks`."""
    return values.reshape(*values.shape[:-2], values.shape[-2] * values.shape[-1])
