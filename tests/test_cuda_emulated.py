"""The CUDA kernels' own code, run on the CPU by tests/emulation, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from emulated import DTYPES, HOPPER, random_weight, random_x

import jax_qgemm as qg
from jax_qgemm.formats import FORMAT_NAMES, get_format
from jax_qgemm.formats.layout import TILE_N
from jax_qgemm.testing import check_product, nmse, product_limit

FORMATS = [
    *(f for f in FORMAT_NAMES if not f.startswith("int")),
    qg.int2(16, symmetric=False, scale_dtype="float32"),
    qg.int3(64),
    qg.int4(128),
    qg.int4(32, symmetric=False, scale_dtype="bfloat16"),
    qg.int4(256),
    qg.int4(-1, symmetric=False),
    qg.int8(-1),
    qg.int8(16, symmetric=False),
]
# m, n, blocks of k; m up to 8, 16, 32, 64 and beyond are the buckets of the launcher's choice.
SHAPES = [(1, 16, 1), (3, 33, 5), (8, 127, 3), (9, 3, 2), (17, 80, 3), (33, 50, 2), (70, 31, 1)]
# NMSE of one rounding of x to 16 significant bits (two bf16 terms), and of full float32.
LIMITS = {"float16": 1e-11, "bfloat16": 1e-11, "float32": 5e-7, "highest": 1e-11}
AMPERE = (8, 3, 160 << 10)  # where "auto" takes kernels whose operands are exact, however many rows there are


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_product(emulated, format):
    fmt = get_format(format)
    for case, (m, n, blocks) in enumerate(SHAPES):
        k = blocks * fmt.block if fmt.block > 1 else 64 * blocks + 13
        w, dense = random_weight(fmt, k, n, case)
        for dtype in DTYPES:
            x, exact = random_x((m, k), dtype, case + 100)
            for highest in (False, True) if dtype == "float32" else (False,):
                with emulated.device(*(HOPPER if m <= 8 else AMPERE)):
                    error = nmse(emulated.matmul(x, w, highest=highest), exact @ dense)
                assert error <= LIMITS["highest" if highest else dtype], (m, n, k, dtype, highest, error)


@pytest.mark.parametrize("format", ["q4_0", "q6_k", "int4"])
def test_few_rows_by_the_kernel_for_many(emulated, format):
    fmt = get_format(format)
    w, dense = random_weight(fmt, 3 * fmt.block, 50, 0)
    x, exact = random_x((5, 3 * fmt.block), "float32", 1)
    error = nmse(emulated.matmul(x, w, highest=True, kernel="gemm_sm80"), exact @ dense)
    assert error <= LIMITS["highest"], error


@pytest.mark.parametrize("device", [HOPPER, AMPERE], ids=["hopper", "ampere"])
@pytest.mark.parametrize(
    "format",
    [
        qg.int3(-1, symmetric=False, scale_dtype="bfloat16"),
        qg.int4(-1, symmetric=False, scale_dtype="float32"),
        qg.int8(256, symmetric=False),
        "q2_k",
        "q4_k",
    ],
    ids=str,
)
def test_x_and_weights_with_a_mean(emulated, format, device):
    """Tensor cores cut sums off toward zero: sums whose terms have one sign show what adds up in long chains."""
    k = 1024
    w, dense = random_weight(format, k, 48, 0)
    with emulated.device(*device):
        for m, kernel in ((8, "auto"), (8, "gemm_sm80"), (17, "gemm_sm80")):
            for dtype in DTYPES:
                x = random_x((m, k), dtype, m)[0] + 4
                for highest in (False, True) if dtype == "float32" else (False,):
                    got = emulated.matmul(x, w, highest=highest, kernel=kernel)
                    check_product(got, x, dense, product_limit(dtype, highest=highest))


@pytest.mark.parametrize(
    ("m", "format", "dtype", "reason"),
    [
        (65, "q4_0", "float16", "more than 64 rows"),
        (9, "q4_0", "float32", "or 8 in float32"),
        (1, qg.int4(16), "float16", "groups of 16"),
        (1, qg.int4(scale_dtype="float32"), "float16", "float32 scales"),
    ],
    ids=str,
)
def test_gemv_says_why_it_refuses(emulated, m, format, dtype, reason):
    """At run time, where tracing could not know m."""
    w, _ = random_weight(format, 128, 16, 0)
    x, _ = random_x((m, 128), dtype, 1)
    with pytest.raises(RuntimeError, match=reason):
        emulated.matmul(x, w, kernel="gemv")


def test_shared_memory_that_is_too_small(emulated):
    """ "auto" goes to the other kernel, "gemv" refuses."""
    w, dense = random_weight("q4_0", 256, 16, 0)
    x, exact = random_x((64, 256), "float16", 1)
    with emulated.device(8, 3, 16 << 10):
        assert nmse(emulated.matmul(x, w), exact @ dense) <= LIMITS["float16"]
        with pytest.raises(RuntimeError, match="shared memory is too small"):
            emulated.matmul(x, w, kernel="gemv")


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_transposed(emulated, format):
    fmt = get_format(format)
    for case, (m, n, blocks) in enumerate(SHAPES[1::2]):
        k = blocks * fmt.block if fmt.block > 1 else 64 * blocks + 13
        w, dense = random_weight(fmt, k, n, case)
        x, exact = random_x((m, n), "float32", case)
        error = nmse(emulated.matmul(x, w, transpose=True), exact @ dense.T)
        assert error <= 1e-11, (m, n, k, error)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_decodes_to_the_bit(emulated, format):
    """The identity times w^T is every weight of a row, once, plus zeros."""
    fmt = get_format(format)
    w, dense = random_weight(fmt, 2 * fmt.block if fmt.block > 1 else 70, TILE_N + 3, 0)
    identity = jnp.eye(TILE_N + 3)
    assert np.array_equal(emulated.matmul(identity, w, transpose=True), dense.T)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_dequantized_rows(emulated, format):
    fmt = get_format(format)
    w, dense = random_weight(fmt, 3 * fmt.block if fmt.block > 1 else 203, 3 * TILE_N + 5, 0, batch=2)
    for first, rows in ((0, 3 * TILE_N + 5), (TILE_N, 2 * TILE_N), (2 * TILE_N, TILE_N + 5)):
        expected = np.swapaxes(dense, -1, -2)[:, first : first + rows]
        for dtype in DTYPES:
            got = emulated.dequantize(w, first=first, rows=rows, out_dtype=dtype)
            with np.errstate(over="ignore"):
                assert np.array_equal(got, expected.astype(np.float32).astype(jnp.dtype(dtype)), equal_nan=True)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32"])
def test_batch_and_output_types(emulated, transpose, out_dtype):
    w, dense = random_weight("q4_k", 256, 40, 1, batch=3)
    x, exact = random_x((3, 11, 40 if transpose else 256), "bfloat16", 2)
    expected = exact @ (np.swapaxes(dense, -1, -2) if transpose else dense)
    with emulated.device(*AMPERE):
        got = emulated.matmul(x, w, transpose=transpose, out_dtype=out_dtype)
    # One rounding of the output: half a unit in the last place, squared.
    assert nmse(got, expected) <= {"float16": 2.0**-22, "bfloat16": 2.0**-16, "float32": 1e-11}[out_dtype]


def test_infinite_and_nan_rows_stay_alone(emulated):
    w, dense = random_weight("q4_1", 96, 20, 3)
    for dtype in DTYPES:
        x, exact = random_x((5, 96), dtype, 4)
        x = x.at[1, 7].set(jnp.inf).at[3, 9].set(jnp.nan)
        got = emulated.matmul(x, w)
        assert not np.isfinite(got[[1, 3]]).any()
        assert nmse(got[[0, 2, 4]], exact[[0, 2, 4]] @ dense) <= LIMITS[dtype]
