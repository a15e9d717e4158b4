"""Transforms of products of quantized activations, and their derivatives, against float64."""

import functools

import epilogue_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_weight
from quantized_x import F32, LIMITS, quantized

import jax_qgemm as qg
from jax_qgemm.ops import integer_dense
from jax_qgemm.testing import check_product, nmse, product_limit

pytestmark = pytest.mark.usefixtures("backend")

STACK = 3


@pytest.fixture(params=["auto", "dense", "dense in slabs"])
def kernel(request, monkeypatch):
    if "slabs" in request.param:
        jax.clear_caches()  # of products in one slab
        monkeypatch.setattr(integer_dense, "SCRATCH_BYTES", 1 << 12)
    return request.param.split()[0]


_PAIRS = (("int8", qg.int8(64, symmetric=False)), ("fp8", qg.int4(-1)))


@pytest.fixture(params=_PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def stacked(request):
    """Format of x, a stacked weight and its dense values, x (STACK, 5, 192)."""
    x_format, format = request.param
    rng = np.random.default_rng(10)
    w, dense = random_weight(format, 45, 192, rng, batch=STACK)
    return x_format, jax.tree.map(jnp.asarray, w), dense, rng.standard_normal((STACK, 5, 192)).astype(F32)


def test_vmap(stacked, kernel):
    x_format, w, dense, x = stacked
    limit, exact = LIMITS[x_format], quantized(x, x_format)
    matmul = functools.partial(qg.matmul, x_format=x_format, kernel=kernel)
    by_rows = jax.jit(jax.vmap(matmul, (1, None), 1))(x.swapaxes(0, 1), w[0])
    check_product(jnp.swapaxes(by_rows, 0, 1), exact, dense[0], limit)
    by_weights = jax.jit(jax.vmap(matmul, (None, 0)))(x[0], w)
    check_product(by_weights, np.broadcast_to(exact[0], x.shape), dense, limit)
    check_product(jax.jit(jax.vmap(matmul))(x, w), exact, dense, limit)
    shared = qg.quantize_activations(jnp.asarray(x), x_format)
    by_codes = jax.jit(jax.vmap(functools.partial(qg.matmul, kernel=kernel)))(shared, w)
    check_product(by_codes, exact, dense, limit)
    nested = jax.jit(jax.vmap(jax.vmap(matmul, (0, None)), (None, 0)))(x, w)
    swapped = jax.jit(jax.vmap(jax.vmap(matmul, (None, 0)), (0, None)))(x, w)
    for i in range(STACK):
        check_product(nested[i], exact, dense[i], limit)
        check_product(swapped[:, i], exact, dense[i], limit)


def test_vmap_of_one_product_is_one_product(stacked):
    x_format, w, _, x = stacked
    for axes in ((0, None), (None, 0), (0, 0)):
        mapped = jax.vmap(functools.partial(qg.matmul, x_format=x_format), axes)
        jaxpr = str(jax.make_jaxpr(mapped)(x, w if axes[1] == 0 else w[0]))
        assert jaxpr.count("= integer_matmul[") == 1
        assert "scan" not in jaxpr
        assert "while" not in jaxpr


@pytest.mark.parametrize(
    "axes",
    [
        (0, None, None, None),
        (None, 0, None, None),
        (None, None, 0, None),
        (None, None, None, 0),
        (0, None, None, 0),
        (0, None, 0, None),
        (0, 0, None, 0),
        (0, 0, 0, 0),
    ],
    ids=str,
)  # of x, w, bias and residual
def test_vmap_with_an_epilogue(stacked, axes):
    x_format, w, dense, x = stacked
    rng = np.random.default_rng(11)
    bias, residual = rng.standard_normal((STACK, 45)).astype(F32), rng.standard_normal((STACK, 5, 45)).astype(F32)

    def function(x, w, bias, residual):
        return qg.matmul(x, w, x_format=x_format, bias=bias, activation="silu", residual=residual)

    operands = [a if axis == 0 else jax.tree.map(lambda a: a[1], a)
                for a, axis in zip((x, w, bias, residual), axes, strict=True)]  # fmt: skip
    out = jax.jit(jax.vmap(function, axes))(*operands)
    exact = (quantized(x, x_format), dense, bias, residual)
    for i in range(STACK):
        x_i, dense_i, bias_i, residual_i = (a[i if axis == 0 else 1] for a, axis in zip(exact, axes, strict=True))
        expected = oracle.fused(x_i, dense_i, bias=bias_i, activation="silu", residual=residual_i)
        assert nmse(out[i], expected) <= LIMITS[x_format]


def test_scan_over_layers_and_over_activations(stacked, kernel):
    x_format, w, dense, x = stacked
    exact = quantized(x, x_format)

    @jax.jit
    def layers(x, w):
        step = functools.partial(qg.matmul, x_format=x_format, kernel=kernel)
        return jax.lax.scan(lambda carry, layer: (carry, step(x, layer)), None, w)[1]

    check_product(layers(x[0], w), np.broadcast_to(exact[0], x.shape), dense, LIMITS[x_format])

    @jax.jit
    def tokens(shared, w):
        return jax.lax.scan(lambda carry, x: (carry, qg.matmul(x, w, kernel=kernel)), None, shared)[1]

    shared = qg.quantize_activations(jnp.asarray(x), x_format)
    check_product(tokens(shared, w[1]), exact, dense[1], LIMITS[x_format])


# Derivatives.


def test_straight_through_gradient_is_that_of_x_itself(stacked):
    x_format, w, dense, x = stacked
    g = np.random.default_rng(12).standard_normal((5, 45)).astype(F32)
    function = functools.partial(qg.matmul, x_format=x_format, straight_through=True, precision="highest")
    limit = product_limit("float32", highest=True)
    out, pull = jax.vjp(lambda x: function(x, w[1]), jnp.asarray(x[0]))
    check_product(out, quantized(x[0], x_format), dense[1], LIMITS[x_format])
    check_product(pull(g)[0], g, dense[1].T, limit)
    _, tangent = jax.jit(lambda x, t: jax.jvp(lambda x: function(x, w[1]), (x,), (t,)))(x[0], x[1])
    check_product(tangent, x[1], dense[1], limit)
    grads = jax.jit(jax.vmap(jax.grad(lambda x, w: jnp.sum(function(x, w) * g))))(x, w)
    check_product(grads, np.broadcast_to(g, (STACK, 5, 45)), dense.swapaxes(1, 2), limit)
    hessian = jax.hessian(lambda x: 0.5 * jnp.sum(function(x, w[0]) ** 2))(jnp.asarray(x[0, 0]))
    assert nmse(hessian, dense[0] @ dense[0].T) <= limit


def test_straight_through_gradient_with_an_epilogue_and_an_input_scale():
    rng = np.random.default_rng(13)
    packed, dense = random_weight(qg.int4(64), 48, 128, rng)
    permutation = jnp.asarray(rng.permutation(128), jnp.int32)
    input_scale = jnp.asarray(rng.uniform(0.5, 2, 128), jnp.float32)
    w = qg.QTensor(
        packed.planes, packed.format, packed.padding,
        permutation=permutation, input_scale=input_scale, global_scale=jnp.float32(0.37),
    )  # fmt: skip
    x, residual = (rng.standard_normal((9, size)).astype(F32) / 5 for size in (128, 48))
    bias = rng.standard_normal(48).astype(F32)

    def loss(x, bias, residual):
        out = qg.matmul(
            x, w, x_format="int8", straight_through=True, precision="highest", bias=bias, activation="relu",
            residual=residual,
        )  # fmt: skip
        return jnp.sum(out * jnp.arange(48.0))

    dx, dbias, dresidual = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, bias, residual)
    scaled = dense * np.float64(F32(0.37))
    sums = quantized(x[:, permutation] / np.asarray(input_scale), "int8") @ scaled + bias
    g = np.arange(48) * (sums > 0)
    expected = np.empty(x.shape)
    expected[:, permutation] = g @ scaled.T / np.asarray(input_scale)
    assert nmse(dx, expected) <= 1e-11
    np.testing.assert_allclose(dbias, g.sum(0), rtol=1e-6)
    np.testing.assert_array_equal(dresidual, np.broadcast_to(np.arange(48), (9, 48)))


