"""nnx layers whose weights are QTensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_qgemm.flax.variables import to_arrays, to_variables
from jax_qgemm.formats import QTensor
from jax_qgemm.ops import matmul, take
from jax_qgemm.ops.integer_matmul import check_x_format
from jax_qgemm.ops.integer_primitive import check_format

_EMPTY: Mapping[Any, Any] = MappingProxyType({})


def product(
    x: jax.Array,
    w: QTensor,
    bias: jax.Array | None = None,
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    x_format: str | None = None,
) -> jax.Array:
    """x @ w + bias in the types in which Flax's layers compute x @ kernel + bias.

    Args:
      dtype: of the computation; None promotes x, bias and a kernel of `param_dtype`.
      param_dtype: type of the dense kernel, or None if it has no part in the promotion.
      precision: see `matmul`.
      preferred_element_type: type of x @ w, if other than `dtype`.
      x_format: None, or how x is quantized, see `matmul`; differentiated as if it were not.
    """
    if dtype is None:
        dtype = jnp.result_type(x, *(a for a in (param_dtype, bias) if a is not None))
        if not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(jnp.float32, dtype)
    out_dtype = dtype if preferred_element_type is None else preferred_element_type
    if bias is not None:
        bias = bias.astype(dtype)
        out_dtype = jnp.promote_types(out_dtype, dtype)
    return matmul(
        x.astype(dtype), w, x_format=x_format, straight_through=x_format is not None, bias=bias, out_dtype=out_dtype,
        precision=precision,
    )  # fmt: skip


def check_quantized_x(x_format: Any, w: QTensor) -> None:
    """Raises ValueError unless x_format is None, or x can be quantized so for a product with w."""
    check_x_format(x_format)
    if x_format is not None:
        check_format(x_format, w.format, w.shape[-2])


class QLayer(nnx.Module):
    """What the layers have in common: one packed weight."""

    def __init__(self, w: QTensor, metadata: Mapping[str, Any]):
        self.packed = nnx.data(to_variables(w, metadata))

    @property
    def w(self) -> QTensor:
        """The weight (*batch, k, n)."""
        return to_arrays(self.packed)


class QProduct(QLayer):
    """What the layers that stand for a product have in common: the types in which Flax computes it, and how x is
    quantized."""

    def __init__(
        self,
        w: QTensor,
        metadata: Mapping[str, Any],
        dtype: Any,
        param_dtype: Any,
        precision: Any,
        preferred_element_type: Any,
        x_format: str | None,
    ):
        super().__init__(w, metadata)
        check_quantized_x(x_format, w)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.preferred_element_type = preferred_element_type
        self.x_format = x_format

    def product(self, x: jax.Array, w: QTensor, bias: jax.Array | None) -> jax.Array:
        return product(
            x,
            w,
            bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            x_format=self.x_format,
        )


class QLinear(QProduct):
    """``x @ w + bias`` over the last axis of x, as `nnx.Linear`, with a quantized weight.

    Attributes:
      w: the QTensor (k, n); stacked, (layers, k, n), where the layer is scanned or mapped over.
      packed: the same QTensor, its arrays in `QWeight` variables.
      bias: nnx.Param (n,), or None.
    """

    def __init__(
        self,
        w: QTensor,
        bias: Any = None,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        precision: Any = None,
        preferred_element_type: Any = None,
        x_format: str | None = None,
        kernel_metadata: Mapping[str, Any] = _EMPTY,
    ):
        """
        Args:
          w: (k, n). Given the `packed` of another layer, this one shares its variables.
          bias: float (n,), an array or a variable; trainable.
          dtype: type of the computation and of the result; None promotes x, bias and `param_dtype`, as Flax
            does.
          param_dtype: type of the dense kernel that w stands for; None if it has no part in the promotion.
          precision: see `jax_qgemm.matmul`.
          preferred_element_type: type of the product before the bias, if other than that of the computation.
          x_format: None, or how x is quantized, per token: "int8" or "fp8", see `jax_qgemm.matmul`. The layer is
            differentiated as if x were not quantized (`straight_through`).
          kernel_metadata: of a dense kernel (k, n), such as `out_sharding`.

        Raises:
          TypeError: w is not a QTensor.
          ValueError: a bias of another shape; an unknown x_format, or one that w can't be multiplied with.
        """
        super().__init__(w, kernel_metadata, dtype, param_dtype, precision, preferred_element_type, x_format)
        *batch, _, n = w.shape
        self.bias = _to_param(bias, (*batch, n))

    @property
    def in_features(self) -> int:
        return self.packed.shape[-2]

    @property
    def out_features(self) -> int:
        return self.packed.shape[-1]

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """(..., k) -> (..., n). Raises as `jax_qgemm.matmul` does, and ValueError for an `out_sharding`."""
        _check_out_sharding(out_sharding)
        return self.product(x, self.w, None if self.bias is None else self.bias.get_value())


class QLinearGeneral(QProduct):
    """A product over several axes of x, as `nnx.LinearGeneral`, with a quantized weight.

    The weight is the dense kernel (*batch, *in_features, *out_features) with each group flattened: k and n
    are the products of `in_features` and of `out_features`.

    Attributes:
      w: the QTensor (*batch, k, n).
      packed: the same QTensor, its arrays in `QWeight` variables.
      bias: nnx.Param (*batch, *out_features), or None.
    """

    def __init__(
        self,
        w: QTensor,
        bias: Any = None,
        *,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        axis: int | Sequence[int] = -1,
        batch_axis: Mapping[int, int] = _EMPTY,
        dtype: Any = None,
        param_dtype: Any = None,
        precision: Any = None,
        preferred_element_type: Any = None,
        x_format: str | None = None,
        kernel_metadata: Mapping[str, Any] = _EMPTY,
    ):
        """
        Args:
          w: (*batch, k, n). Given the `packed` of another layer, this one shares its variables.
          bias: float (*batch, *out_features), an array or a variable; trainable.
          in_features: sizes of the contracted axes, in the order in which x has them.
          out_features: sizes of the axes that the result ends in.
          axis: the contracted axes of x.
          batch_axis: {0: size, ...}, leading axes of x that have a weight for each index: the batch axes of
            w.
          dtype, param_dtype, precision, preferred_element_type, x_format: see `QLinear`.
          kernel_metadata: see `QLinear`; of a dense kernel (*batch, k, n).

        Raises:
          TypeError: w is not a QTensor.
          ValueError: w or bias does not have the shape that the other arguments say; x_format as in `QLinear`.
        """
        super().__init__(w, kernel_metadata, dtype, param_dtype, precision, preferred_element_type, x_format)
        self.in_features = _as_tuple(in_features)
        self.out_features = _as_tuple(out_features)
        self.axis = _as_tuple(axis)
        self.batch_sizes = tuple(size for _, size in sorted(batch_axis.items()))
        expected = (*self.batch_sizes, math.prod(self.in_features), math.prod(self.out_features))
        # Axes before these are the layers of a stack.
        if w.shape[-len(expected) :] != expected or len(self.axis) != len(self.in_features):
            raise ValueError(
                f"w has shape {w.shape}, but in_features {self.in_features} on axis {self.axis}, "
                f"out_features {self.out_features} and batch_axis {dict(batch_axis)} ask for {expected}"
            )
        self.bias = _to_param(bias, (*w.shape[:-2], *self.out_features))

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Contracts `axis` of x; the other axes keep their order, and `out_features` follow them.

        Raises as `jax_qgemm.matmul` does, and ValueError for an `out_sharding` or an x that does not fit.
        """
        _check_out_sharding(out_sharding)
        batch_ndim = len(self.batch_sizes)
        axis = sorted(a + x.ndim if a < 0 else a for a in self.axis)
        sizes = tuple(x.shape[a] for a in axis if 0 <= a < x.ndim)
        if sizes != self.in_features or x.shape[:batch_ndim] != self.batch_sizes:
            raise ValueError(
                f"x has shape {x.shape}, expected sizes {self.in_features} on axis {self.axis}"
                + (f" and leading axes {self.batch_sizes}" if batch_ndim else "")
            )
        kept = tuple(size for a, size in enumerate(x.shape) if a not in axis)
        k, n = self.packed.shape[-2:]
        x = jnp.moveaxis(x, axis, range(-len(axis), 0)).reshape(*kept, k)
        bias = None if self.bias is None else self.bias.get_value().reshape(*self.batch_sizes, n)

        layer = self.product
        for _ in self.batch_sizes:
            layer = jax.vmap(layer)
        return layer(x, self.w, bias).reshape(*kept, *self.out_features)


