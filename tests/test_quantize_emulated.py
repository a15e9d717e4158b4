"""The CUDA quantizer of activations, run on the CPU by tests/emulation, against NumPy, to the byte."""

import ctypes

import ml_dtypes
import numpy as np
import pytest
from quantize_oracle import FORMATS, TINY, assert_same, edges, expected

F32 = np.float32
DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)
# Rows of one warp and of several; of whole vectors and of parts; of one turn and, beyond 16384 or 32768, of more.
WIDTHS = [1, 2, 7, 8, 9, 16, 31, 32, 33, 100, 127, 511, 512, 513, 1024, 1025, 4096, 4100, 14336, 16385, 32769, 70003]


def normal(rows: int, k: int, dtype) -> np.ndarray:
    return np.random.default_rng(k).standard_normal((rows, k)).astype(dtype)


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_rows_of_any_length(emulated, format, dtype, k):
    x = normal(3 if k > 4096 else 9, k, dtype)
    assert_same(emulated.quantize(x, format), expected(x, format))


@pytest.mark.parametrize("blocks", [1, 2, 5, 128, 131, 448])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups(emulated, dtype, blocks):
    for rows in (1, 5):
        x = normal(rows, 32 * blocks, dtype)
        assert_same(emulated.quantize(x, "q8_1"), expected(x, "q8_1"))


@pytest.mark.parametrize("offset", [1, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_any_address(emulated, format, dtype, offset):
    for k in (32, 160) if format == "q8_1" else (1, 13, 32, 137, 1153):
        x = normal(6, k, dtype)
        assert_same(emulated.quantize(x, format, offset), expected(x, format))


@pytest.mark.parametrize("width", [32, 96, 1056])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_edges(emulated, format, dtype, width):
    with np.errstate(over="ignore"):
        x = edges(format, width).astype(dtype)
    assert_same(emulated.quantize(x, format), expected(x, format))
    if format != "q8_1":
        x = x[:, : width - 3]
        assert_same(emulated.quantize(x, format), expected(x, format))


@pytest.mark.parametrize("format", FORMATS)
def test_a_nan_or_an_inf_anywhere(emulated, format):
    for at in (0, 31, 1023, 1024, 4095):
        for value in (np.nan, -np.inf):
            x = normal(2, 4096, np.float16)
            x[1, at] = value
            assert_same(emulated.quantize(x, format), expected(x, format))


@pytest.mark.parametrize("format", FORMATS)
def test_many_largest_magnitudes(emulated, format):
    """Both quotients are rounded once."""
    rng = np.random.default_rng(0)
    x = np.zeros((20_000, 32), F32)
    x[:, 5] = rng.uniform(1, 2, len(x)) * np.exp2(rng.integers(-99, 127, len(x)))
    x[:, 9] = x[:, 5] * rng.uniform(-1, 1, len(x))
    assert_same(emulated.quantize(x, format), expected(x, format))


def test_every_e4m3_code_and_tie(emulated):
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(F32)
    ties = (codes[1:] + codes[:-1]) / 2
    near = np.concatenate([codes, ties, np.nextafter(ties, F32(0)), np.nextafter(ties, F32(500))])
    x = np.concatenate([near, -near])[None]
    assert x.max() == 448
    assert_same(emulated.quantize(x, "fp8"), expected(x, "fp8"))


def test_thresholds_are_exact(emulated):
    for format, largest in (("int8", 127), ("fp8", 448), ("q8_1", 127)):
        least = F32(largest) * TINY
        x = np.zeros((2, 32), F32)
        x[:, 0] = least, np.nextafter(least, F32(0))
        codes = np.asarray(emulated.quantize(x, format)[0], F32)
        assert (codes[:, 0] == [largest, 0]).all()


@pytest.mark.parametrize(
    ("rows", "k", "blocks", "threads"),
    [
        (1, 4096, 1, 128),  # as few warps as hold a row
        (1, 14336, 1, 448),
        (3, 512, 1, 128),  # a warp a row
        (5, 1024, 2, 128),
        (5, 1025, 5, 64),
        (2, 100_000, 2, 1024),
    ],
)
def test_threads_of_a_row(emulated, rows, k, blocks, threads):
    x = normal(rows, k, ml_dtypes.bfloat16)
    assert_same(emulated.quantize(x, "int8"), expected(x, "int8"))
    launch = emulated.last_launch()
    assert (launch["blocks"], launch["threads"]) == (blocks, threads)


def test_refuses_old_gpus(emulated):
    with emulated.device(7, 80, 96 << 10), pytest.raises(RuntimeError, match=r"older than compute capability 8\.0"):
        emulated.quantize(normal(1, 32, F32), "int8")


def test_refuses_rows_that_it_can_not_count(emulated):
    library = emulated._library
    problem = library.emulated_quantize(0, None, 2, None, None, None, *map(ctypes.c_int64, (1, 2**31)))
    assert problem == b"rows of x are too long"
