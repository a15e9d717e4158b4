"""Operands of small products with an epilogue, ungated or gated, and what their results are in float64."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import epilogue_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
from cases import random_weight

import jax_qgemm as qg

M, K, N, SIZE = 3, 32, 16, 4
FORMAT = qg.int4(32, symmetric=False)
LIMIT = 1e-11  # of float32 products
NAMES = ("x", "w", "scale", "bias", "residual")


@dataclasses.dataclass
class Operands:
    """Of an ungated or a gated product, each with the leading axes asked for, and its float64 values."""

    gated: bool
    values: dict[str, Any]
    float64: dict[str, Any]

    def item(self, **index: Any) -> dict[str, Any]:
        """The float64 operands, those named indexed."""
        return {n: jax.tree.map(lambda a, n=n: a[index[n]], v) if n in index else v for n, v in self.float64.items()}

    def expected(self, **index: Any) -> np.ndarray:
        function = oracle.gated if self.gated else oracle.fused
        operands = self.item(**index)
        return function(operands.pop("x"), operands.pop("w"), activation="silu", **operands)


def operands(gated, axes: Mapping[str, tuple[int, ...]] = MappingProxyType({}), seed: int = 0) -> Operands:
    """Random ones; `axes`: leading axes of operands, () by default."""
    rng = np.random.default_rng(seed)
    axes = {name: axes.get(name, ()) for name in NAMES}

    def halves(make):
        pair = make(), make()
        return pair if gated else pair[0]

    def weight():
        w, dense = random_weight(FORMAT, N, K, rng, batch=int(np.prod(axes["w"], dtype=int)))
        return jax.tree.map(lambda a: jnp.reshape(a, axes["w"] + a.shape[1:]), w), dense.reshape(*axes["w"], K, N)

    def normal(name, *shape):
        return rng.standard_normal((*axes[name], *shape)).astype(np.float32)

    weights, biases = halves(weight), halves(lambda: normal("bias", N))
    x, residual = normal("x", M, K) / 5, normal("residual", M, N)
    scale = rng.uniform(0.5, 2, axes["scale"]).astype(np.float32)
    dense = tuple(d for _, d in weights) if gated else weights[1]
    values = {
        "x": x,
        "w": qg.interleave_gate_up(*(w for w, _ in weights)) if gated else weights[0],
        "scale": scale,
        "bias": qg.interleave_gate_up(*biases) if gated else biases,
        "residual": residual,
    }
    exact = {"x": x, "w": dense, "scale": scale, "bias": biases, "residual": residual}
    return Operands(gated, values, jax.tree.map(np.float64, exact))


def apply(gated, activation="silu", **options):
    """The function of x, w, scale, bias and residual."""

    def function(x, w, scale, bias, residual):
        w = qg.QTensor(w.planes, w.format, w.padding, global_scale=scale)
        op = qg.gated_matmul if gated else qg.matmul
        return op(x, w, bias=bias, activation=activation, residual=residual, precision="highest", **options)

    return function


def count(primitive, function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count(f"= {primitive}[")
