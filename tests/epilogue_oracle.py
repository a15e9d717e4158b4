"""The epilogue of a product in float64 NumPy, by the textbook formulas."""

import math
from typing import Any

import numpy as np

_erfc = np.vectorize(math.erfc, otypes=[np.float64])

ACTIVATIONS = {
    None: lambda v: v,
    "gelu": lambda v: 0.5 * v * _erfc(-v / np.sqrt(2)),
    "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: np.maximum(v, 0),
    "silu": lambda v: v / (1 + np.exp(-v)),
}


def activate(name: str | None, v: Any) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return ACTIVATIONS[name](np.asarray(v, np.float64))


def fused(x: Any, w: Any, *, scale: Any = 1.0, bias: Any = 0.0, activation: str | None = None, residual: Any = 0.0):
    """activation(scale * x @ w + bias) + residual, all of float64; `w` dense."""
    return activate(activation, scale * (x @ w) + bias) + residual


def gated(
    x: Any, w: Any, *, scale: Any = 1.0, bias: Any = (0.0, 0.0), activation: str | None = None, residual: Any = 0.0
):
    """The same with the pairs (gate, up) of weights and biases."""
    gate, up = (scale * (x @ w[i]) + bias[i] for i in range(2))
    return activate(activation, gate) * up + residual