def test_derivatives_are_refused_unless_straight_through():
    w, _ = random_weight(qg.int4(64), 48, 128, np.random.default_rng(14))
    x = jnp.ones((3, 128))
    for function in (
        lambda x: qg.matmul(x, w, x_format="int8"),
        lambda x: qg.matmul(x, w, x_format="fp8", bias=jnp.ones(48)),
        lambda x: qg.matmul(qg.quantize_activations(x, "int8"), w),
        lambda x: qg.quantize_activations(x, "q8_1").dequantize(),
    ):
        for differentiate in (jax.grad, jax.jacfwd):
            with pytest.raises(TypeError, match=r"x is differentiated.*straight_through=True.*stop_gradient"):
                differentiate(lambda x, f=function: jnp.sum(f(x)))(x)
    shared = qg.quantize_activations(x, "int8")
    with pytest.raises(TypeError, match=r"scales of x \(int8\) are differentiated.*straight_through=True"):
        jax.grad(lambda s: jnp.sum(qg.matmul(s, w)), allow_int=True)(shared)

    def of_others(bias, residual):
        product = qg.matmul(jax.lax.stop_gradient(x * bias[0]), w, x_format="int8", bias=bias, residual=residual)
        return jnp.sum(product * 2)

    dbias, dresidual = jax.jit(jax.grad(of_others, (0, 1)))(jnp.ones(48), jnp.ones((3, 48)))
    np.testing.assert_array_equal(dbias, np.full(48, 6))
    np.testing.assert_array_equal(dresidual, np.full((3, 48), 2))
