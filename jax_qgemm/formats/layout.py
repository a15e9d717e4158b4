"""The kernel layout: how codes and per-group values are laid out in the planes of a QTensor.

One layout serves every kernel (GEMV, mma.sync, wgmma) and the CPU. It is built from tiles of 16 rows of n by 64 of k,
in the order in which the tensor cores take their A operand from registers (PTX ISA, "Matrix fragments for
mma.m16n8k16"). Lane 4g+t of a warp holds, of a tile, 32 codes. They form 8 *runs* of 4 codes, run 2s+h being row g+8h
of k-step s (16 of k):

    element e of the run is k = 16 s + 2 t + (e >> 1) + 8 (e & 1),    e = 0..3

A plane of b bits packs run r into word r // (8/b) of the lane, code e into byte e at bit b * (r % (8/b)). So
``(word >> b*field) & mask`` yields the four codes of a run as bytes, which is an int8 mma fragment over activations
permuted alike, and bytes (0, 2) and (1, 3) are the two f16 fragment registers of the row. A lane's words are
consecutive up to four (one 16-byte load); planes of 8 bits hold two such quarters, [half][lane][4].

Per-group values keep the rows g and g+8 side by side: [g 8][groups of the k-block][2].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

LAYOUT_VERSION = 1
TILE_N = 16
TILE_K = 64


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def words_per_tile(bits: int) -> int:
    """uint32 words that a plane of `bits` bits takes for one 16 x 64 tile."""
    return TILE_N * TILE_K * bits // 32


def pack_codes(codes: jax.Array, bits: int, shift: int, k_block: int) -> jax.Array:
    """Packs bits [shift, shift + bits) of every code.

    Args:
      codes: uint8 (..., n, k), n a multiple of 16, k a multiple of `k_block`.

    Returns:
      uint32 (..., n/16, k/k_block, words).
    """
    *batch, n, k = codes.shape
    fields = 8 // bits
    lane_words = 8 // fields
    vector = min(lane_words, 4)
    part = (codes >> shift) & ((1 << bits) - 1)
    part = part.reshape(*batch, n // 16, 2, 8, k // 64, 4, 2, 4, 2)  # n16 h g | k64 s e_lo t e_hi
    b = len(batch)
    # n16 k64 g t | s h | e_hi e_lo: run 2s+h, byte e = e_lo + 2 e_hi
    part = jnp.transpose(part, (*range(b), *(b + i for i in (0, 3, 2, 6, 4, 1, 7, 5))))
    part = part.reshape(*batch, n // 16, k // 64, 32, lane_words // vector, vector, fields, 4)
    shifts = jnp.arange(fields, dtype=jnp.uint8)[:, None] * jnp.uint8(bits)
    part = jnp.sum(part << shifts, axis=-2, dtype=jnp.uint8)  # bit fields are disjoint: a sum is an or
    words = lax.bitcast_convert_type(part, jnp.uint32)
    words = jnp.swapaxes(words, -3, -2)  # [half][lane][4]
    return words.reshape(*batch, n // 16, k // k_block, (k_block // 64) * words_per_tile(bits))


def unpack_codes(words: jax.Array, bits: int, shift: int, k_block: int) -> jax.Array:
    """The inverse of `pack_codes`: uint8 (..., n, k), the other bits zero."""
    *batch, n16, blocks, _ = words.shape
    fields = 8 // bits
    lane_words = 8 // fields
    vector = min(lane_words, 4)
    k64 = blocks * (k_block // 64)
    words = words.reshape(*batch, n16, k64, lane_words // vector, 32, vector)
    words = jnp.swapaxes(words, -3, -2)
    part = lax.bitcast_convert_type(words, jnp.uint8)  # ... lane, half, vector, byte
    shifts = jnp.arange(fields, dtype=jnp.uint8)[:, None] * jnp.uint8(bits)
    part = ((part[..., None, :] >> shifts) & ((1 << bits) - 1)) << shift
    part = part.reshape(*batch, n16, k64, 8, 4, 4, 2, 2, 2)  # n16 k64 g t | s h | e_hi e_lo
    b = len(batch)
    part = jnp.transpose(part, (*range(b), *(b + i for i in (0, 5, 2, 1, 4, 7, 3, 6))))
    return part.reshape(*batch, n16 * 16, k64 * 64)


def pack_groups(values: jax.Array, blocks: int) -> jax.Array:
    """Lays out one value per row and group: (..., n, groups) -> (..., n/16, blocks, 16 * groups/blocks)."""
    *batch, n, groups = values.shape
    values = values.reshape(*batch, n // 16, 2, 8, blocks, groups // blocks)
    b = len(batch)
    values = jnp.transpose(values, (*range(b), *(b + i for i in (0, 3, 2, 4, 1))))
    return values.reshape(*batch, n // 16, blocks, 16 * (groups // blocks))


def unpack_groups(payload: jax.Array) -> jax.Array:
    """The inverse of `pack_groups`: (..., n/16, blocks, 16 * g) -> (..., n, blocks * g)."""
    *batch, n16, blocks, width = payload.shape
    values = payload.reshape(*batch, n16, blocks, 8, width // 16, 2)
    b = len(batch)
    values = jnp.transpose(values, (*range(b), *(b + i for i in (0, 4, 2, 1, 3))))
    return values.reshape(*batch, n16 * 16, blocks * (width // 16))


def take_row_codes(words: jax.Array, rows: jax.Array, bits: int, shift: int, k_block: int) -> jax.Array:
    """Codes of single rows of n, without touching the others.

    Args:
      words: uint32 (n/16, k/k_block, words), a plane as `pack_codes` makes it.
      rows: integer (...,), in [0, n).

    Returns:
      uint8 (..., k).
    """
    n16, blocks, _ = words.shape
    fields = 8 // bits
    lane_words = 8 // fields
    vector = min(lane_words, 4)
    k64 = blocks * (k_block // 64)
    words = words.reshape(n16, k64, lane_words // vector, 8, 4 * vector)
    picked = words[rows // 16, :, :, rows % 8]  # (..., k64, half, t * vector)
    picked = picked.reshape(*rows.shape, k64, lane_words // vector, 4, vector)
    picked = jnp.swapaxes(picked, -3, -2)  # k64 t half vector
    part = lax.bitcast_convert_type(picked, jnp.uint8)
    shifts = jnp.arange(fields, dtype=jnp.uint8)[:, None] * jnp.uint8(bits)
    part = ((part[..., None, :] >> shifts) & ((1 << bits) - 1)) << shift
    part = part.reshape(*rows.shape, k64, 4, 4, 2, 2, 2)  # k64 t | s h | e_hi e_lo
    half = ((rows % 16) // 8).reshape(*rows.shape, 1, 1, 1, 1, 1)
    part = jnp.where(half == 0, part[..., 0, :, :], part[..., 1, :, :])  # k64 t s e_hi e_lo
    b = rows.ndim
    part = jnp.transpose(part, (*range(b), *(b + i for i in (0, 2, 4, 1, 3))))
    return part.reshape(*rows.shape, k64 * 64)


def take_row_groups(payload: jax.Array, rows: jax.Array) -> jax.Array:
    """Per-group values of single rows: (n/16, blocks, 16 * g) -> (..., blocks * g)."""
    n16, blocks, width = payload.shape
    values = payload.reshape(n16, blocks, 8, width // 16, 2)
    picked = values[rows // 16, :, rows % 8, :, (rows % 16) // 8]
    return picked.reshape(*rows.shape, blocks * (width // 16))
