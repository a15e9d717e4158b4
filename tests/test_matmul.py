"""The product and its transpose over tests/cases.py: float64 products with independently decoded weights."""

import functools
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, Case, random_weight, random_x

import jax_qgemm as qg
from jax_qgemm.formats import GGUF_FORMATS
from jax_qgemm.testing import check_product, product_limit


@functools.partial(jax.jit, static_argnames=("precision", "out_dtype"))
def product(x, w, precision=None, out_dtype=None):
    return qg.matmul(x, w, precision=precision, out_dtype=out_dtype)


@functools.partial(jax.jit, static_argnames=("precision", "out_dtype"))
def transposed_product(cotangent, w, precision=None, out_dtype=None):
    """cotangent @ w.T, as the derivative of the product of an x of type `out_dtype`."""
    x = jax.ShapeDtypeStruct((*cotangent.shape[:-1], w.shape[0]), out_dtype or cotangent.dtype)
    forward = functools.partial(qg.matmul, w=w, precision=precision, out_dtype=cotangent.dtype)
    return jax.linear_transpose(forward, x)(cotangent)[0]


def check_case(case: Case) -> None:
    rng = case.rng()
    w, dense = random_weight(case.format, case.n, case.k, rng)
    assert w.shape == (case.k, case.n)
    function, dense = (product, dense) if case.op == "product" else (transposed_product, dense.T)
    x = random_x(case, (case.m, len(dense)), rng)
    # With an offset the terms of a sum do not cancel: it may exceed their energy, and so may its rounding.
    out_dtype = "float32" if case.data == "offset" else case.dtype.name
    out = function(x, w, precision=case.precision, out_dtype=out_dtype)
    assert out.dtype == jnp.dtype(out_dtype)
    cases.check_case_product(case, out, x, dense)


@pytest.mark.parametrize("case", cases.kernel_cases(), ids=str)
def test_cover(case):
    check_case(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.gpu_kernel_cases(), ids=str)
def test_gpu_cover(case):
    check_case(case)


# What the cover does not reach.


@pytest.mark.parametrize("format", FORMATS[::3], ids=str)
def test_host_instruction_sets(instruction_set, format):
    """The cover runs the best one that the CPU has; these shapes go through every block size of each."""
    for m, x_type, op in itertools.product((1, 5, 131), ("bfloat16", "float32 highest"), cases.OPS):
        check_case(Case(format, m, 45, "tail", x_type, op=op))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 2, 1, 4), (2, 0, 3)], ids=str)
def test_leading_axes(shape):
    rng = np.random.default_rng(0)
    w, dense = random_weight(qg.int4(32), 48, 96, rng)
    x = rng.standard_normal((*shape, 96)).astype(np.float32)
    out = product(x, w)
    assert out.shape == (*shape, 48)
    check_product(np.reshape(out, (-1, 48)), x.reshape(-1, 96), dense, product_limit("float32"))


@pytest.mark.parametrize("m", [3, 40])
def test_no_k_at_all_is_zero(m):
    """A per-channel weight of k = 0, which `quantize` refuses but arrays can make."""
    format = qg.int8(-1)
    planes = [jnp.zeros(format.plane_shape(plane, 33, 0), format.plane_dtype(plane)) for plane in format.planes]
    w = qg.QTensor(tuple(planes), format, (0, 15))
    assert w.shape == (0, 33)
    out = product(np.zeros((m, 0), np.float32), w)
    np.testing.assert_array_equal(np.asarray(out), np.zeros((m, 33), np.float32))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_any_finite_scale(format):
    """Scales over the whole range of their type, subnormal ones included, and x that undoes none of it."""
    rng = np.random.default_rng(1)
    n, k, m = 33, cases.k_of("tail", format), 17
    if format.name in GGUF_FORMATS:
        any_scale = format.name != "mxfp4"  # whose largest scales make infinite weights
        raw = cases.random_blocks(format, n, k, rng, any_scale=any_scale)
        w, dense = qg.QTensor.from_gguf_bytes(raw, format), cases.gguf_py_dequantize(raw, format).T
    else:
        magnitude = 3e4 if format.scale_dtype == "float16" else 1e30
        w, dense = random_weight(format, n, k, rng, magnitude=magnitude)
    x = rng.standard_normal((m, k)).astype(np.float32)
    check_product(product(x, w), x, dense, product_limit("float32"))
    # Beyond float16's range: bfloat16 x must not take a detour through it.
    x16 = x.astype(jnp.bfloat16)
    check_product(product(x16, w, out_dtype="float32"), x16, dense, product_limit("bfloat16"))


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("format", ["q4_0", "q4_k", "int8"])
def test_nan_and_inf_stay_in_their_rows(format, bad, dtype, m):
    rng = np.random.default_rng(2)
    w, dense = random_weight(qg.formats.get_format(format), 35, 256, rng)
    x = rng.standard_normal((m, 256)).astype(jnp.dtype(dtype))
    rows = [1, m - 1]
    x[rows, [7, 200]] = bad
    out = np.asarray(product(x, w))
    assert not np.isfinite(out[rows].astype(np.float32)).any()
    clean = [i for i in range(m) if i not in rows]
    check_product(out[clean], x[clean], dense, product_limit(dtype, minimums=format == "q4_k"))


