"""Activations as NumPy quantizes them, and what a product with them may be off."""

import ml_dtypes
import numpy as np

LIMITS = {"int8": 1e-10, "fp8": 5e-6}
"""NMSE against the product with the same quantized x."""

F32 = np.float32


def quantize(x: np.ndarray, x_format: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes, int8 or float8_e4m3fn, and float32 scales of the rows of finite x."""
    x = x.astype(F32)
    largest = F32({"int8": 127, "fp8": 448}[x_format])
    top = np.abs(x).max(-1, keepdims=True)
    scaled = x * np.where(top == 0, F32(0), largest / np.where(top == 0, F32(1), top))
    codes = np.rint(scaled).astype(np.int8) if x_format == "int8" else scaled.astype(ml_dtypes.float8_e4m3fn)
    return codes, (top / largest)[..., 0]


def quantized(x: np.ndarray, x_format: str) -> np.ndarray:
    """float64 scale * code of finite x."""
    codes, scales = quantize(x, x_format)
    return codes.astype(np.float64) * scales.astype(np.float64)[..., None]
