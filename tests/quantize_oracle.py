"""What quantized activations are, by NumPy and ml_dtypes, operation by operation in float32; whatever x holds."""

import ml_dtypes
import numpy as np

F32 = np.float32
FORMATS = ("int8", "fp8", "q8_1")
LARGEST = {"int8": 127, "fp8": 448, "q8_1": 127}
TINY = F32(2.0**-100)


def expected(x: np.ndarray, format: str) -> tuple[np.ndarray, ...]:
    """Codes and scales of x (..., k), and the sums of q8_1."""
    x = x.astype(F32)
    if format == "q8_1":
        codes, d = _scaled(x.reshape(*x.shape[:-1], -1, 32), 127, 127 * F32(65504))
        codes = np.copysign(np.floor(np.abs(codes.astype(np.float64)) + 0.5), codes).astype(np.int8)
        return codes.reshape(x.shape), d[..., 0].astype(np.float16), codes.sum(-1, dtype=np.int16)
    codes, scales = _scaled(x, LARGEST[format], None)
    codes = np.rint(codes).astype(np.int8) if format == "int8" else codes.astype(ml_dtypes.float8_e4m3fn)
    return codes, scales


def _scaled(x: np.ndarray, largest: int, limit: np.floating | None) -> tuple[np.ndarray, np.ndarray]:
    """What is rounded to codes, and the scale of each row."""
    top = np.abs(x).max(-1, keepdims=True)
    finite = np.isfinite(top)
    top = np.where(top < largest * TINY, F32(0), top)
    plain = finite & (top > 0)
    safe = np.where(plain, top, F32(1))
    if limit is None:
        scales = np.where(finite, top / F32(largest), F32(np.nan))
        factor = F32(largest) / safe
    else:
        x, safe = np.clip(x, -limit, limit), np.minimum(safe, limit)
        scales = np.where(plain, safe / F32(largest), top)  # an infinite scale for an Inf
        factor = F32(1) / (safe / F32(largest))
    with np.errstate(invalid="ignore"):
        return np.where(plain, x * factor, F32(0)), scales


def edges(format: str, width: int) -> np.ndarray:
    """float32 rows of 32 and more elements: ties, signed zeros, subnormal, tiny and huge numbers, NaN and Inf."""
    rng = np.random.default_rng(1)
    largest = LARGEST[format]
    rows = np.zeros((24, width), F32)
    rows[0] = np.arange(width) % 256 - 128 + 0.5  # ties of int8: the scale below is 1
    rows[1] = 2.0 ** rng.integers(-20, 9, width) * rng.choice([1, 1.0625, 1.125, 1.1875], width)  # of e4m3
    rows[2] = np.arange(width) % 256 * 2.0**-10
    rows[:3, 0] = largest
    rows[3, :3] = 1e38, -3e38, 1
    rows[4, :3] = largest * TINY * np.array([1, -0.5, 0.01])
    rows[5, :3] = largest * TINY * F32(0.999)
    rows[6, :2] = 1e-40, -1e-45
    rows[7, :4] = largest * TINY, 1e-38, 1e-40, -1e-45
    rows[8] = np.where(np.arange(width) % 3, -0.0, 0.0)
    rows[9, ::2], rows[9, 1::2] = -0.0, 1
    rows[10, -1], rows[11, 3], rows[12, 0] = np.inf, -np.inf, np.nan
    rows[13, :2], rows[14, -2:] = (np.inf, np.nan), (np.nan, -np.inf)
    rows[15, :3] = 1e7, -127 * 65504, 127 * 65504 + 8
    rows[16, -1] = np.finfo(F32).max
    rows[17] = np.nextafter(F32(0.5), F32(0)) * rng.choice([1, -1, 3], width)
    rows[17, 0] = largest
    rows[18:] = np.exp2(rng.uniform(-30, 30, (6, width))) * rng.choice([-1, 1], (6, width))
    return rows


def assert_same(got: tuple, want: tuple[np.ndarray, ...]) -> None:
    """Equal to the byte, but for the bits of a NaN."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        a = np.asarray(a)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.dtype in (F32, np.float16):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(np.signbit(a) & ~np.isnan(a), np.signbit(b) & ~np.isnan(b))
        else:
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
