"""The weights of a batched product, as operands: planes side by side, or those of a stack and experts behind them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def split(weights: Any, has_experts: bool) -> tuple[Any, Any]:
    """The planes, and the experts or None."""
    return (weights[:-1], weights[-1]) if has_experts else (weights, None)


def select(planes: Any, experts: Any) -> Any:
    """The planes of each entry of the batch, copied if there are experts."""
    if experts is None:
        return planes
    return tuple(jnp.take(plane, experts, axis=0, mode="clip") for plane in planes)


def to_front(array: Any, dim: int | None, size: int) -> Any:
    """An operand with its mapped axis first, repeated if it is not mapped."""
    return jnp.broadcast_to(array, (size, *array.shape)) if dim is None else jnp.moveaxis(array, dim, 0)


def map_weights(weights: Any, dims: Any, size: int, has_experts: bool) -> list[Any]:
    """The weights of a batch with one more axis, of `size`, which comes first.

    Mapped stacks become one, in place: entry i of the new axis has its own part of it.
    """
    planes, experts = split(weights, has_experts)
    plane_dims, experts_dim = split(dims, has_experts)
    if experts is not None and all(d is None for d in plane_dims):
        return [*planes, to_front(experts, experts_dim, size)]
    planes = [to_front(plane, d, size) for plane, d in zip(planes, plane_dims, strict=True)]
    if experts is None:
        return planes
    count = planes[0].shape[1]
    experts = jnp.clip(to_front(experts, experts_dim, size), 0, count - 1)
    first = count * jnp.arange(size, dtype=jnp.int32)
    experts = experts + first.reshape(size, *(1,) * (experts.ndim - 1))
    return [*(plane.reshape(size * count, *plane.shape[2:]) for plane in planes), experts]
