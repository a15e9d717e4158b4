"""int2, int3, int4 and int8 with one scale per group or per channel: the family of GPTQ, AWQ and compressed-tensors.

    w = scale * (qvalue - zero_point)

Symmetric formats have no zero_point plane; their qvalues are signed, in [-2**(bits-1), 2**(bits-1) - 1]. Asymmetric
ones hold unsigned qvalues and zero points, both in [0, 2**bits - 1] (int8 shifts both by -128 in storage, so that its
codes are int8 in every case).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jax_qgemm.formats.format import CodePlane, Fields, Format, GroupPlane, rounded

GROUP_SIZES = (16, 32, 64, 128, 256)
SCALE_DTYPES = ("float16", "bfloat16", "float32")
_CODE_PLANES = {
    2: (CodePlane("codes", 2),),
    3: (CodePlane("codes", 2), CodePlane("high_bits", 1, shift=2)),
    4: (CodePlane("codes", 4),),
    8: (CodePlane("codes", 8),),
}


@dataclasses.dataclass(frozen=True)
class IntFormat(Format):
    """See the module's docstring.

    Attributes:
      bits: 2, 3, 4 or 8.
      symmetric: whether there is no zero point.
      scale_dtype: "float16", "bfloat16" or "float32".
    """

    bits: int
    symmetric: bool
    scale_dtype: str

    @property
    def group_size(self) -> int:
        """As users write it: -1 is per channel."""
        return self.group or -1

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.name}(group_size={self.group_size}, {kind}, {self.scale_dtype} scales)"

    @property
    def scales_fit_float16(self) -> bool:
        return self.scale_dtype == "float16"

    @property
    def _code_zero(self) -> int:
        # Stored code of qvalue 0 for signed qvalues; int8 is stored in two's complement.
        return 1 << (self.bits - 1) if self.symmetric and self.bits < 8 else 0

    def qvalue(self, codes: jax.Array) -> jax.Array:
        if self.bits == 8:
            return lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.int32)
        return codes.astype(jnp.int32) - self._code_zero

    def scale(self, fields: Fields) -> jax.Array:
        return lax.bitcast_convert_type(fields["scales"], jnp.dtype(self.scale_dtype)).astype(jnp.float32)

    def zero_point(self, fields: Fields) -> jax.Array | None:
        if self.symmetric:
            return None
        return fields["zero_points"].astype(jnp.int32) - (128 if self.bits == 8 else 0)

    def encode(self, w: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """Rounds to nearest, ties to even, over the stored scale.

        Symmetric: scale = max|w| / (2**(bits-1) - 0.5), qvalues clipped (the convention of compressed-tensors).
        Asymmetric: scale = (max(w, 0) - min(w, 0)) / (2**bits - 1), zero_point = round(-min(w, 0) / scale).
        """
        *batch, n, k = w.shape
        grouped = w.reshape(*batch, n, -1, self.group or k) if k else w.reshape(*batch, n, 1, 0)
        levels = 1 << self.bits
        low = jnp.min(grouped, axis=-1, initial=0.0)
        if self.symmetric:
            scale = jnp.max(jnp.abs(grouped), axis=-1, initial=0.0) / (levels // 2 - 0.5)
        else:
            # Halves first: the difference of two finite float32 values may not be finite.
            scale = (jnp.max(grouped, axis=-1, initial=0.0) * 0.5 - low * 0.5) / ((levels - 1) * 0.5)
        limit = float(jnp.finfo(self.scale_dtype).max)
        if self.scale_dtype != "float16":
            limit /= levels // 2 if self.symmetric else levels
        overflow = jnp.any(scale > limit)
        scale = jnp.minimum(scale, limit)
        stored = scale if self.scale_dtype == "float32" else rounded(scale, self.scale_dtype)
        scale = stored.astype(jnp.float32)
        divisor = jnp.where(scale == 0, 1.0, scale)
        zero = jnp.zeros_like(scale) if self.symmetric else jnp.clip(jnp.round(-low / divisor), 0, levels - 1)
        bottom = -(levels // 2) if self.symmetric else 0
        qvalue = jnp.clip(jnp.round(grouped / divisor[..., None]) + zero[..., None], bottom, bottom + levels - 1)
        offset = self._code_zero if self.symmetric or self.bits < 8 else -128
        codes = (qvalue.astype(jnp.int32) + offset).astype(jnp.uint8).reshape(w.shape)
        width = jnp.uint32 if self.scale_dtype == "float32" else jnp.uint16
        fields = {"codes": codes, "scales": lax.bitcast_convert_type(stored, width)}
        if not self.symmetric:
            fields["zero_points"] = zero.astype(jnp.uint8)
        return fields, overflow


def _int_format(bits: int, group_size: int, symmetric: bool, scale_dtype: Any) -> IntFormat:
    if group_size != -1 and group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES} or -1 (per channel), got {group_size!r}")
    dtype = jnp.dtype(scale_dtype).name
    if dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype must be one of {SCALE_DTYPES}, got {scale_dtype!r}")
    group = 0 if group_size == -1 else group_size
    planes = (*_CODE_PLANES[bits], GroupPlane("scales", "uint32" if dtype == "float32" else "uint16", group))
    if not symmetric:
        planes = (*planes, GroupPlane("zero_points", "uint8", group))
    return IntFormat(
        name=f"int{bits}",
        block=group or 1,
        group=group,
        planes=planes,
        bits=bits,
        symmetric=bool(symmetric),
        scale_dtype=dtype,
    )


ScaleDtype = Literal["float16", "bfloat16", "float32"]


def int2(group_size: int = 128, *, symmetric: bool = True, scale_dtype: ScaleDtype = "float16") -> IntFormat:
    """2-bit integers; see `int4`."""
    return _int_format(2, group_size, symmetric, scale_dtype)


def int3(group_size: int = 128, *, symmetric: bool = True, scale_dtype: ScaleDtype = "float16") -> IntFormat:
    """3-bit integers; see `int4`."""
    return _int_format(3, group_size, symmetric, scale_dtype)


def int4(group_size: int = 128, *, symmetric: bool = True, scale_dtype: ScaleDtype = "float16") -> IntFormat:
    """4-bit integers, w = scale * (qvalue - zero_point).

    Args:
      group_size: elements of k that share a scale: 16, 32, 64, 128, 256, or -1 for one scale per output channel.
      symmetric: signed qvalues without zero points, else unsigned ones with an integer zero point per group.
      scale_dtype: "float16", "bfloat16" or "float32".

    Raises:
      ValueError: a group size or scale type other than these.
    """
    return _int_format(4, group_size, symmetric, scale_dtype)


def int8(group_size: int = 128, *, symmetric: bool = True, scale_dtype: ScaleDtype = "float16") -> IntFormat:
    """8-bit integers; see `int4`."""
    return _int_format(8, group_size, symmetric, scale_dtype)