class QEmbed(QLayer):
    """An embedding table, as `nnx.Embed`, with a quantized weight that also serves as a tied output
    projection.

    Attributes:
      w: the QTensor (k, n), n embeddings of k features.
      packed: the same QTensor, its arrays in `QWeight` variables.
    """

    def __init__(self, w: QTensor, *, dtype: Any = None, kernel_metadata: Mapping[str, Any] = _EMPTY):
        """
        Args:
          w: (k, n) = (features, num_embeddings). Given the `packed` of another layer, this one shares its
            variables.
          dtype: type of the embeddings and of `attend`; None is float32, and for `attend` the type of x.
          kernel_metadata: see `QLinear`.

        Raises:
          TypeError: w is not a QTensor.
        """
        super().__init__(w, kernel_metadata)
        self.dtype = dtype

    @property
    def features(self) -> int:
        return self.packed.shape[-2]

    @property
    def num_embeddings(self) -> int:
        return self.packed.shape[-1]

    def __call__(self, indices: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Integers (...,) -> (..., k); NaN where an index is out of range.

        Raises as `jax_qgemm.take` does, and ValueError for an `out_sharding`.
        """
        _check_out_sharding(out_sharding)
        if self.num_embeddings == 1:
            indices = jnp.zeros_like(indices)  # nnx.Embed gives its only row for any index
        return take(self.w, indices, dtype=jnp.float32 if self.dtype is None else self.dtype)

    def attend(self, x: jax.Array, out_sharding: Any = None, *, preferred_element_type: Any = None) -> jax.Array:
        """The products with every embedding, (..., k) -> (..., n), of type `preferred_element_type` if given.

        Raises as `jax_qgemm.matmul` does, and ValueError for an `out_sharding`.
        """
        _check_out_sharding(out_sharding)
        return product(x, self.w, dtype=self.dtype, preferred_element_type=preferred_element_type)


def _as_tuple(sizes: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(sizes) if isinstance(sizes, Sequence) else (sizes,)


def _to_param(bias: Any, shape: tuple[int, ...]) -> Any:
    if bias is None:
        return nnx.data(None)
    if tuple(bias.shape) != shape:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {shape}")
    return bias if isinstance(bias, nnx.Variable) else nnx.Param(bias)


def _check_out_sharding(out_sharding: Any) -> None:
    if out_sharding is not None:
        raise ValueError(
            f"out_sharding must be None for a quantized layer, got {out_sharding}; constrain the result with "
            "jax.lax.with_sharding_constraint or jax.sharding.reshard"
        )