@pytest.mark.parametrize("op", [product, transposed_product])
@pytest.mark.parametrize("format", FORMATS[::3], ids=str)
def test_two_runs_agree_to_the_bit(format, op):
    rng = np.random.default_rng(3)
    w, _ = random_weight(format, 509, 1024, rng)
    x = rng.standard_normal((33, 1024 if op is product else 509)).astype(np.float32)
    first, second = (np.asarray(op(x, w)).view(np.uint32) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_rows_do_not_depend_on_each_other():
    """A row of the result is the same to the bit whatever stands in the others, within one shape."""
    rng = np.random.default_rng(4)
    w, _ = random_weight(qg.formats.get_format("q4_0"), 64, 512, rng)
    x = rng.standard_normal((20, 512)).astype(np.float32)
    other = np.where(np.arange(20)[:, None] == 11, x, 1e6).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(product(x, w))[11], np.asarray(product(other, w))[11])


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16", "float32"])
def test_out_dtype(x_dtype, out_dtype):
    rng = np.random.default_rng(5)
    w, dense = random_weight(qg.formats.get_format("q5_0"), 100, 320, rng)
    x = rng.standard_normal((19, 320)).astype(jnp.dtype(x_dtype))
    out = product(x, w, out_dtype=out_dtype)
    assert out.dtype == jnp.dtype(out_dtype)
    # The sums are float32 whatever x is: a float32 result of float16 x is not rounded through float16.
    limit = product_limit("float32") if out_dtype == "float32" else product_limit(out_dtype)
    check_product(out, x, dense, limit)


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16"])
def test_results_are_rounded_to_nearest(out_dtype):
    """All but the few whose exact value lies next to the middle of two numbers; truncation would miss half."""
    rng = np.random.default_rng(12)
    w, dense = random_weight(qg.formats.get_format("q4_0"), 256, 256, rng)
    x = rng.standard_normal((32, 256)).astype(jnp.bfloat16)
    expected = (x.astype(np.float64) @ dense).astype(jnp.dtype(out_dtype))
    assert np.mean(np.asarray(product(x, w, out_dtype=out_dtype)) == expected) > 0.99


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_kernels_by_name(kernel):
    rng = np.random.default_rng(7)
    w, dense = random_weight(qg.formats.get_format("q4_1"), 33, 64, rng)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    out = jax.jit(functools.partial(qg.matmul, kernel=kernel, precision="highest"))(x, w)
    check_product(out, x, dense, product_limit("float32", highest=True))


def test_default_matmul_precision_is_followed():
    rng = np.random.default_rng(8)
    w, dense = random_weight(qg.int8(64, scale_dtype="float32"), 64, 512, rng)
    x = rng.standard_normal((32, 512)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        check_product(qg.matmul(jnp.asarray(x), w), x, dense, product_limit("float32", highest=True))


def test_stacked_slices():
    rng = np.random.default_rng(9)
    w, dense = random_weight(qg.int3(32, symmetric=False), 40, 96, rng, batch=4)
    x = rng.standard_normal((17, 96)).astype(np.float32)
    limit = product_limit("float32")
    traced = jax.jit(lambda x, w, i: qg.matmul(x, w[i]))
    for i in range(4):
        check_product(jax.jit(lambda x, w, i=i: qg.matmul(x, w[i]))(x, w), x, dense[i], limit)
        check_product(traced(x, w, i), x, dense[i], limit)


def test_donated_and_changing_buffers():
    """A loop that donates x: buffers change their place between the runs of one executable."""
    rng = np.random.default_rng(10)
    w, dense = random_weight(qg.formats.get_format("q6_k"), 256, 256, rng)
    step = jax.jit(lambda x, w: qg.matmul(x, w) / 16, donate_argnums=0)
    x = jnp.asarray(rng.standard_normal((8, 256)), jnp.float32)
    kept = []
    for _ in range(6):
        before = np.asarray(x).copy()
        x = step(x, w)
        kept.append(jnp.zeros(1000 * (len(kept) + 1)))  # so that the allocator returns other addresses
        check_product(np.asarray(x) * 16, before, dense, product_limit("float32"))


def test_metadata_of_checkpoints():
    """permutation, input_scale and global_scale, as `dequantize` documents them."""
    rng = np.random.default_rng(11)
    w, dense = random_weight(qg.formats.get_format("nvfp4"), 48, 128, rng)
    permutation = rng.permutation(128).astype(np.int32)
    input_scale = rng.uniform(0.5, 2, 128).astype(np.float32)
    w = qg.QTensor(
        w.planes, w.format, w.padding,
        permutation=jnp.asarray(permutation), input_scale=jnp.asarray(input_scale),
        global_scale=jnp.float32(0.37),
    )  # fmt: skip
    logical = np.empty_like(dense)
    logical[permutation] = dense * np.float32(0.37) / input_scale[:, None].astype(np.float64)
    np.testing.assert_allclose(np.asarray(w.dequantize()), logical, rtol=1e-6)
    x = rng.standard_normal((20, 128)).astype(np.float32)
    check_product(product(x, w), x, logical, product_limit("float32"))
    check_product(transposed_product(x[:, :48].copy(), w), x[:, :48], logical.T, product_limit("float32"))
    out = qg.take(w, np.arange(48))
    np.testing.assert_allclose(np.asarray(out), logical.T, rtol=1e-6)
