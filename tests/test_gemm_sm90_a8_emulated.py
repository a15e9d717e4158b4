"""gemm_sm90_a8, products of codes with codes by wgmma, on the CPU by tests/emulation, against float64 with the same
codes."""

import functools
from typing import Any

import cases
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from emulated import ACTIVATIONS, random_weight
from pairwise import cover
from quantized_x import LIMITS, quantize
from sm90_checks import check_epilogue, memory_at

import jax_qgemm as qg
from jax_qgemm.testing import check_product, product_limit

CODES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
INT4 = [
    qg.int4(-1),
    qg.int4(-1, scale_dtype="bfloat16"),
    qg.int4(-1, symmetric=False, scale_dtype="float32"),
    qg.int4(64),
    qg.int4(64, symmetric=False, scale_dtype="bfloat16"),
    qg.int4(128),
    qg.int4(128, symmetric=False),
    qg.int4(256, scale_dtype="bfloat16"),
    qg.int4(256, symmetric=False),
]
INT8 = [
    qg.int8(-1),
    qg.int8(-1, scale_dtype="float32"),
    qg.int8(64, scale_dtype="bfloat16"),
    qg.int8(128),
    qg.int8(256),
]
OPERANDS = [*(("int8", f) for f in (*INT4, *INT8)), *(("fp8", f) for f in INT4)]
SMALL_OPERANDS = [("int8", qg.int4(128)), ("int8", qg.int8(-1)), ("fp8", qg.int4(64, symmetric=False))]
TILED_OPERANDS = [
    *(("int8", f) for f in (qg.int4(-1), qg.int4(64), qg.int4(256, symmetric=False), qg.int8(-1), qg.int8(128))),
    *(("fp8", f) for f in (qg.int4(-1, symmetric=False), qg.int4(64), qg.int4(128))),
]
# m, n, k, multiprocessors.
TILED_SHAPES = [
    (33, 16, 256, 4),
    (33, 520, 256, 4),
    (65, 16, 256, 4),
    (65, 16, 512, 4),
    (65, 520, 256, 4),
    (140, 16, 256, 4),
    (140, 16, 512, 4),
    (140, 520, 256, 4),
    (200, 300, 256, 6),
    (257, 16, 768, 4),
    (257, 300, 512, 4),
    (520, 16, 256, 4),
]
OUT = ("float32", "float16", "bfloat16")


def hopper(multiprocessors):
    return (9, multiprocessors, 227 << 10)


def product(emulated, x, w, **options):
    """x: codes and scales."""
    codes, scales = x
    return emulated.matmul(codes, w, kernel="gemm_sm90_a8", x_scales=scales, **options)


def values(x):
    codes, scales = x
    return codes.astype(np.float64) * scales.astype(np.float64)[..., None]


def random_x(shape, x_format, seed):
    """Codes and scales of normal data, and their values."""
    x = quantize(np.random.default_rng(seed).standard_normal(shape), x_format)
    return x, values(x)


def limit(x_format, out_dtype="float32"):
    return LIMITS[x_format] if out_dtype == "float32" else max(LIMITS[x_format], product_limit(out_dtype))


def case_id(case: Any) -> str:
    if isinstance(case, dict | tuple):
        return "-".join(map(case_id, case.values() if isinstance(case, dict) else case))
    return str(case).replace(" ", "")


PRODUCTS = cover(
    {
        "operands": OPERANDS,
        "m": (1, 3, 64, 65, 128, 129, 200, 256, 257, 300),
        "n": (1, 16, 40, 128, 129, 200, 300),
        "k": (16, 48, 64, 80, 128, 192, 320, 1024),
        "out_dtype": OUT,
        "multiprocessors": (1, 2, 4, 8),
    },
    seed=6,
)


