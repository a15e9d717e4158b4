"""Error metrics for quantized products, for this package's tests and for those of models that use it.

The oracle is the float64 product with the dequantized weight. All comparisons are written so that NaN fails.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_LIMITS = {"float16": 5e-7, "bfloat16": 2e-5, "float32": 5e-7}
_LIMITS_WITH_MINIMUMS = {"float16": 1e-6, "bfloat16": 5e-5, "float32": 5e-7}
_LIMIT_HIGHEST = 1e-11
_SLICE_FACTOR = 10
_SLICE_ELEMENTS = 16


def _float64(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def nmse(actual: Any, expected: Any) -> float:
    """Normalized mean squared error, sum((actual - expected)**2) / sum(expected**2), in float64.

    Args:
      actual: array of any float type.
      expected: array of the same shape.

    Returns:
      0.0 for empty or equal arrays; inf where `expected` is zero and `actual` is not; NaN where either holds
      NaN or an infinity: so test ``nmse(a, b) <= limit``, never ``not nmse(a, b) > limit``.

    Raises:
      ValueError: the shapes differ.
    """
    a, b = _float64(actual), _float64(expected)
    if a.shape != b.shape:
        raise ValueError(f"actual has shape {a.shape}, expected has shape {b.shape}")
    with np.errstate(invalid="ignore", over="ignore"):
        error, energy = float(np.sum((a - b) ** 2)), float(np.sum(b**2))
    if error == 0.0:
        return 0.0
    return error / energy if energy else error * np.inf


def product_limit(*dtypes: Any, minimums: bool = False, highest: bool = False) -> float:
    """The largest NMSE that a product may have: 5e-7 for float16 and float32, 2e-5 for bfloat16.

    Args:
      *dtypes: those of x and of the result; the coarsest decides.
      minimums: whether the weight's format has float minimums, whose sum with the scaled values may be
        rounded to the type of x once more: 1e-6 for float16, 5e-5 for bfloat16.
      highest: whether the product was asked for in full float32 (`jax.lax.Precision.HIGHEST`); where every
        type is float32, the limit then is 1e-11.
    """
    names = {np.dtype(dtype).name for dtype in dtypes}
    if highest and names == {"float32"}:
        return _LIMIT_HIGHEST
    limits = _LIMITS_WITH_MINIMUMS if minimums else _LIMITS
    return max(limits[name] for name in names)


def check_product(out: Any, x: Any, w: Any, limit: float) -> None:
    """Checks ``out ~ x @ w``, as a whole and along every row and every column.

    The NMSE of the whole output must be at most `limit`. A mean over everything hides a wrong column, so that
    for every row and every column of 16 or more elements sum((out - x @ w)**2) must be at most 10 * limit *
    sum(x**2 @ w**2), the energy that the sums have without cancellation; a slice without energy must be zero.

    Args:
      out: (..., m, n).
      x: (..., m, k).
      w: the dense weight (..., k, n), as `QTensor.dequantize` or another decoder gives it.
      limit: see `product_limit`.

    Raises:
      AssertionError: a shape, the whole, a row or a column is off, with the figures; or a value is NaN.
    """
    x, w, out = _float64(x), _float64(w), _float64(out)
    expected = x @ w
    if out.shape != expected.shape:
        raise AssertionError(f"the product has shape {out.shape}, expected {expected.shape}")
    error = nmse(out, expected)
    if not error <= limit:
        raise AssertionError(f"NMSE {error:.3g} of the whole output exceeds {limit:.3g}; {_worst(out, expected)}")
    squared_error, energy = (out - expected) ** 2, (x**2) @ (w**2)
    for name, axis in (("row", -1), ("column", -2)):
        if out.ndim < -axis or out.shape[axis] < _SLICE_ELEMENTS:
            continue
        errors, energies = squared_error.sum(axis), energy.sum(axis)
        bad = ~(errors <= _SLICE_FACTOR * limit * energies)
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            raise AssertionError(
                f"{int(bad.sum())} of {bad.size} {name}s are off; {name} {index}: squared error "
                f"{errors[index]:.3g}, energy {energies[index]:.3g}, their ratio must be at most "
                f"{_SLICE_FACTOR * limit:.3g}"
            )


def _worst(out: np.ndarray, expected: np.ndarray) -> str:
    difference = np.abs(out - expected)
    difference[np.isnan(difference)] = np.inf
    index = np.unravel_index(int(np.argmax(difference)), out.shape)
    return f"worst at {tuple(map(int, index))}: got {out[index]:.6g}, expected {expected[index]:.6g}"
