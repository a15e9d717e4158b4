"""QTensor: a quantized weight as a pytree of packed planes."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.core import Tracer

from jax_qgemm.formats import layout
from jax_qgemm.formats.format import Format, GGUFFormat
from jax_qgemm.formats.registry import format_from_json, format_to_json, get_format, gguf_format

_OPTIONAL = ("permutation", "input_scale", "global_scale")


@jax.tree_util.register_pytree_with_keys_class
class QTensor:
    """A weight of logical shape (*batch, k, n), quantized along k and packed for the kernels.

    Every format obeys one equation, element by element:

        w ~ scale * (qvalue - zero_point) + minimum

    qvalue is an integer decoded from the packed codes (for iq4_nl, iq4_xs, mxfp4 and nvfp4 through a table of 16
    integers); scale, zero_point and minimum are one value per group of k-elements and column. Which of them a format
    has: q4_0, q5_0, q8_0, q3_k, q6_k, iq4_nl, iq4_xs, mxfp4, nvfp4 and symmetric integers have a scale; asymmetric
    integers a scale and an integer zero_point; q4_1, q5_1, q2_k, q4_k, q5_k a scale and a float minimum. Where given,
    per-tensor and per-row factors come on top: see `dequantize`.

    A QTensor is a pytree. Its leaves are the planes, arrays of unsigned integers (so casts, optimizers and `jax.grad`
    leave them alone), with leading batch axes; the shape is derived from them and never stored. Stacking, slicing,
    `jax.tree.map`, `jax.lax.scan` over stacked layers, `jax.vmap` and the local view inside `jax.shard_map` need no
    special case. Static are the format and the padding of n to 16 and of k to the format's k-block: an axis that is
    split over devices must have none, for each part would drop the padding of the whole.

    Attributes:
      planes: the packed arrays, one for each entry of `format.planes`, each (*batch, n/16, k/k_block, payload).
      format: the `Format`.
      padding: (of k, of n), in elements.
      permutation: int32 (*batch, k) or None. Row i of the packed weight is row permutation[i] of the logical one
        (GPTQ's act-order: rows sorted by group once, when loaded).
      input_scale: float (*batch, k) or None, in packed order. The packed weight holds diag(input_scale) @ w
        (SmoothQuant, AWQ).
      global_scale: float (*batch,) or None. The packed weight holds w / global_scale (NVFP4).
    """

    __slots__ = ("format", "global_scale", "input_scale", "padding", "permutation", "planes")

    planes: tuple[jax.Array, ...]
    format: Format
    padding: tuple[int, int]
    permutation: jax.Array | None
    input_scale: jax.Array | None
    global_scale: jax.Array | None

    def __init__(
        self,
        planes: tuple[jax.Array, ...],
        format: Format,
        padding: tuple[int, int] = (0, 0),
        *,
        permutation: jax.Array | None = None,
        input_scale: jax.Array | None = None,
        global_scale: jax.Array | None = None,
    ):
        self.planes = tuple(planes)
        self.format = format
        self.padding = padding
        self.permutation = permutation
        self.input_scale = input_scale
        self.global_scale = global_scale

    # Pytree. Nothing is checked here: transforms rebuild trees of whatever leaves they need.

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        names = [p.name for p in self.format.planes]
        children = [(jax.tree_util.GetAttrKey(n), a) for n, a in zip(names, self.planes, strict=True)]
        children += [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in _OPTIONAL]
        return children, (self.format, self.padding)

    def tree_flatten(self) -> tuple[Any, Any]:
        return (*self.planes, *(getattr(self, n) for n in _OPTIONAL)), (self.format, self.padding)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Format, tuple[int, int]], children: Any) -> QTensor:
        *planes, permutation, input_scale, global_scale = children
        return cls(
            tuple(planes),
            *aux,
            permutation=permutation,
            input_scale=input_scale,
            global_scale=global_scale,
        )

    # Shape.

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical (*batch, k, n)."""
        *batch, n16, blocks, _ = self.planes[0].shape
        k = blocks * self.format.k_block - self.padding[0]
        return (*batch, k, n16 * layout.TILE_N - self.padding[1])

    @property
    def ndim(self) -> int:
        return self.planes[0].ndim - 1

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, padding included."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))

    def __repr__(self) -> str:
        try:
            shape = ", ".join(map(str, self.shape))
            bits = 8 * self.nbytes / max(self.size, 1)
            return f"QTensor({self.format}, shape=({shape}), {self.nbytes:,} bytes, {bits:.3g} bits per weight)"
        except (AttributeError, ValueError, TypeError):  # leaves that are not arrays, inside a transform
            return f"QTensor({self.format}, planes={self.planes!r})"

    def __getitem__(self, index: Any) -> QTensor:
        """Indexes the batch axes of a stacked weight: `w[i]` is layer i."""
        indices = index if isinstance(index, tuple) else (index,)
        batch_ndim = self.ndim - 2
        if any(i is Ellipsis for i in indices) or len(indices) > batch_ndim:
            raise IndexError(
                f"a QTensor is indexed along its {batch_ndim} leading batch axes only, got {index!r} for shape "
                f"{self.shape}; use take(w, i) for rows of an embedding table"
            )
        return jax.tree.map(lambda a: a[index], self)

    # Conversion.

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dense weight, (*batch, k, n).

        The packed element is decoded in float32, bit for bit as the format's own decoder does, then multiplied by
        global_scale, divided by input_scale of its row of k, and put at row permutation[i]. The result is rounded once
        to `dtype` (float16, bfloat16 or float32).
        """
        dtype = jnp.dtype(dtype)
        if dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
            raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
        return _dequantize(self, dtype.name)

    def to_logical(self, rows: jax.Array) -> jax.Array:
        """Decoded rows of n, (*batch, ..., k) in packed order, as the logical weight has them."""
        batch_ndim = self.ndim - 2

        def per_row(factor: jax.Array) -> jax.Array:
            between = (1,) * (rows.ndim - factor.ndim)
            return factor.reshape(*factor.shape[:batch_ndim], *between, *factor.shape[batch_ndim:])

        if self.global_scale is not None:
            rows = rows * per_row(self.global_scale.astype(jnp.float32)[..., None])
        if self.input_scale is not None:
            rows = rows / per_row(self.input_scale.astype(jnp.float32))
        if self.permutation is not None:
            rows = jnp.take_along_axis(rows, per_row(jnp.argsort(self.permutation, axis=-1)), axis=-1)
        return rows

    @staticmethod
    def from_fields(fields: dict[str, jax.Array], format: Format) -> QTensor:
        """Packs logical fields, "codes" (*batch, n, k) and so on; see `Format`."""
        n, k = fields["codes"].shape[-2:]
        padding = (layout.round_up(k, format.k_block) - k, layout.round_up(n, layout.TILE_N) - n)
        return QTensor(format.to_planes(fields), format, padding)

    def fields(self) -> dict[str, jax.Array]:
        """Unpacks the logical fields, the inverse of `from_fields`."""
        k, n = self.shape[-2:]
        return self.format.from_planes(self.planes, n, k)

    @staticmethod
    def from_gguf_bytes(raw: Any, format: str | Format) -> QTensor:
        """Repacks rows of GGUF blocks, losslessly.

        Args:
          raw: uint8 (*batch, n, row bytes), the rows of a GGUF matrix of n rows of k elements.
          format: a format that has a GGUF block.

        Returns:
          A QTensor of logical shape (*batch, k, n), the transpose of the stored matrix.

        Raises:
          TypeError: raw is not uint8.
          ValueError: fewer than two axes, a row that is not a whole number of blocks, or a format without a GGUF block.
        """
        fmt = gguf_format(format)
        if getattr(raw, "dtype", None) != np.uint8:
            raise TypeError(f"raw must be a uint8 array, got {getattr(raw, 'dtype', type(raw).__name__)}")
        if raw.ndim < 2 or raw.shape[-1] % fmt.block_bytes or raw.shape[-1] == 0:
            raise ValueError(
                f"raw must have shape (*batch, n, row bytes) with row bytes a positive multiple of {fmt.block_bytes} "
                f"({fmt.name} blocks), got {tuple(raw.shape)}"
            )
        k = raw.shape[-1] // fmt.block_bytes * fmt.block
        n = raw.shape[-2]
        padding = (layout.round_up(k, fmt.k_block) - k, layout.round_up(n, layout.TILE_N) - n)
        return QTensor(_repack(raw, fmt), fmt, padding)

    def to_gguf_bytes(self) -> jax.Array:
        """The rows of GGUF blocks that `from_gguf_bytes` would take: uint8 (*batch, n, row bytes).

        Raises:
          ValueError: the format has no GGUF block, or the QTensor carries a permutation or scales a block can't hold.
        """
        fmt = gguf_format(self.format)
        extra = [name for name in _OPTIONAL if getattr(self, name) is not None]
        if extra:
            raise ValueError(f"a GGUF block can't hold {', '.join(extra)} of this QTensor")
        return _to_bytes(self, fmt)


def _serialize_aux(aux: tuple[Format, tuple[int, int]]) -> bytes:
    format, padding = aux
    return json.dumps({"layout": layout.LAYOUT_VERSION, "format": format_to_json(format), "padding": padding}).encode()


def _deserialize_aux(data: bytes | bytearray) -> tuple[Format, tuple[int, int]]:
    aux = json.loads(bytes(data))
    if aux["layout"] != layout.LAYOUT_VERSION:
        raise ValueError(
            f"a QTensor of layout version {aux['layout']} was serialized, this jax_qgemm has version "
            f"{layout.LAYOUT_VERSION}: export the function again"
        )
    return format_from_json(aux["format"]), tuple(aux["padding"])


export.register_pytree_node_serialization(
    QTensor,
    serialized_name="jax_qgemm.QTensor",
    serialize_auxdata=_serialize_aux,
    deserialize_auxdata=_deserialize_aux,
)


_REPACK_ELEMENTS = 1 << 25  # per step: bounds the temporaries of repacking a large table to some 100 MB


def _repack(raw: Any, fmt: GGUFFormat) -> tuple[jax.Array, ...]:
    *batch, n, row_bytes = raw.shape
    rows = max(layout.TILE_N, _REPACK_ELEMENTS // (row_bytes // fmt.block_bytes * fmt.block * math.prod(batch)))
    rows = rows // layout.TILE_N * layout.TILE_N
    if n <= rows or isinstance(raw, Tracer):
        return _repack_rows(raw, fmt)
    parts = [_repack_rows(raw[..., i : i + rows, :], fmt) for i in range(0, n, rows)]
    axis = len(batch)
    return tuple(jnp.concatenate(p, axis=axis) for p in zip(*parts, strict=True))


@functools.partial(jax.jit, static_argnums=1)
def _repack_rows(raw: jax.Array, fmt: GGUFFormat) -> tuple[jax.Array, ...]:
    blocks = raw.reshape(*raw.shape[:-1], -1, fmt.block_bytes)
    return fmt.to_planes(fmt.from_bytes(blocks))


@functools.partial(jax.jit, static_argnums=1)
def _to_bytes(w: QTensor, fmt: GGUFFormat) -> jax.Array:
    blocks = fmt.to_bytes(w.fields())
    return blocks.reshape(*blocks.shape[:-2], -1)


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(w: QTensor, dtype: str) -> jax.Array:
    rows = w.to_logical(w.format.decode(w.fields()))
    return jnp.swapaxes(rows, -1, -2).astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _encode(w: jax.Array, fmt: Format) -> tuple[QTensor, jax.Array, jax.Array]:
    rows = jnp.swapaxes(w.astype(jnp.float32), -1, -2)
    fields, overflow = fmt.encode(rows)
    return QTensor.from_fields(fields, fmt), overflow, jnp.all(jnp.isfinite(rows))


def quantize(w: Any, format: str | Format) -> QTensor:
    """Quantizes a dense weight along k.

    Args:
      w: float16, bfloat16 or float32 (*batch, k, n); k a multiple of the format's block.
      format: a name such as "q4_0", or a `Format` such as `int4(group_size=64, symmetric=False)`.

    Returns:
      A QTensor of the same logical shape. For the formats that gguf-py quantizes the result is the same to the byte.

    Raises:
      TypeError: w is not a float array.
      ValueError: unknown format; fewer than two axes; k not a multiple of the block; and, where w is concrete, a value
        that is not finite or a scale beyond the range of its type (for q4_0, |w| above 5.2e5). Under `jit`, where the
        values are not known, such scales are clamped to the largest finite value of their type instead: finite weights
        never give Inf or NaN.
    """
    fmt = get_format(format)
    if not hasattr(w, "dtype") or w.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        raise TypeError(
            f"w must be a float16, bfloat16 or float32 array, got {getattr(w, 'dtype', None) or type(w).__name__}"
        )
    if w.ndim < 2:
        raise ValueError(f"w must have shape (*batch, k, n), got {tuple(w.shape)}")
    if w.shape[-2] == 0 or w.shape[-2] % fmt.block:
        raise ValueError(
            f"w has k = {w.shape[-2]} (shape {tuple(w.shape)}), but format {fmt} needs a positive multiple of "
            f"{fmt.block}"
        )
    result, overflow, finite = _encode(jnp.asarray(w), fmt)
    if not isinstance(overflow, Tracer):
        if not finite:
            raise ValueError(f"w has values that are not finite; format {fmt} can't hold them")
        if overflow:
            raise ValueError(f"w has values too large for format {fmt}: a scale leaves the range of its type")
    return result


__all__ = ["QTensor", "quantize"]
