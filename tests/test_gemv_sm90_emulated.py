"""gemv_sm90: its splits, rings and partial sums, on the CPU by tests/emulation, against float64."""

import functools
import itertools

import cases
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import ACTIVATIONS, random_weight, random_x
from sm90_checks import check_epilogue, check_rows_stay_alone, memory_at

import jax_qgemm as qg
from jax_qgemm.formats import FORMAT_NAMES, GGUF_FORMATS, get_format
from jax_qgemm.testing import check_product, product_limit

FORMATS = [
    *(f for f in FORMAT_NAMES if not f.startswith("int")),
    qg.int2(32, symmetric=False),
    qg.int3(64),
    qg.int4(128),
    qg.int4(32, symmetric=False),
    qg.int4(64, symmetric=False),
    qg.int4(256),
    qg.int4(-1, symmetric=False),
    qg.int8(-1),
    qg.int8(128, symmetric=False),
    qg.int8(64, scale_dtype="bfloat16"),
    qg.int2(64, symmetric=False),
    qg.int3(256, symmetric=False, scale_dtype="bfloat16"),
]
EXACT = [f for f in FORMATS if not isinstance(f, str) and (f.group == 0 or f.group >= 64)]
TYPES = ("float16", "bfloat16")
# Scales that are bfloat16, and in the operand.
BFLOAT16_ONLY = [qg.int4(32, scale_dtype="bfloat16"), qg.int8(32, scale_dtype="bfloat16", symmetric=False)]
# m, n, k (or a block, where that is larger), multiprocessors, kilobytes of shared memory
SHAPES = [
    (9, 130, 1024, 3, 227),
    (16, 16, 512, 8, 227),
    (17, 330, 512, 2, 110),
    (32, 200, 320, 2, 227),
    (33, 31, 1024, 1, 227),
    (64, 300, 512, 3, 160),
    (57, 144, 448, 2, 227),
]


def hopper(multiprocessors, kilobytes=227):
    return (9, multiprocessors, kilobytes << 10)


def product(emulated, x, w, **options):
    return emulated.matmul(x, w, kernel="gemv_sm90", **options)


