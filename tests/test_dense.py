"""The product by way of a dense matrix: slabs, types, derivatives, batches, against float64; and when it is chosen."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, random_weight
from jax import export

import jax_qgemm as qg
from jax_qgemm._registration import DEQUANTIZE_TARGET, MATMUL_TARGET
from jax_qgemm.formats import get_format
from jax_qgemm.ops import dense
from jax_qgemm.ops.lowering import DENSE_MIN_ROWS
from jax_qgemm.testing import check_product, product_limit

needs_cuda_build = pytest.mark.skipif(not qg.build_info().cuda, reason="needs a build with CUDA")
matmul = functools.partial(qg.matmul, kernel="dense")


@pytest.fixture(params=[None, 40 * 512 * 2], ids=["one slab", "several slabs"])
def slabs(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(dense, "SCRATCH_BYTES", request.param)


def check(format, dtype, m=7, n=90, k=512, function: Callable[..., jax.Array] = matmul):
    rng = np.random.default_rng(0)
    w, exact = random_weight(get_format(format), n, k, rng)
    x = jnp.asarray(rng.standard_normal((m, k)), dtype)
    out = function(x, w, out_dtype="float32")
    check_product(out, x, exact, product_limit(dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_format(slabs, format, dtype):
    if dtype == "float16" and not format.scales_fit_float16:
        with pytest.raises(ValueError, match="float16 can't hold the scales"):
            check(format, dtype)
    else:
        check(format, dtype)


@pytest.mark.parametrize("n", [0, 16, 41, 96])
def test_columns(slabs, n):
    rng = np.random.default_rng(1)
    w, exact = random_weight(get_format("q4_0"), 96, 512, rng)
    w = qg.QTensor(tuple(p[: -(-n // 16)] for p in w.planes), w.format, (0, -n % 16))
    x = jnp.asarray(rng.standard_normal((3, 512)), jnp.float32)
    out = matmul(x, w)
    assert out.shape == (3, n)
    if n:
        check_product(out, x, exact[:, :n], product_limit("float32"))


def test_transforms(slabs):
    rng = np.random.default_rng(2)
    w, exact = random_weight(get_format("q4_k"), 96, 512, rng, batch=3)
    x, tangent = jnp.asarray(rng.standard_normal((2, 5, 512)), jnp.float32)
    cotangent = jnp.asarray(rng.standard_normal((5, 96)), jnp.float32)
    limit = product_limit("float32")
    one = jax.tree.map(lambda a: a[0], w)
    out, pulled = jax.vjp(lambda x: matmul(x, one), x)
    check_product(out, x, exact[0], limit)
    check_product(pulled(cotangent)[0], cotangent, exact[0].T, limit)
    check_product(jax.jvp(lambda x: matmul(x, one), (x,), (tangent,))[1], tangent, exact[0], limit)
    for i, part in enumerate(jax.jit(jax.vmap(matmul, (None, 0)))(x, w)):
        check_product(part, x, exact[i], limit)


@pytest.mark.parametrize("gated", [False, True])
def test_with_an_epilogue(slabs, gated):
    rng = np.random.default_rng(3)
    w, exact = random_weight(get_format("q8_0"), 96, 512, rng)
    x = jnp.asarray(rng.standard_normal((5, 512)) / 8, jnp.float32)
    bias = jnp.asarray(rng.standard_normal(96), jnp.float32)
    sums = np.asarray(x, np.float64) @ exact + bias
    if gated:
        expected = np.maximum(sums.reshape(5, 3, 2, 16)[:, :, 0], 0) * sums.reshape(5, 3, 2, 16)[:, :, 1]
        out = qg.gated_matmul(x, w, bias=bias, activation="relu", kernel="dense")
    else:
        expected = np.maximum(sums, 0)
        out = matmul(x, w, bias=bias, activation="relu")
    np.testing.assert_allclose(out, expected.reshape(5, -1), rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def module_of(m, dtype, format, function=qg.matmul, batch=None):
    w, _ = random_weight(format, 48, 256, np.random.default_rng(0), batch=batch)
    x = jax.ShapeDtypeStruct((m, 256), dtype)
    checks = qg.export_safety_checks()
    return export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(x, w).mlir_module()


def loss(x, w):
    return jnp.sum(qg.matmul(x, w).astype(jnp.float32) ** 2)


@needs_cuda_build
@pytest.mark.parametrize(
    ("m", "dtype", "format", "is_dense"),
    [
        (DENSE_MIN_ROWS, "bfloat16", "q4_0", True),
        (DENSE_MIN_ROWS, "float16", "q6_k", True),
        (DENSE_MIN_ROWS, "bfloat16", "mxfp4", True),
        (DENSE_MIN_ROWS - 1, "bfloat16", "q4_0", False),
        (DENSE_MIN_ROWS, "float32", "q4_0", False),  # its bf16 terms are better than XLA's default
        (DENSE_MIN_ROWS, "float16", "mxfp4", False),  # scales that float16 does not hold
        (DENSE_MIN_ROWS, "float16", qg.int4(128, scale_dtype="bfloat16"), False),
    ],
    ids=str,
)
def test_when_cuda_goes_this_way(m, dtype, format, is_dense):
    for function in (qg.matmul, functools.partial(qg.matmul, activation="silu")):
        module = module_of(m, dtype, get_format(format), function)
        assert (DEQUANTIZE_TARGET in module) == is_dense
        assert ("jax_qgemm.matmul" in module or "jax_qgemm.fused_matmul" in module) != is_dense


@needs_cuda_build
def test_cuda_takes_it_for_derivatives_of_few_rows():
    module = module_of(32, "bfloat16", get_format("q4_0"), jax.grad(loss))
    assert module.count(f"@{DEQUANTIZE_TARGET}") == module.count(f"@{MATMUL_TARGET}") == 1


@needs_cuda_build
def test_cuda_maps_weights_without_it():
    module = module_of(DENSE_MIN_ROWS, "bfloat16", get_format("q4_0"), jax.vmap(qg.matmul, (None, 0)), batch=3)
    assert DEQUANTIZE_TARGET not in module


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gpu_every_format(slabs, format, dtype):
    if dtype == "float16" and not format.scales_fit_float16:
        pytest.skip("float16 does not hold the scales of the format")
    check(format, dtype, m=DENSE_MIN_ROWS + 3, function=jax.jit(matmul, static_argnames="out_dtype"))


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gpu_decodes_to_the_bit(format):
    w, exact = random_weight(get_format(format), 90, 512, np.random.default_rng(4), batch=2)
    decode = jax.jit(
        lambda planes: dense.dequantize_p.bind(
            *planes,
            format=w.format,
            padding=w.padding,
            has_experts=False,
            batch_ndim=1,
            first=16,
            rows=74,
            dtype="float32",
        )
    )
    assert np.array_equal(decode(w.planes), np.swapaxes(exact, -1, -2)[:, 16:].astype(np.float32))
