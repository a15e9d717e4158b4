"""4-bit floats (e2m1) with 8-bit float scales: mxfp4 and nvfp4.

Block layouts are those of ggml-common.h (block_mxfp4, block_nvfp4). qvalues are twice the e2m1 value, so that
they are integers, and the scales are half of what the OCP and NVIDIA specifications call the scale.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jax_qgemm.formats import k_quants_search as search
from jax_qgemm.formats.bits import flat, in_blocks, join_fields, split_fields
from jax_qgemm.formats.format import CodePlane, Fields, GGUFFormat, GroupPlane, safe_reciprocal

MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)  # codes 0-7; code 8 is 0 again, 9-15 are the negatives of 1-7
TABLE = (*MAGNITUDES, *(-m for m in MAGNITUDES))
_LEVELS = search.Table(tuple(sorted({*TABLE})))
_MIDPOINTS_X2 = tuple(a + b for a, b in itertools.pairwise(MAGNITUDES))


def _power_of_two_multiple(integer: jax.Array, exponent: jax.Array) -> jax.Array:
    """Bits of the float32 integer * 2**exponent, for integers 1-20 and exponents from -149 on.

    XLA flushes subnormals on the CPU, so that they are made and compared as integers.
    """
    bits = lax.bitcast_convert_type(integer.astype(jnp.float32), jnp.int32)
    biased = (bits >> 23) + exponent
    subnormal = integer << jnp.clip(exponent + 149, 0, 31)
    infinity = 0x7F800000
    return jnp.where(biased < 1, subnormal, jnp.where(biased > 254, infinity, bits + (exponent << 23)))


@dataclasses.dataclass(frozen=True)
class MXFP4(GGUFFormat):
    """2**(scale - 128) * table[code], in blocks of 32, scale being an e8m0 (OCP Microscaling 1.0)."""

    @property
    def scales_fit_float16(self) -> bool:
        return False

    def qvalue(self, codes: jax.Array) -> jax.Array:
        return jnp.asarray(TABLE, jnp.int32)[codes]

    def scale(self, fields: Fields) -> jax.Array:
        e = fields["scales"].astype(jnp.int32)
        return lax.bitcast_convert_type(jnp.where(e < 2, 0x00200000 << e, (e - 1) << 23), jnp.float32)

    def decode(self, fields: Fields) -> jax.Array:
        # Not a product: with scales 0 to 2 it is subnormal.
        codes = fields["codes"]
        magnitude = jnp.asarray(MAGNITUDES, jnp.int32)[in_blocks(codes, self.block) & 7]
        exponent = fields["scales"].astype(jnp.int32)[..., None] - 128
        bits = jnp.where(magnitude == 0, 0, _power_of_two_multiple(magnitude, exponent))
        sign = jnp.where(flat(bits) == 0, 0, (codes >> 3).astype(jnp.int32) << 31)
        return lax.bitcast_convert_type(flat(bits) | sign, jnp.float32)

    def encode(self, w: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """gguf-py's choice of scale and code, to the byte.

        Its scale is floor(log2(max|x|)) + 125, in a float32 that rounds up to n just below 2**n, and wraps
        around modulo 256 where max|x| is below 2**-125 (such blocks then decode to zero). Ties go to the
        smaller magnitude. Only where that float32 rounds up to 128 (max|x| > 3.40281e38) do we differ:
        gguf-py's block would decode to infinity.
        """
        blocks = in_blocks(w, self.block)
        bits = lax.bitcast_convert_type(blocks, jnp.int32)
        magnitude = bits & 0x7FFFFFFF
        top = jnp.max(magnitude, axis=-1)
        # top = significand * 2**(ceiling - 24), the significand in [2**23, 2**24).
        zeros = lax.clz(jnp.maximum(top, 1))
        normal = zeros <= 8
        significand = jnp.where(normal, (top & 0x7FFFFF) | 0x800000, top << jnp.maximum(zeros - 8, 0))
        ceiling = jnp.where(normal, (top >> 23) - 126, -117 - zeros)
        # log2(top) to first order below 2**ceiling: exact enough where the float32 could round up.
        missing = ((1 << 24) - significand).astype(jnp.float32)
        log2 = ceiling.astype(jnp.float32) - missing * jnp.float32(2**-24 / math.log(2))
        scale = jnp.where(top == 0, 0, (jnp.minimum(jnp.floor(log2).astype(jnp.int32), 127) + 125) & 255)
        code = jnp.zeros_like(magnitude)
        for middle in _MIDPOINTS_X2:
            threshold = _power_of_two_multiple(jnp.int32(middle), scale - 129)
            code = code + (magnitude > threshold[..., None])
        code = code | jnp.where((bits < 0) & (code > 0), 8, 0)
        return {"codes": flat(code.astype(jnp.uint8)), "scales": scale.astype(jnp.uint8)}, jnp.bool_(False)

    def from_bytes(self, blocks: jax.Array) -> dict[str, jax.Array]:
        return {"codes": flat(split_fields(blocks[..., 1:], 4)), "scales": blocks[..., 0]}

    def to_bytes(self, fields: Fields) -> jax.Array:
        codes = in_blocks(fields["codes"], self.block)
        return jnp.concatenate([fields["scales"][..., None], join_fields(codes, 4)], axis=-1)


_OVERFLOW = 464 * 6.0  # 464 is halfway between the largest e4m3 and what would come next, 6 the largest e2m1


def ue4m3_half(bits: jax.Array) -> jax.Array:
    """float32 half of the unsigned e4m3 in integers 0-255. As gguf-py has it, 0x7F (NaN) is zero and the
    upper bit counts only in that comparison."""
    exponent, mantissa = (bits.astype(jnp.int32) >> 3) & 15, bits.astype(jnp.int32) & 7
    normal = lax.bitcast_convert_type(((exponent + 119) << 23) | (mantissa << 20), jnp.float32)
    value = jnp.where(exponent == 0, mantissa.astype(jnp.float32) * jnp.float32(2**-10), normal)
    return jnp.where(bits == 0x7F, 0.0, value)


def _ue4m3_half_below(value: jax.Array) -> jax.Array:
    """int32 code of the largest scale up to `value`."""
    normal = (lax.bitcast_convert_type(value, jnp.int32) >> 20) - (119 << 3)
    return jnp.where(value < 2**-7, jnp.floor(value * 1024).astype(jnp.int32), normal)


@dataclasses.dataclass(frozen=True)
class NVFP4(GGUFFormat):
    """scale * table[code], in blocks of 64 with four ue4m3 scales.

    Where a checkpoint has a global scale, it is the QTensor's.
    """

    def qvalue(self, codes: jax.Array) -> jax.Array:
        return jnp.asarray(TABLE, jnp.int32)[codes]

    def scale(self, fields: Fields) -> jax.Array:
        return ue4m3_half(fields["scales"])

    def encode(self, w: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        def fit(x: jax.Array) -> tuple[search.Fit, jax.Array]:
            top = jnp.max(jnp.abs(x))
            # Larger values get the largest level of the largest scale in any case; squares must stay finite.
            x = jnp.clip(x, -_OVERFLOW, _OVERFLOW)
            start = _ue4m3_half_below(jnp.minimum(top, _OVERFLOW) / MAGNITUDES[-1])

            def candidate(step: jax.Array) -> tuple[jax.Array, tuple[jax.Array]]:
                code = jnp.clip(start + step.astype(jnp.int32), 0, 0x7E)
                scale = ue4m3_half(code)
                level = _LEVELS.nearest(x * safe_reciprocal(scale))
                return jnp.sum((level * scale - x) ** 2), (code,)

            (code,) = search.best(candidate, range(-3, 7), (start,))
            index = _LEVELS.code(_LEVELS.nearest(x * safe_reciprocal(ue4m3_half(code)))).astype(jnp.int32)
            index = jnp.where(index < 7, 15 - index, index - 7)
            return {"codes": index.astype(jnp.uint8), "scales": code.astype(jnp.uint8)}, top >= _OVERFLOW

        return search.map_blocks(fit, w, self.group)

    def from_bytes(self, blocks: jax.Array) -> dict[str, jax.Array]:
        codes = flat(split_fields(in_blocks(blocks[..., 4:], 8), 4))
        return {"codes": flat(codes), "scales": flat(blocks[..., :4])}

    def to_bytes(self, fields: Fields) -> jax.Array:
        codes = in_blocks(in_blocks(fields["codes"], self.block), self.group)
        scales = in_blocks(fields["scales"], self.block // self.group)
        return jnp.concatenate([scales, flat(join_fields(codes, 4))], axis=-1)


FORMATS = (
    MXFP4(
        "mxfp4",
        32,
        32,
        (CodePlane("codes", 4), GroupPlane("scales", "uint8", 32)),
        block_bytes=17,
        ggml_type=39,
    ),
    NVFP4(
        "nvfp4",
        64,
        16,
        (CodePlane("codes", 4), GroupPlane("scales", "uint8", 16)),
        block_bytes=36,
        ggml_type=40,
    ),
)
