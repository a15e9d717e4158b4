"""gemm_sm90, its wgmma and its copies of x, on the CPU by tests/emulation, against float64."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from emulated import ACTIVATIONS, random_weight, random_x
from sm90_checks import check_epilogue, check_rows_stay_alone, memory_at
from test_gemm_sm90 import SHAPES as GPU_SHAPES

import jax_qgemm as qg
from jax_qgemm.formats import FORMAT_NAMES, IntFormat, get_format
from jax_qgemm.testing import check_product, product_limit

FORMATS = [
    *(f for f in FORMAT_NAMES if not f.startswith("int")),
    qg.int2(32, symmetric=False),
    qg.int3(64),
    qg.int4(128),
    qg.int4(32, symmetric=False, scale_dtype="bfloat16"),
    qg.int4(64, symmetric=False),
    qg.int4(256),
    qg.int4(-1, symmetric=False),
    qg.int8(-1),
    qg.int8(128, symmetric=False, scale_dtype="bfloat16"),
]
TYPES = ("float16", "bfloat16")
# m, n, k (or the next multiple of a block), multiprocessors.
SHAPES = [
    (33, 16, 512, 4),
    (40, 530, 256, 4),
    (65, 50, 192, 1),
    (257, 48, 512, 4),
    (100, 310, 64, 2),
    (257, 300, 320, 4),
    (200, 31, 1024, 1),
    (140, 520, 256, 4),
]


def hopper(multiprocessors):
    return (9, multiprocessors, 227 << 10)


def product(emulated, x, w, **options):
    return emulated.matmul(x, w, kernel="gemm_sm90", **options)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_product(emulated, format, dtype):
    fmt = get_format(format)
    limit = product_limit(dtype)
    choices = set()
    for case, (m, n, k, multiprocessors) in enumerate(SHAPES):
        k = -(-k // fmt.block) * fmt.block
        w, dense = random_weight(fmt, k, n, case)
        x, exact = random_x((m, k), dtype, case + 100)
        with emulated.device(*hopper(multiprocessors)):
            check_product(product(emulated, x, w), exact, dense, limit)
        bits = 8 * w.nbytes / (k * -(-n // 16) * 16)
        choices.add(emulated.gemm_sm90_choice(m, n, k, bits, multiprocessors))
    assert {choice[:2] for choice in choices} == {(64, 128), (128, 128), (256, 128), (128, 256)}
    assert {choice[2] for choice in choices} == {"whole", "split", "tail"}


def test_every_tile_is_tested_on_a_gpu(emulated):
    choices = {emulated.gemm_sm90_choice(*shape, 4.5, 132) for shape in GPU_SHAPES}
    assert {choice[:2] for choice in choices} == {(64, 128), (128, 128), (256, 128), (128, 256)}
    assert {choice[2] for choice in choices} == {"whole", "split", "tail"}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("k", [8, 200, 264])
def test_k_that_is_no_multiple_of_anything(emulated, k, dtype):
    """Weights behind k are padding, with a scale of the channel's own; x is zero there."""
    for format in (qg.int8(-1), qg.int4(-1, symmetric=False)):
        w, dense = random_weight(format, k, 40, 0)
        x, exact = random_x((70, k), dtype, 1)
        check_product(product(emulated, x, w), exact, dense, product_limit(dtype))


@pytest.mark.parametrize("m", [40, 130, 600])
def test_the_operands_are_the_weights_rounded_once(emulated, m):
    """Rows of the identity give each weight alone; nothing but its rounding is lost. A channel's scale is not in it."""
    for format in FORMATS:
        fmt = get_format(format)
        k = max(fmt.block, 64)
        w, dense = random_weight(fmt, k, 24, 3)
        x = np.zeros((m, k), np.float16)
        x[np.arange(m), np.arange(m) % k] = 1
        per_channel = isinstance(fmt, IntFormat) and fmt.group == 0
        expected = dense.astype(np.float32 if per_channel else np.float16).astype(np.float64)[np.arange(m) % k]
        assert np.isfinite(expected).all()
        assert np.array_equal(product(emulated, x, w), expected), fmt


@pytest.mark.parametrize("clusters", [1, 2])
@pytest.mark.parametrize("format", ["q4_0", "q4_k", qg.int4(128)], ids=str)
def test_many_tiles_a_cluster(emulated, format, clusters):
    """The ring of x and w goes on from tile to tile, batch and group of the walk."""
    with emulated.device(*hopper(2 * clusters)):
        for m, n, k in ((150, 300, 512), (520, 260, 256), (70, 400, 768)):
            w, dense = random_weight(format, k, n, 0, batch=2)
            x, exact = random_x((2, m, k), "bfloat16", 1)
            check_product(product(emulated, x, w), exact, dense, product_limit("bfloat16"))
            launch = emulated.last_launch()
            assert (launch["blocks"], launch["cluster"]) == (2 * clusters, 2)


