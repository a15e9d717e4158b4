"""How arrays lie on several devices: what `jax.shard_map` and explicit meshes want to know of a product."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def _varying(array: Any) -> frozenset[str]:
    """The manual axes of `jax.shard_map` over which the array varies. JAX has changed the name of this."""
    aval = jax.typeof(array)
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset(kind.varying if kind is not None else getattr(aval, "vma", ()))


def varying_alike(*operands: Any) -> list[Any]:
    """The operands, but for None varying over the manual axes of `jax.shard_map` over which any of them varies.

    As JAX's own operations do it: the cast of an operand that does not vary is what sums its gradient over the axis.
    """
    axes = frozenset().union(*(_varying(a) for a in operands if a is not None))

    def cast(operand: Any) -> Any:
        missing = () if operand is None else tuple(sorted(axes - _varying(operand)))
        return lax.pcast(operand, missing, to="varying") if missing else operand

    return [cast(operand) for operand in operands]


def whole_last_axis(aval: Any) -> Any:
    """The sharding of an array that lies as this one does, its last axis whole on every device.

    On a mesh of explicit axes that is how a product lies: what k or n are split over is gathered.
    """
    sharding = aval.sharding
    return sharding.update(spec=(*sharding.spec[:-1], None))
