"""Quantizers for the formats that gguf-py can't quantize: searches for the scales of least squared error.

`fit_scales` and `fit_scales_and_minimums` go three steps: each group alone finds its best scale (and minimum)
among candidates, refitted by least squares; the super-block takes the float16 scale that spans them; then
every group takes the best of the integers next to its sub-scale, and the float16 scales are refitted to that.
Errors are those of the values that decoding will give.

Only the best candidate is kept, and blocks are taken a part at a time, so that memory stays within a few
copies of the weight. Every function below works on one block and is mapped over all.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_qgemm.formats.bits import in_blocks
from jax_qgemm.formats.format import f16_to_f32, f32_to_f16, safe_reciprocal

SUPER_BLOCK = 256
_ELEMENTS_AT_ONCE = 1 << 18  # in float32, the cache of a core

# Fractions of the range of the levels that the element of largest magnitude is mapped to.
_REACH = np.linspace(0.85, 1.2, 10)
# Fractions of the range of the values that the levels are laid over, where there is a minimum.
_SPAN = np.linspace(0.8, 1.05, 8)
_NEIGHBOURS = (-1, 0, 1)


class Levels(Protocol):
    """The qvalues of a format."""

    @property
    def bottom(self) -> int: ...

    @property
    def top(self) -> int: ...

    def nearest(self, value: jax.Array) -> jax.Array:
        """The level nearest to each float32."""
        ...

    def code(self, level: jax.Array) -> jax.Array:
        """uint8 position of each level, counted from the bottom."""
        ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """All integers from bottom to top."""

    bottom: int
    top: int

    def nearest(self, value: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(value), self.bottom, self.top)

    def code(self, level: jax.Array) -> jax.Array:
        return (level - self.bottom).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Table:
    """Some integers, in increasing order."""

    levels: tuple[int, ...]

    @property
    def bottom(self) -> int:
        return self.levels[0]

    @property
    def top(self) -> int:
        return self.levels[-1]

    def nearest(self, value: jax.Array) -> jax.Array:
        nearest = jnp.full_like(value, self.bottom)
        for low, high in itertools.pairwise(self.levels):
            nearest = jnp.where(value > (low + high) / 2, jnp.float32(high), nearest)
        return nearest

    def code(self, level: jax.Array) -> jax.Array:
        code = jnp.zeros(level.shape, jnp.uint8)
        for below in self.levels[:-1]:
            code = code + (level > below).astype(jnp.uint8)
        return code


Fit = dict[str, jax.Array]
"""A quantized weight, by the names of `Fields`: uint8 codes (..., k), float16 bits of scales and minimums
(..., k / block), int32 sub-scales and sub-minimums (..., k / group)."""


def fit_block_scale(w: jax.Array, block: int, levels: Levels) -> tuple[Fit, jax.Array]:
    """w ~ scale * level, with one float16 scale per block.

    Args:
      w: float32 (..., k).

    Returns:
      The fit, and a scalar bool: whether a scale left the range of float16 and was clamped.
    """

    def fit(x: jax.Array) -> tuple[Fit, jax.Array]:
        x, unit = _normalize(x)
        ideal = _group_scale(x, levels)
        bits, scale = _as_f16(ideal, unit)
        codes = levels.code(levels.nearest(x * safe_reciprocal(scale)))
        return {"codes": codes, "scales": bits}, _too_large(ideal, unit)

    return map_blocks(fit, w, block)


def fit_scales(w: jax.Array, group: int, levels: Levels, sub_bottom: int, sub_top: int) -> tuple[Fit, jax.Array]:
    """w ~ scale * sub_scale * level, with one float16 scale per super-block and per group one sub-scale in
    [sub_bottom, sub_top], sub_bottom < 0; see `fit_block_scale`."""

    def fit(x: jax.Array) -> tuple[Fit, jax.Array]:
        x, unit = _normalize(in_blocks(x, group))
        ideal = _group_scale(x, levels)
        largest = ideal[jnp.argmax(jnp.abs(ideal))]

        def quantized(scale: jax.Array) -> jax.Array:
            return levels.nearest(x * safe_reciprocal(scale)[:, None])

        def errors(scale: jax.Array) -> jax.Array:
            return jnp.sum((quantized(scale) * scale[:, None] - x) ** 2, axis=-1)

        def nearest_sub(d: jax.Array) -> jax.Array:
            return jnp.clip(jnp.round(ideal * safe_reciprocal(d)), sub_bottom, sub_top)

        def spanning(sub: jax.Array) -> tuple[jax.Array, tuple[jax.Array]]:
            d = _as_f16(largest / sub, unit)[1]
            return jnp.sum(errors(nearest_sub(d) * d)), (d,)

        (d,) = best(spanning, np.arange(sub_bottom, sub_bottom + 4), (jnp.float32(0),))
        start = nearest_sub(d)

        def neighbour(step: jax.Array) -> tuple[jax.Array, tuple[jax.Array]]:
            sub = jnp.clip(start + step, sub_bottom, sub_top)
            return errors(sub * d), (sub,)

        (sub,) = best(neighbour, _NEIGHBOURS, (start,))
        basis = quantized(sub * d) * sub[:, None]
        refitted = _as_f16(jnp.sum(basis * x) * safe_reciprocal(jnp.sum(basis * basis)), unit)[1]
        better = jnp.sum(errors(sub * refitted)) < jnp.sum(errors(sub * d))
        d = jnp.where(better, refitted, d)
        return {
            "codes": levels.code(quantized(sub * d)).reshape(-1),
            "sub_scales": sub.astype(jnp.int32),
            "scales": _as_f16(d, unit)[0],
        }, _too_large(largest / sub_bottom, unit)

    return map_blocks(fit, w, SUPER_BLOCK)


def fit_scales_and_minimums(w: jax.Array, group: int, top: int, sub_top: int) -> tuple[Fit, jax.Array]:
    """w ~ scale * sub_scale * code - minimum * sub_minimum, with one float16 scale and minimum per
    super-block and per group two integers in [0, sub_top]; codes are in [0, top]. See `fit_block_scale`."""

    def fit(x: jax.Array) -> tuple[Fit, jax.Array]:
        x, unit = _normalize(in_blocks(x, group))

        def quantized(scale: jax.Array, minimum: jax.Array) -> jax.Array:
            return jnp.clip(jnp.round((x + minimum[:, None]) * safe_reciprocal(scale)[:, None]), 0, top)

        def errors(scale: jax.Array, minimum: jax.Array) -> jax.Array:
            value = quantized(scale, minimum) * scale[:, None] - minimum[:, None]
            return jnp.sum((value - x) ** 2, axis=-1)

        def neighbour(sub: jax.Array, sub_min: jax.Array, d: jax.Array, dmin: jax.Array) -> Any:
            sub, sub_min = jnp.clip(sub, 0, sub_top), jnp.clip(sub_min, 0, sub_top)
            return errors(sub * d, sub_min * dmin), (sub, sub_min)

        low, high = jnp.minimum(jnp.min(x, axis=-1), 0), jnp.max(x, axis=-1)
        middle, half = (low + high) * 0.5, (high - low) * 0.5

        def laid_over(span: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            scale, minimum = half * span * (2 / top), jnp.maximum(half * span - middle, 0)
            for _ in range(2):
                scale, minimum = _fit_line(quantized(scale, minimum), x)
            return errors(scale, minimum), (scale, minimum)

        zero = jnp.zeros_like(low)
        scale, minimum = best(laid_over, _SPAN, (zero, zero))
        ideal_d, ideal_dmin = jnp.max(scale) / sub_top, jnp.max(minimum) / sub_top
        d, dmin = _as_f16(ideal_d, unit)[1], _as_f16(ideal_dmin, unit)[1]
        sub = jnp.clip(jnp.round(scale * safe_reciprocal(d)), 0, sub_top)
        sub_min = jnp.clip(jnp.round(minimum * safe_reciprocal(dmin)), 0, sub_top)
        for _ in range(2):
            sub, sub_min = best(
                lambda step, a=sub, b=sub_min, d=d, dmin=dmin: neighbour(a + step[0], b + step[1], d, dmin),
                [(i, j) for i in _NEIGHBOURS for j in _NEIGHBOURS],
                (sub, sub_min),
            )
            basis = quantized(sub * d, sub_min * dmin) * sub[:, None], -sub_min[:, None]
            new_d, new_dmin = (_as_f16(v, unit)[1] for v in _refit_pair(*basis, x, (d, dmin)))
            now, after = errors(sub * d, sub_min * dmin), errors(sub * new_d, sub_min * new_dmin)
            better = jnp.sum(after) < jnp.sum(now)
            d, dmin = jnp.where(better, new_d, d), jnp.where(better, new_dmin, dmin)
        return {
            "codes": quantized(sub * d, sub_min * dmin).astype(jnp.uint8).reshape(-1),
            "sub_scales": sub.astype(jnp.int32),
            "sub_minimums": sub_min.astype(jnp.int32),
            "scales": _as_f16(d, unit)[0],
            "minimums": _as_f16(dmin, unit)[0],
        }, _too_large(ideal_d, unit) | _too_large(ideal_dmin, unit)

    return map_blocks(fit, w, SUPER_BLOCK)


def best(
    trial: Callable[[jax.Array], tuple[jax.Array, tuple[jax.Array, ...]]],
    candidates: Any,
    initial: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """What the candidate of least error found, element by element; the first of equals.

    Args:
      trial: from a candidate to its errors and what it found, arrays of one shape.
      candidates: numbers, or rows of numbers.
      initial: what to return where no error is finite.
    """
    candidates = jnp.asarray(candidates, jnp.float32)

    def step(i: jax.Array, kept: tuple[jax.Array, tuple[jax.Array, ...]]) -> Any:
        error, found = trial(candidates[i])
        better = error < kept[0]
        merged = tuple(jnp.where(better, new, old) for new, old in zip(found, kept[1], strict=True))
        return jnp.where(better, error, kept[0]), merged

    infinite = jnp.full(initial[0].shape, jnp.inf, jnp.float32)
    return lax.fori_loop(0, len(candidates), step, (infinite, initial))[1]


def map_blocks(fit: Callable[[jax.Array], tuple[Fit, jax.Array]], w: jax.Array, block: int) -> tuple[Fit, jax.Array]:
    """`fit` over every block of w (..., k): its arrays joined along k, and whether any block overflowed."""
    blocks = w.reshape(-1, block)
    if not len(blocks):
        found, overflow = jax.eval_shape(jax.vmap(fit), blocks)
        found, overflow = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (found, overflow))
    else:
        found, overflow = lax.map(fit, blocks, batch_size=min(len(blocks), _ELEMENTS_AT_ONCE // block))
    count = w.shape[-1] // block
    joined = jax.tree.map(lambda a: a.reshape(*w.shape[:-1], count * math.prod(a.shape[1:])), found)
    return joined, jnp.any(overflow)


def _normalize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x / unit and unit, a power of two that brings the largest magnitude to [1, 2), so that no square
    overflows. (To less, if that is below 2**-40, far under the smallest float16.)"""
    exponent = (lax.bitcast_convert_type(jnp.max(jnp.abs(x)), jnp.int32) >> 23) - 127
    exponent = jnp.clip(exponent, -40, 126)
    unit, inverse = (lax.bitcast_convert_type((127 + e) << 23, jnp.float32) for e in (exponent, -exponent))
    return x * inverse, unit


