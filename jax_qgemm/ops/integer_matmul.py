"""What `matmul` does with quantized activations: quantizes x, or takes it so, and binds the primitive."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_qgemm import reference
from jax_qgemm._sharding import varying_alike
from jax_qgemm.formats.activations import QActivations
from jax_qgemm.formats.qtensor import QTensor
from jax_qgemm.ops import integer_primitive
from jax_qgemm.ops.integer_primitive import KERNELS, X_FORMATS
from jax_qgemm.ops.matmul_primitive import qmatmul_p
from jax_qgemm.ops.quantize import quantize_activations

_Static = tuple[tuple[str, Any], ...]


def check_x_format(x_format: Any) -> None:
    """Raises ValueError unless it is None or how x can be quantized for a product."""
    if x_format is not None and x_format not in X_FORMATS:
        raise ValueError(f"x_format must be one of {', '.join(X_FORMATS)} or None, got {x_format!r}")


def product(
    x: jax.Array | QActivations,
    w: QTensor,
    extras: tuple[Any, Any, Any],
    *,
    x_format: str | None,
    straight_through: bool,
    kernel: str,
    **params: Any,
) -> jax.Array:
    """`matmul` and `gated_matmul` of quantized activations; the shapes are checked.

    Args:
      extras: global_scale, bias and residual.
      **params: highest, out_dtype, activation and gated.
    """
    check_x_format(x_format)
    if kernel not in ("auto", *KERNELS):
        raise ValueError(
            f"kernel={kernel!r} can't serve quantized activations, expected 'auto' or one of {', '.join(KERNELS)}"
        )
    params = {"kernel": kernel, "x_format": x_format, **params}
    if not isinstance(x, QActivations):
        leaves, structure = jax.tree.flatten((jnp.asarray(x), w, extras))
        function = _straight_through if straight_through else _quantized
        return function(tuple(params.items()), *jax.tree.unflatten(structure, varying_alike(*leaves)))

    if x.format not in X_FORMATS:
        raise ValueError(f"x is quantized to {x.format}, expected one of {', '.join(X_FORMATS)}")
    if x_format not in (None, x.format):
        raise ValueError(f"x is quantized to {x.format}, but x_format is {x_format!r}: expected None")
    if straight_through:
        raise ValueError("straight_through=True needs x itself with x_format, got quantized x, which has no derivative")
    if w.input_scale is not None:
        raise ValueError(
            "w has an input_scale, by which x must be divided before it is quantized, got quantized x: pass x itself "
            f"with x_format={x.format!r}"
        )
    codes = x.codes if w.permutation is None else jnp.take(x.codes, w.permutation, axis=-1)
    codes, scales, *operands = varying_alike(codes, x.scales, *extras, *w.planes)
    params["x_format"] = x.format
    return _bind(codes, scales, operands[3:], operands[:3], w, **params)


def packed_order(x: jax.Array, permutation: jax.Array | None, input_scale: jax.Array | None) -> jax.Array:
    """x as the packed weight wants it: its last axis permuted, then divided by the input scale, in float32."""
    if permutation is not None:
        x = jnp.take(x, permutation, axis=-1)
    if input_scale is not None:
        x = x.astype(jnp.float32) / input_scale.astype(jnp.float32)
    return x


def _bind(codes: Any, scales: Any, planes: Any, extras: Any, w: QTensor, *, highest: bool, **params: Any) -> jax.Array:
    del highest  # of the derivative alone
    return integer_primitive.bind(
        codes, scales, planes, extras, format=w.format, padding=w.padding, batch_ndim=0, **params
    )


def _quantized(static: _Static, x: jax.Array, w: QTensor, extras: Any) -> jax.Array:
    params = dict(static)
    quantized = quantize_activations(packed_order(x, w.permutation, w.input_scale), params["x_format"])
    return _bind(quantized.codes, quantized.scales, w.planes, extras, w, **params)


_straight_through = jax.custom_jvp(_quantized, nondiff_argnums=(0,))
"""`_quantized`, with the derivative that it had if x were not quantized."""


@_straight_through.defjvp
def _jvp(static: _Static, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, w, extras = primals
    dx, dw, dextras = tangents
    params = dict(static)
    core = params | {"activation": None, "gated": False, "out_dtype": "float32"}
    sums = _straight_through(tuple(core.items()), x, w, (None, None, None))
    # What multiplies x may be trained, what is packed is not.
    _, direction = jax.jvp(
        lambda x, scale: packed_order(x, w.permutation, scale).astype(x.dtype),
        (x, w.input_scale),
        (dx, dw.input_scale),
    )
    dsums = qmatmul_p.bind(
        direction, *w.planes, format=w.format, padding=w.padding, has_experts=False, batch_ndim=0, transpose=False,
        out_dtype="float32", highest=params["highest"], kernel="auto",
    )  # fmt: skip
    epilogue = functools.partial(
        reference.epilogue, batch_ndim=0, activation=params["activation"], gated=params["gated"],
        out_dtype=params["out_dtype"],
    )  # fmt: skip
    return jax.jvp(lambda sums, extras: epilogue(sums, *extras), (sums, extras), (dsums, dextras))
