"""The variables that hold a packed weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_qgemm.formats import QTensor


class QWeight(nnx.Variable):
    """One array of a packed weight: a plane of unsigned integers, or a permutation or scale beside them.

    Not an `nnx.Param`, so optimizers and `nnx.grad` leave it alone. `nnx.state(model, QWeight)` selects the
    packed weights of a model.
    """


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def to_variables(w: QTensor, metadata: Mapping[str, Any]) -> QTensor:
    """The same QTensor with every array in a `QWeight`; leaves that are variables already are shared.

    Args:
      w: of arrays or variables, (*batch, k, n).
      metadata: of a dense (*batch, k, n) kernel. Its `out_sharding` is brought to the axes of each array; the
        rest is copied, but for hooks on the value.

    Raises:
      TypeError: w is not a QTensor, or `out_sharding` is not a tuple, a PartitionSpec or a NamedSharding.
    """
    if not isinstance(w, QTensor):
        raise TypeError(f"w must be a QTensor (see jax_qgemm.quantize and jax_qgemm.io), got {type(w).__name__}")
    common = {key: value for key, value in metadata.items() if not key.startswith("on_")}
    sharding = common.pop("out_sharding", None)

    def variable(array: Any, axes: Callable[[Any, Any], Sequence[Any]]) -> Any:
        """array in a QWeight; `axes` gives the names of its axes behind the batch, from those of k and n."""
        if array is None or _is_variable(array):
            return array
        if not sharding:
            return QWeight(array, **common)
        spec = map_spec(sharding, w.ndim, lambda names: (*names[:-2], *axes(*names[-2:])))
        return QWeight(array, out_sharding=spec, **common)

    def plane(array: Any) -> Any:
        # (*batch, n/16, k/k_block, payload); with one value per channel, the k axis is 1.
        return variable(array, lambda k, n: (n, k if array.shape[-2] > 1 else None, None))

    return QTensor(
        tuple(plane(array) for array in w.planes),
        w.format,
        w.padding,
        # Its values are positions in the whole of k.
        permutation=variable(w.permutation, lambda k, n: (None,)),
        input_scale=variable(w.input_scale, lambda k, n: (k,)),
        global_scale=variable(w.global_scale, lambda k, n: ()),
    )


def to_arrays(w: QTensor) -> QTensor:
    """The QTensor of arrays that `to_variables` took."""
    return jax.tree.map(lambda variable: variable.get_value(), w, is_leaf=_is_variable)


def map_spec(sharding: Any, ndim: int, axes: Callable[[tuple[Any, ...]], Sequence[Any]]) -> Any:
    """The sharding whose names are `axes` of the ndim names of the given one, of the same type."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, map_spec(sharding.spec, ndim, axes))
    if not isinstance(sharding, (tuple, PartitionSpec)):
        raise TypeError(
            f"out_sharding must be a tuple, a PartitionSpec or a NamedSharding, got {type(sharding).__name__}"
        )
    names = axes((*sharding, *(None,) * (ndim - len(sharding))))
    return PartitionSpec(*names) if isinstance(sharding, PartitionSpec) else tuple(names)