@pytest.mark.parametrize("case", PRODUCTS, ids=case_id)
def test_product(emulated, case):
    """With groups, k is the next multiple of one."""
    (x_format, format), m, n, out_dtype = case["operands"], case["m"], case["n"], case["out_dtype"]
    k = -(-case["k"] // format.block) * format.block
    w, dense = random_weight(format, k, n, 0)
    x, exact = random_x((m, k), x_format, 1)
    with emulated.device(*hopper(case["multiprocessors"])):
        out = product(emulated, x, w, out_dtype=out_dtype)
    check_product(out, exact, dense, limit(x_format, out_dtype))


@pytest.mark.parametrize("operands", TILED_OPERANDS, ids=case_id)
def test_every_tile(emulated, operands):
    """Each size of a tile; tiles computed whole, with k split, and whole ones before split ones."""
    x_format, format = operands
    group = min(format.group, 128) or (128 if x_format == "fp8" else 0)
    choices = set()
    for case, (m, n, k, multiprocessors) in enumerate(TILED_SHAPES):
        w, dense = random_weight(format, k, n, case)
        x, exact = random_x((m, k), x_format, case + 100)
        with emulated.device(*hopper(multiprocessors)):
            check_product(product(emulated, x, w), exact, dense, limit(x_format))
        bits = 8 * w.nbytes / (k * -(-n // 16) * 16)
        choices.add(emulated.gemm_sm90_a8_choice(m, n, k, bits, group, multiprocessors))
    tiles = {(64, 128), (128, 128), (192, 128)} if group else {(64, 128), (128, 128), (256, 128), (128, 256)}
    assert {choice[:2] for choice in choices} == tiles
    assert {choice[2] for choice in choices} == {"whole", "split", "tail"}


@pytest.mark.parametrize("operands", SMALL_OPERANDS, ids=case_id)
@pytest.mark.parametrize("clusters", [1, 2])
def test_many_tiles_a_cluster(emulated, operands, clusters):
    """The ring of x and w goes on from tile to tile, weight and group of the walk."""
    x_format, format = operands
    with emulated.device(*hopper(2 * clusters)):
        for m, n, k in ((150, 300, 512), (520, 260, 256), (70, 400, 768)):
            w, dense = random_weight(format, k, n, 0, batch=2)
            x, exact = random_x((2, m, k), x_format, 1)
            check_product(product(emulated, x, w), exact, dense, limit(x_format))
            launch = emulated.last_launch()
            assert (launch["blocks"], launch["cluster"]) == (2 * clusters, 2)


@pytest.mark.parametrize("operands", SMALL_OPERANDS, ids=case_id)
def test_experts(emulated, operands):
    x_format, format = operands
    experts = np.array([2, 0, -7, 2, 1, 2**31 - 1], np.int32)
    w, dense = random_weight(format, 256, 40, 0, batch=3)
    x, exact = random_x((len(experts), 20, 256), x_format, 1)
    out = product(emulated, x, w, experts=experts)
    check_product(out, exact, dense[np.clip(experts, 0, 2)], limit(x_format))


def weight_of_levels(format, levels, zero_points):
    """Of levels (n, k), zero points (n, groups) unless symmetric, and scales of 1: a weight and its values (k, n)."""
    n, k = levels.shape
    zeros = np.broadcast_to(1 << format.bits - 1 if format.symmetric else zero_points, (n, k // (format.group or k)))
    fields = {
        "codes": (levels - 128 if format.bits == 8 else levels).astype(np.uint8),
        "scales": np.ones(zeros.shape, format.scale_dtype).view(np.uint16),
    }
    if not format.symmetric:
        fields["zero_points"] = zeros.astype(np.uint8)
    return cases.pack(fields, format, n, k), (levels - np.repeat(zeros, k // zeros.shape[1], axis=1)).T


@pytest.mark.parametrize("m", [64, 129, 300])
@pytest.mark.parametrize(
    "format",
    [qg.int8(-1), qg.int8(64), qg.int8(256), qg.int4(-1), qg.int4(-1, symmetric=False), qg.int4(64, symmetric=False)],
    ids=str,
)
def test_sums_of_int8_codes_are_exact(emulated, format, m):
    """Of the largest codes of either sign. They are below 2^24, so that float32 has them all."""
    rng = np.random.default_rng(0)
    k, n, ends = 1024, 40, [0, (1 << format.bits) - 1]
    levels, zero_points = rng.choice(ends, (n, k)), rng.choice(ends, (n, k // (format.group or k)))
    levels[: n // 4], levels[n // 4 : n // 2] = ends
    w, dense = weight_of_levels(format, levels, zero_points)
    codes = rng.choice(np.array([-127, 127], np.int8), (m, k))
    codes[: m // 4], codes[m // 4 : m // 2] = 127, -127
    expected = codes.astype(np.int64) @ dense
    assert np.abs(expected).max() < 2**24
    assert np.array_equal(product(emulated, (codes, np.ones(m, np.float32)), w), expected)


def test_the_longest_sum_of_int8_codes(emulated):
    """Over the last k that the kernel does not refuse."""
    k = 66048
    w, dense = weight_of_levels(qg.int8(-1), np.zeros((16, k), np.int64), None)
    codes = np.full((2, k), 127, np.int8)
    codes[1] = -127
    expected = (codes.astype(np.int64) @ dense).astype(np.float32)
    assert np.array_equal(product(emulated, (codes, np.ones(2, np.float32)), w), expected)


@pytest.mark.parametrize("group_size", [-1, 256])
def test_sums_of_float8_codes_end_before_they_lose_much(emulated, group_size):
    """All products are positive here: sums over 512 of k or more would be off by more than the limit."""
    rng = np.random.default_rng(0)
    format = qg.int4(group_size, symmetric=False)
    w, dense = weight_of_levels(format, rng.integers(0, 16, (40, 1024)), 0)
    x = quantize(rng.standard_normal((70, 1024)) + 4, "fp8")
    check_product(product(emulated, x, w), values(x), dense, LIMITS["fp8"])


@pytest.mark.parametrize("operands", OPERANDS, ids=case_id)
@pytest.mark.parametrize(("m", "n"), [(40, 24), (130, 61), (300, 264)])
def test_results_are_rounded_once(emulated, operands, m, n):
    """Rows of the identity give each weight alone, so that every operation is known to the bit."""
    x_format, format = operands
    k = max(format.block, 128)
    w, dense = random_weight(format, k, n, 2)
    codes = np.zeros((m, k), CODES[x_format])
    codes[np.arange(m), np.arange(m) % k] = 1
    scales = np.exp2(np.arange(m) % 5 - 2).astype(np.float32)
    expected = dense[np.arange(m) % k] * scales[:, None]
    for out_dtype in OUT:
        got = product(emulated, (codes, scales), w, out_dtype=out_dtype)
        assert np.array_equal(got, expected.astype(np.float32).astype(jnp.dtype(out_dtype)).astype(np.float64))


@pytest.mark.parametrize("operands", SMALL_OPERANDS, ids=case_id)
@pytest.mark.parametrize("m", [33, 257])
def test_two_runs_agree_to_the_bit(emulated, operands, m):
    x_format, format = operands
    w, _ = random_weight(format, 512, 300, 0)
    x, _ = random_x((m, 512), x_format, 0)
    assert np.array_equal(product(emulated, x, w), product(emulated, x, w))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("m", "n", "aligned", "gated", "operands"),
    [
        (90, 160, True, False, SMALL_OPERANDS[0]),
        (90, 160, True, True, SMALL_OPERANDS[2]),
        (300, 96, True, True, SMALL_OPERANDS[1]),
        (70, 96, False, False, SMALL_OPERANDS[2]),
        (70, 96, False, True, SMALL_OPERANDS[0]),
        (70, 61, True, False, SMALL_OPERANDS[1]),
    ],
    ids=str,
)
def test_epilogue(emulated, m, n, aligned, gated, operands, activation):
    x_format, format = operands
    make_x = functools.partial(random_x, x_format=x_format, seed=1)
    check_epilogue(
        functools.partial(product, emulated),
        *(m, n, aligned, gated, activation),
        make_x=make_x, format=format, limit=limit(x_format),
    )  # fmt: skip


@pytest.mark.parametrize("out_dtype", OUT[1:])
@pytest.mark.parametrize("n", [64, 61])
@pytest.mark.parametrize("x_format", CODES)
def test_16_bit_residual_and_bias(emulated, x_format, n, out_dtype):
    rng = np.random.default_rng(n)
    w, dense = random_weight(qg.int4(64), 128, n, 0)
    x, exact = random_x((70, 128), x_format, 1)
    bias = rng.standard_normal(n).astype(out_dtype)
    residual = rng.standard_normal((70, n)).astype(out_dtype)
    out = product(emulated, x, w, bias=bias, residual=residual, out_dtype=out_dtype)
    added = out - bias.astype(np.float64) - residual.astype(np.float64)
    check_product(added, exact, dense, limit(x_format, out_dtype))


@pytest.mark.parametrize("operands", SMALL_OPERANDS, ids=case_id)
def test_nan_and_zero_rows_stay_alone(emulated, operands):
    """The scale of a row with a NaN is NaN, that of a row of zeros is zero."""
    x_format, format = operands
    w, dense = random_weight(format, 256, 300, 3)
    for m in (5, 70, 260):
        (codes, scales), _ = random_x((m, 256), x_format, 4)
        scales[[1, m - 2]] = np.nan
        codes[m // 2], scales[m // 2], scales[0] = 0, 0, 0
        out = product(emulated, (codes, scales), w)
        assert np.isnan(out[[1, m - 2]]).all()
        assert np.array_equal(out[[0, m // 2]], np.zeros((2, 300)))
        kept = np.delete(np.arange(m), [1, m - 2])
        check_product(out[kept], values((codes[kept], scales[kept])), dense, limit(x_format))


def test_nan_of_float8_codes_stays_alone(emulated):
    w, dense = random_weight(qg.int4(-1), 192, 40, 3)
    (codes, scales), _ = random_x((70, 192), "fp8", 4)
    codes[1, 7] = np.nan
    out = product(emulated, (codes, scales), w)
    assert np.isnan(out[1]).all()
    kept = np.delete(np.arange(70), 1)
    check_product(out[kept], values((codes[kept], scales[kept])), dense, limit("fp8"))


@pytest.mark.parametrize("operands", SMALL_OPERANDS, ids=case_id)
def test_zeros(emulated, operands):
    x_format, format = operands
    w, _ = random_weight(format, 128, 40, 0)
    x = np.zeros((70, 128), CODES[x_format]), np.zeros(70, np.float32)
    assert np.array_equal(product(emulated, x, w), np.zeros((70, 40)))


@pytest.mark.parametrize(
    ("x_format", "format", "k", "reason"),
    [
        ("int8", qg.int4(-1), 24, "multiple of 16"),
        ("fp8", qg.int4(-1), 200, "multiple of 16"),
        ("int8", qg.int8(-1), 66064, "may leave int32"),
        ("int8", qg.int4(16), 128, "groups of"),
        ("int8", qg.int4(32), 128, "groups of"),
        ("int8", qg.int4(64, scale_dtype="float32"), 128, "float32 scales"),
        ("int8", qg.int8(-1, symmetric=False), 128, "zero points"),
        ("fp8", qg.int8(-1), 128, "int8 weights with fp8 x"),
        ("int8", qg.int2(64), 128, "int4 and int8 weights alone"),
        ("int8", qg.formats.get_format("q4_0"), 128, "int4 and int8 weights alone"),
    ],
    ids=case_id,
)
def test_says_why_it_refuses(emulated, x_format, format, k, reason):
    w, _ = random_weight(format, k, 16, 0)
    x, _ = random_x((40, k), x_format, 1)
    with pytest.raises(RuntimeError, match=reason):
        product(emulated, x, w)


def test_refuses_x_that_is_not_aligned(emulated):
    w, _ = random_weight(qg.int4(64), 64, 16, 0)
    with pytest.raises(RuntimeError, match="aligned to 16 bytes"):
        product(emulated, (memory_at(1, (40, 64), CODES["int8"]), np.ones(40, np.float32)), w)


def test_refuses_other_gpus(emulated):
    w, _ = random_weight(qg.int4(64), 64, 16, 0)
    x, _ = random_x((40, 64), "int8", 1)
    for major in (8, 10):
        with emulated.device(major, 3, 227 << 10), pytest.raises(RuntimeError, match=r"compute capability 9\.0"):
            product(emulated, x, w)