def _as_f16(scale: jax.Array, unit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bits of scale * unit in float16, clamped to its range, and what scale has become by that."""
    bits = f32_to_f16(scale * unit)[0]
    return bits, f16_to_f32(bits) / unit


def _too_large(scale: jax.Array, unit: jax.Array) -> jax.Array:
    return f32_to_f16(scale * unit)[1]


def _group_scale(x: jax.Array, levels: Levels) -> jax.Array:
    """The scale (...,) of least squared error for each group (..., size): positive or negative, since the
    levels need not be symmetric."""
    magnitude = jnp.max(jnp.abs(x), axis=-1)

    def reaching(reach: jax.Array) -> tuple[jax.Array, tuple[jax.Array]]:
        level = levels.nearest(x * (reach * safe_reciprocal(magnitude))[..., None])
        product = jnp.sum(x * level, axis=-1)
        scale = product * safe_reciprocal(jnp.sum(level * level, axis=-1))
        return -product * scale, (scale,)  # the squared error less sum(x * x)

    reach = _REACH * -levels.bottom
    return best(reaching, [*reach, *-reach], (magnitude,))[0]


def _fit_line(code: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """scale and minimum >= 0 of x ~ scale * code - minimum by least squares over the last axis."""
    mean_code, mean_x = jnp.mean(code, axis=-1), jnp.mean(x, axis=-1)
    code_code, code_x = jnp.mean(code * code, axis=-1), jnp.mean(code * x, axis=-1)
    scale = (code_x - mean_code * mean_x) * safe_reciprocal(code_code - mean_code * mean_code)
    minimum = scale * mean_code - mean_x
    scale = jnp.where(minimum < 0, code_x * safe_reciprocal(code_code), scale)
    return jnp.maximum(scale, 0), jnp.maximum(minimum, 0)


def _refit_pair(
    a: jax.Array, b: jax.Array, x: jax.Array, current: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """p and q of x ~ p * a + q * b by least squares; `current` where a and b are nearly parallel."""
    aa, ab, bb = jnp.sum(a * a), jnp.sum(a * b), jnp.sum(jnp.broadcast_to(b * b, a.shape))
    ax, bx = jnp.sum(a * x), jnp.sum(b * x)
    determinant = aa * bb - ab * ab
    solvable = determinant > 1e-6 * aa * bb
    inverse = safe_reciprocal(jnp.where(solvable, determinant, 0))
    p, q = (ax * bb - bx * ab) * inverse, (bx * aa - ax * ab) * inverse
    return jnp.where(solvable, p, current[0]), jnp.where(solvable, q, current[1])
