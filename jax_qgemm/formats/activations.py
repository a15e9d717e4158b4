"""Activations quantized to 8 bits, for integer products.

What is said of ggml is how its quantize_row_q8_1_ref (ggml-quants.c) and quantize_q8_1
(ggml-cuda/quantize.cu) do.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_qgemm.formats.bits import as_u16, flat, in_blocks, low_bytes
from jax_qgemm.formats.format import exact_divide, f32_to_f16, rounded
from jax_qgemm.formats.ggml_legacy import absmax_int8, round_away

BLOCK = 32
BLOCK_BYTES = 36
_LARGEST = 127 * 65504.0  # its scale is the largest finite float16
Convention = Literal["cpu", "cuda"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QActivations:
    """Quantized activations of logical shape (..., k):

        x ~ scale * code,    and in every group    sum(x) ~ scale * sum

    A pytree; its leaves are the three arrays, its format is static.

    Attributes:
      codes: int8 (..., k).
      scales: float16 (..., k / 32).
      sums: int16 (..., k / 32), sum of the codes of each group, for products with weights that have minimums.
      format: "q8_1".
    """

    codes: jax.Array
    scales: jax.Array
    sums: jax.Array
    format: str = dataclasses.field(default="q8_1", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """scale * code (..., k), exact in float32, rounded once to `dtype`."""
        grouped = in_blocks(self.codes, BLOCK).astype(jnp.float32)
        return flat(grouped * self.scales.astype(jnp.float32)[..., None]).astype(dtype)


def quantize_activations(x: Any, format: str = "q8_1") -> QActivations:
    """Quantizes activations in groups of 32 along their last axis.

    d = max|x| / 127 in float32, code = x * (1 / d) rounded to nearest, halves away from zero; d is then
    rounded to float16. Values beyond +-127 * 65504 (8.3e6), whose d would overflow float16, are first clamped
    to that: finite x never gives Inf or NaN. A group with an Inf or a NaN decodes to NaN.

    Args:
      x: float16, bfloat16 or float32 (..., k), k a multiple of 32.
      format: "q8_1".

    Raises:
      TypeError: x is not a float array.
      ValueError: an unknown format, or k not a positive multiple of 32.
    """
    if format != "q8_1":
        raise ValueError(f"unknown activation format {format!r}; known formats: q8_1")
    codes, d = absmax_int8(_checked_groups(x))
    return QActivations(flat(codes), rounded(d, jnp.float16), _sums(codes))


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
    groups = _checked_groups(x)
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
    return QActivations(flat(codes), scales, _sums(codes))


def _sums(codes: jax.Array) -> jax.Array:
    return jnp.sum(codes, axis=-1, dtype=jnp.int16)


def _checked_groups(x: Any) -> jax.Array:
    """float32 (..., k / 32, 32), clamped to what float16 scales can express; infinities stay."""
    if not hasattr(x, "dtype") or x.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        got = getattr(x, "dtype", None) or type(x).__name__
        raise TypeError(f"x must be a float16, bfloat16 or float32 array, got {got}")
    if x.ndim < 1 or x.shape[-1] == 0 or x.shape[-1] % BLOCK:
        raise ValueError(f"x must have shape (..., k) with k a positive multiple of {BLOCK}, got {tuple(x.shape)}")
    x = jnp.asarray(x, jnp.float32)
    return in_blocks(jnp.where(jnp.isinf(x), x, jnp.clip(x, -_LARGEST, _LARGEST)), BLOCK)