@pytest.mark.parametrize(
    ("format", "dtype"),
    [*itertools.product(FORMATS, TYPES), *((f, "bfloat16") for f in BFLOAT16_ONLY)],
    ids=str,
)
def test_product(emulated, format, dtype):
    fmt = get_format(format)
    for case, (m, n, k, multiprocessors, kilobytes) in enumerate(SHAPES):
        k = -(-k // fmt.block) * fmt.block
        w, dense = random_weight(fmt, k, n, case)
        x, exact = random_x((m, k), dtype, case + 100)
        with emulated.device(*hopper(multiprocessors, kilobytes)):
            check_product(product(emulated, x, w), exact, dense, product_limit(dtype))


@pytest.mark.parametrize(("format", "dtype"), [*itertools.product(EXACT, TYPES), ("mxfp4", "float16")], ids=str)
def test_operands_without_scales_are_exact(emulated, format, dtype):
    """x with a mean: roundings of the weights of a group would add up."""
    for m in (16, 24, 64):
        w, dense = random_weight(get_format(format), 1024, 70, m)
        x = (np.random.default_rng(m).standard_normal((m, 1024)) + 4).astype(np.float32).astype(jnp.dtype(dtype))
        check_product(product(emulated, jnp.asarray(x), w), x.astype(np.float64), dense, 1e-9)


# Formats whose sub-scale times level is at most 2048, which float16 holds; bfloat16 holds 256.
SUB_SCALED = {"q2_k": TYPES, "q3_k": TYPES, "q4_k": ("float16",), "q5_k": ("float16",)}
# m, n, k, multiprocessors, kilobytes of shared memory: x passes through or stays, a last pass in which some warpgroups
# have no rows, slices and clusters.
SUPER_BLOCK_SHAPES = [
    (9, 200, 2560, 16, 227),
    (16, 420, 1024, 1, 227),
    (32, 330, 2048, 1, 160),
    (48, 100, 2816, 4, 170),
    (64, 420, 1536, 1, 200),
]


def k_quant(format, k, n, seed, magnitude):
    """A random weight whose float16 scales and minimums are times `magnitude`, and its dense values."""
    fmt = GGUF_FORMATS[format]
    raw = cases.random_blocks(fmt, n, k, np.random.default_rng(seed))
    blocks = raw.reshape(n, -1, fmt.block_bytes)
    for offset in {"q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2)}[format]:
        halves = blocks[..., offset : offset + 2].copy().view(np.float16) * np.float16(magnitude)
        blocks[..., offset : offset + 2] = halves.view(np.uint8)
    return qg.QTensor.from_gguf_bytes(raw, format), cases.gguf_py_dequantize(raw, fmt).T.astype(np.float64)


@pytest.mark.parametrize(("format", "dtype"), [(f, t) for f, types in SUB_SCALED.items() for t in types])
@pytest.mark.parametrize("magnitude", [2.0**-10, 1.0, 64.0])
def test_super_blocks_are_exact(emulated, format, dtype, magnitude):
    """The scale of a super-block and its minimum multiply sums, whatever their size, subnormal float16 included."""
    for case, (m, n, k, multiprocessors, kilobytes) in enumerate(SUPER_BLOCK_SHAPES):
        w, dense = k_quant(format, k, n, case, magnitude)
        x = np.random.default_rng(case).standard_normal((m, k)) + case
        x = x.astype(np.float32).astype(jnp.dtype(dtype))
        with emulated.device(*hopper(multiprocessors, kilobytes)):
            check_product(product(emulated, jnp.asarray(x), w), x.astype(np.float64), dense, 1e-9)


@pytest.mark.parametrize(("dtype", "size"), [("float16", 65504.0), ("bfloat16", 3e37)])
@pytest.mark.parametrize("format", ["q2_k", "q4_k"])
def test_sums_of_large_x(emulated, format, dtype, size):
    """A group's sum of x is beyond the largest float16, and would be beyond the largest bfloat16."""
    w, dense = k_quant(format, 512, 40, 0, 2.0**-10)
    x = np.full((20, 512), size).astype(jnp.dtype(dtype))
    got = product(emulated, jnp.asarray(x), w)
    check_product(got / size, x.astype(np.float64) / size, dense, product_limit(dtype))


# m, n, k, multiprocessors, kilobytes of shared memory
SPLIT_SHAPES = [
    (9, 200, 1024, 16, 227),
    (12, 420, 512, 2, 227),
    (12, 64, 3072, 2, 85),
    (64, 100, 1536, 2, 140),
    (16, 420, 2048, 2, 110),
]


def test_every_split(emulated):
    """Whatever the estimates say: along rows or k, alone or in clusters, with x that stays or passes through."""
    seen = []
    for case, (m, n, k, multiprocessors, kilobytes) in enumerate(SPLIT_SHAPES):
        w, dense = random_weight(qg.int4(128), k, n, case, batch=1)
        x, exact = random_x((1, m, k), "float16", case)
        with emulated.device(*hopper(multiprocessors, kilobytes)):
            for number in range(100):
                out = emulated.gemv_sm90_split(number, x, w)
                if out is None:
                    break
                got, split = out
                check_product(got, exact, dense, product_limit("float16"))
                seen.append(split)
    assert {s["rows"] for s in seen} == {s["slices"] for s in seen} == {1, 2, 3, 4}
    assert {(s["cluster"], s["x_stays"], s["buffers"]) for s in seen} == {
        (c, stays, buffers) for c in (1, 2) for stays in (False, True) for buffers in (1, 2)
    }


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("k", [8, 200, 264, 1096])
def test_k_that_is_no_multiple_of_anything(emulated, k, dtype):
    """Weights behind k are padding, with a scale of the channel's own; x is zero there."""
    for format in (qg.int8(-1), qg.int4(-1, symmetric=False)):
        w, dense = random_weight(format, k, 40, 0)
        for m in (9, 40):
            x, exact = random_x((m, k), dtype, 1)
            check_product(product(emulated, x, w), exact, dense, product_limit(dtype))


@pytest.mark.parametrize("multiprocessors", [1, 6])
@pytest.mark.parametrize("format", ["q4_0", "q4_k", qg.int4(128)], ids=str)
def test_batch(emulated, format, multiprocessors):
    with emulated.device(*hopper(multiprocessors)):
        for m, n, k in ((10, 300, 512), (20, 40, 256), (64, 130, 768)):
            w, dense = random_weight(format, k, n, 0, batch=3)
            x, exact = random_x((3, m, k), "bfloat16", 1)
            check_product(product(emulated, x, w), exact, dense, product_limit("bfloat16"))


def test_results_do_not_depend_on_the_tokens_around(emulated):
    """Bitwise the same for a row of x, alone or among others, and twice."""
    w, _ = random_weight("q6_k", 512, 300, 0)
    x, _ = random_x((16, 512), "float16", 0)
    first = product(emulated, x, w)
    assert np.array_equal(product(emulated, x, w), first)
    assert np.array_equal(product(emulated, x[:9], w), first[:9])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("m", "n", "aligned", "gated"),
    [
        (9, 160, True, False),
        (20, 160, True, True),
        (64, 96, True, True),
        (40, 96, False, False),
        (13, 96, False, True),
        (64, 61, True, False),
    ],
)
def test_epilogue(emulated, m, n, aligned, gated, activation):
    check_epilogue(functools.partial(product, emulated), m, n, aligned, gated, activation)


def test_infinite_and_nan_rows_stay_alone(emulated):
    for dtype in TYPES:
        check_rows_stay_alone(functools.partial(product, emulated), 30, dtype)


@pytest.mark.parametrize(
    ("format", "m", "k", "dtype", "reason"),
    [
        ("q4_0", 16, 128, "float32", "float32 x"),
        ("q4_0", 65, 128, "float16", "more than 64 rows"),
        (qg.int8(-1), 16, 60, "float16", "multiple of 8"),
        (qg.int4(16), 16, 128, "float16", "groups of 16"),
        (qg.int4(scale_dtype="float32"), 16, 128, "bfloat16", "float32 scales"),
        *((f, 16, 128, "float16", "scales that float16 does not hold") for f in BFLOAT16_ONLY),
    ],
    ids=str,
)
def test_says_why_it_refuses(emulated, format, m, k, dtype, reason):
    w, _ = random_weight(format, k, 16, 0)
    x, _ = random_x((m, k), dtype, 1)
    with pytest.raises(RuntimeError, match=reason):
        product(emulated, x, w)


def test_refuses_x_that_is_not_aligned(emulated):
    w, _ = random_weight("q4_0", 64, 16, 0)
    with pytest.raises(RuntimeError, match="aligned to 16 bytes"):
        product(emulated, memory_at(1, (16, 64), np.dtype(np.float16)), w)


def test_refuses_other_gpus(emulated):
    w, _ = random_weight("q4_0", 64, 16, 0)
    x, _ = random_x((16, 64), "float16", 1)
    for major in (8, 10):
        with emulated.device(major, 3, 227 << 10), pytest.raises(RuntimeError, match=r"compute capability 9\.0"):
            product(emulated, x, w)