@pytest.mark.parametrize("m", [33, 257])
def test_two_runs_agree_to_the_bit(emulated, m):
    """Of both kinds: where the blocks of a cluster split k, and where they do not."""
    w, _ = random_weight("q6_k", 512, 300, 0)
    x, _ = random_x((m, 512), "float16", 0)
    assert np.array_equal(product(emulated, x, w), product(emulated, x, w))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("m", "n", "aligned", "gated"),
    [
        (90, 160, True, False),
        (90, 160, True, True),
        (300, 96, True, True),
        (70, 96, False, False),
        (70, 96, False, True),
        (70, 61, True, False),
    ],
)
def test_epilogue(emulated, m, n, aligned, gated, activation):
    check_epilogue(functools.partial(product, emulated), m, n, aligned, gated, activation)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n", [8, 72, 296, 520, 524, 61])
def test_16_bit_results_are_rounded_once(emulated, n, dtype):
    """Rows of the identity give each weight alone, so that every operation of the epilogue is known to the bit."""
    rng = np.random.default_rng(n)
    k, out_type = 256, jnp.dtype(dtype)
    w, dense = random_weight("mxfp4", k, n, 0, batch=2)
    weights = dense.astype(np.float32)
    assert np.array_equal(weights.astype(out_type), dense)  # as operands, and as sums
    residual_types = [None, *TYPES, "float32"]
    choices = set()
    for case, (m, multiprocessors) in enumerate(((33, 4), (40, 1), (65, 4), (140, 4), (257, 1), (300, 4))):
        x = np.zeros((2, m, k), out_type)
        x[:, np.arange(m), np.arange(m) % k] = 1
        scale = np.asarray([0.3, 0.7], np.float32)
        for i, residual_type in enumerate(residual_types):
            bias = rng.standard_normal((2, n)).astype([*TYPES, "float32"][(case + i) % 3])
            expected = weights[:, np.arange(m) % k] * scale[:, None, None] + bias.astype(np.float32)[:, None]
            parts = {"scale": scale, "bias": bias}
            if residual_type:
                parts["residual"] = rng.standard_normal(expected.shape).astype(residual_type)
                expected += parts["residual"].astype(np.float32)
            with emulated.device(*hopper(multiprocessors)):
                got = product(emulated, jnp.asarray(x), w, out_dtype=dtype, **parts)
            assert np.array_equal(got, expected.astype(out_type)), (m, residual_type)
        choices.add(emulated.gemm_sm90_choice(m, n, k, 4.25, multiprocessors)[0])
    assert choices == {64, 128, 256}


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("n", [64, 61])
def test_types_of_the_result(emulated, n, out_dtype):
    w, dense = random_weight("iq4_nl", 256, n, 1)
    x, exact = random_x((65, 256), "float16", 2)
    check_product(product(emulated, x, w, out_dtype=out_dtype), exact, dense, product_limit("float16", out_dtype))


def test_infinite_and_nan_rows_stay_alone(emulated):
    for dtype in TYPES:
        check_rows_stay_alone(functools.partial(product, emulated), 70, dtype)


@pytest.mark.parametrize(
    ("format", "k", "dtype", "reason"),
    [
        ("q4_0", 128, "float32", "float32 x"),
        (qg.int8(-1), 60, "float16", "multiple of 8"),
        (qg.int4(16), 128, "float16", "groups of 16"),
        (qg.int4(scale_dtype="float32"), 128, "float16", "float32 scales"),
    ],
    ids=str,
)
def test_says_why_it_refuses(emulated, format, k, dtype, reason):
    w, _ = random_weight(format, k, 16, 0)
    x, _ = random_x((40, k), dtype, 1)
    with pytest.raises(RuntimeError, match=reason):
        product(emulated, x, w)


def test_refuses_x_that_is_not_aligned(emulated):
    w, _ = random_weight("q4_0", 64, 16, 0)
    with pytest.raises(RuntimeError, match="aligned to 16 bytes"):
        product(emulated, memory_at(1, (40, 64), np.dtype(np.float16)), w)


def test_refuses_other_gpus(emulated):
    w, _ = random_weight("q4_0", 64, 16, 0)
    x, _ = random_x((40, 64), "float16", 1)
    for major in (8, 10):
        with emulated.device(major, 3, 227 << 10), pytest.raises(RuntimeError, match=r"compute capability 9\.0"):
            product(emulated, x, w)
