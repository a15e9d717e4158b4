"""The CUDA kernels' own code, run on the CPU by tests/emulation, against float64."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qgemm as qg
from jax_qgemm.formats import FORMAT_NAMES, get_format
from jax_qgemm.formats.integer import SCALE_DTYPES, IntFormat
from jax_qgemm.formats.layout import TILE_N
from jax_qgemm.testing import nmse

EMULATION = Path(__file__).parent / "emulation"
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
# m, n, blocks of k; m = 8 and 9 are the two sides of the launcher's choice, 33 leaves a tail behind 32.
SHAPES = [(1, 16, 1), (3, 33, 5), (8, 127, 3), (9, 3, 2), (33, 80, 3), (70, 31, 1)]
DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
# NMSE of one rounding of x to 16 significant bits (two bf16 terms), and of full float32.
LIMITS = {"float16": 1e-11, "bfloat16": 1e-11, "float32": 5e-7, "highest": 1e-11}


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    if shutil.which("make") is None or shutil.which("g++") is None:
        pytest.skip("needs make and g++ to compile the kernels for the CPU")
    build = tmp_path_factory.mktemp("emulation")
    done = subprocess.run(
        ["make", "-s", "-j2", "-C", EMULATION, f"BUILD={build}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(build / "libemulation.so")).emulated_matmul
    function.restype = ctypes.c_char_p
    return function


def run(function, x: jax.Array, w: qg.QTensor, *, transpose=False, highest=False, out_dtype="float32", kernel="auto"):
    """x (*batch, m, ...) times w or its transpose, by the emulated kernel."""
    format = w.format
    k, n = w.shape[-2:]
    planes = [np.ascontiguousarray(p) for p in w.planes]
    xs = np.ascontiguousarray(x)
    out = np.full((*xs.shape[:-1], k if transpose else n), np.nan, jnp.dtype(out_dtype))
    is_int = isinstance(format, IntFormat)
    pointers = (ctypes.c_void_p * len(planes))(*(p.ctypes.data for p in planes))
    problem = function(
        format.name.encode(),
        kernel.encode(),
        pointers,
        len(planes),
        ctypes.c_int64(planes[0].shape[-2]),
        format.group if is_int else 0,
        SCALE_DTYPES.index(format.scale_dtype) if is_int else 0,
        xs.ctypes.data_as(ctypes.c_void_p),
        DTYPES[x.dtype.name],
        out.ctypes.data_as(ctypes.c_void_p),
        DTYPES[jnp.dtype(out_dtype).name],
        ctypes.c_int64(int(np.prod(xs.shape[:-2]))),
        ctypes.c_int64(xs.shape[-2]),
        ctypes.c_int64(n),
        ctypes.c_int64(k),
        int(transpose),
        int(highest),
    )
    assert problem is None, problem
    return out.astype(np.float64)


def random_weight(format, k, n, seed, batch=None):
    return cases.random_weight(get_format(format), n, k, np.random.default_rng(seed), batch=batch)


def random_x(shape, dtype, seed):
    x = jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)
    return x, np.asarray(x, np.float64)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_product(emulated, format):
    fmt = get_format(format)
    for case, (m, n, blocks) in enumerate(SHAPES):
        k = blocks * fmt.block if fmt.block > 1 else 64 * blocks + 13
        w, dense = random_weight(fmt, k, n, case)
        for dtype in DTYPES:
            x, exact = random_x((m, k), dtype, case + 100)
            for highest in (False, True) if dtype == "float32" else (False,):
                error = nmse(run(emulated, x, w, highest=highest), exact @ dense)
                assert error <= LIMITS["highest" if highest else dtype], (m, n, k, dtype, highest, error)


@pytest.mark.parametrize("format", ["q4_0", "q6_k", "int4"])
def test_few_rows_by_the_kernel_for_many(emulated, format):
    fmt = get_format(format)
    w, dense = random_weight(fmt, 3 * fmt.block, 50, 0)
    x, exact = random_x((5, 3 * fmt.block), "float32", 1)
    error = nmse(run(emulated, x, w, highest=True, kernel="gemm_sm80"), exact @ dense)
    assert error <= LIMITS["highest"], error


def test_rows_that_exceed_shared_memory(emulated):
    """8 rows of 16384 take 256 KiB: "auto" goes to the other kernel, "gemv" refuses."""
    w, dense = random_weight(qg.int4(128), 16384, 16, 0)
    x, exact = random_x((8, 16384), "float16", 1)
    assert nmse(run(emulated, x, w), exact @ dense) <= LIMITS["float16"]
    with pytest.raises(AssertionError, match="don't fit into shared memory"):
        run(emulated, x, w, kernel="gemv")


@pytest.mark.parametrize(
    ("m", "format", "reason"),
    [(9, "q4_0", "more than 8 rows"), (1, qg.int4(16), "groups of 16"), (1, qg.int4(scale_dtype="float32"), "float32")],
    ids=str,
)
def test_gemv_says_why_it_refuses(emulated, m, format, reason):
    """At run time, where tracing could not know m."""
    w, _ = random_weight(format, 128, 16, 0)
    x, _ = random_x((m, 128), "float16", 1)
    with pytest.raises(AssertionError, match=reason):
        run(emulated, x, w, kernel="gemv")


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_transposed(emulated, format):
    fmt = get_format(format)
    for case, (m, n, blocks) in enumerate(SHAPES[1::2]):
        k = blocks * fmt.block if fmt.block > 1 else 64 * blocks + 13
        w, dense = random_weight(fmt, k, n, case)
        x, exact = random_x((m, n), "float32", case)
        error = nmse(run(emulated, x, w, transpose=True), exact @ dense.T)
        assert error <= 1e-11, (m, n, k, error)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_decodes_to_the_bit(emulated, format):
    """The identity times w^T is every weight of a row, once, plus zeros."""
    fmt = get_format(format)
    w, dense = random_weight(fmt, 2 * fmt.block if fmt.block > 1 else 70, TILE_N + 3, 0)
    identity = jnp.eye(TILE_N + 3)
    assert np.array_equal(run(emulated, identity, w, transpose=True), dense.T)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32"])
def test_batch_and_output_types(emulated, transpose, out_dtype):
    w, dense = random_weight("q4_k", 256, 40, 1, batch=3)
    x, exact = random_x((3, 11, 40 if transpose else 256), "bfloat16", 2)
    expected = exact @ (np.swapaxes(dense, -1, -2) if transpose else dense)
    got = run(emulated, x, w, transpose=transpose, out_dtype=out_dtype)
    # One rounding of the output: half a unit in the last place, squared.
    assert nmse(got, expected) <= {"float16": 2.0**-22, "bfloat16": 2.0**-16, "float32": 1e-11}[out_dtype]


def test_infinite_and_nan_rows_stay_alone(emulated):
    w, dense = random_weight("q4_1", 96, 20, 3)
    for dtype in DTYPES:
        x, exact = random_x((5, 96), dtype, 4)
        x = x.at[1, 7].set(jnp.inf).at[3, 9].set(jnp.nan)
        got = run(emulated, x, w)
        assert not np.isfinite(got[[1, 3]]).any()
        assert nmse(got[[0, 2, 4]], exact[[0, 2, 4]] @ dense) <= LIMITS[dtype]
