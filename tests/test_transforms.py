"""Every transform of the product against float64 oracles; the derivative in x is a product with w.T."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, Case, M, random_weight, random_x, transform_cases
from jax import export

import jax_qgemm as qg
from jax_qgemm.testing import check_product, nmse, product_limit

STACK = 3


def _operands(case: Case):
    """x and cotangents (STACK, m, ...), a stacked weight (STACK, k, n) and its dense values."""
    rng = case.rng()
    w, dense = random_weight(case.format, case.n, case.k, rng, batch=STACK)
    x = random_x(case, (STACK, case.m, case.k), rng)
    return x, random_x(case, (STACK, case.m, case.n), rng), jax.tree.map(jnp.asarray, w), dense


def _matmul(case: Case):
    return functools.partial(qg.matmul, precision=case.precision)


def _jit(case):
    x, _, w, dense = _operands(case)
    out = jax.jit(lambda x, w: _matmul(case)(x, w[1]))(x[0], w)
    check_product(out, x[0], dense[1], case.limit)


def _vmap_x(case):
    x, _, w, dense = _operands(case)
    out = jax.jit(jax.vmap(_matmul(case), in_axes=(1, None), out_axes=1))(x.swapaxes(0, 1), w[0])
    check_product(jnp.swapaxes(out, 0, 1), x, dense[0], case.limit)


def _vmap_w(case):
    x, _, w, dense = _operands(case)
    out = jax.jit(jax.vmap(_matmul(case), in_axes=(None, 0)))(x[0], w)
    check_product(out, np.broadcast_to(x[0], x.shape), dense, case.limit)


def _vmap_both(case):
    x, _, w, dense = _operands(case)
    out = jax.jit(jax.vmap(_matmul(case)))(x, w)
    check_product(out, x, dense, case.limit)


def _jvp(case):
    x, _, w, dense = _operands(case)
    push = jax.jit(lambda x, t, w: jax.jvp(lambda x: _matmul(case)(x, w), (x,), (t,)))
    out, tangent = push(x[0], x[1], w[2])
    check_product(out, x[0], dense[2], case.limit)
    check_product(tangent, x[1], dense[2], case.limit)


def _grad(case):
    x, g, w, dense = _operands(case)

    def loss(x, w):
        return jnp.sum(_matmul(case)(x, w).astype(jnp.float32) * g[0].astype(jnp.float32))

    dx = jax.jit(jax.grad(loss))(x[0], w[0])
    assert dx.dtype == case.dtype
    check_product(dx, g[0], dense[0].T, case.limit)


def _scan(case):
    """Over stacked weights, with each step's derivative beside its product."""
    x, g, w, dense = _operands(case)

    def step(carry, layer):
        out, pull = jax.vjp(lambda x: _matmul(case)(x, layer), x[0])
        return carry + 1, (out, pull(g[0])[0])

    count, (out, dx) = jax.jit(lambda w: jax.lax.scan(step, 0, w))(w)
    assert count == STACK
    check_product(out, np.broadcast_to(x[0], x.shape), dense, case.limit)
    check_product(dx, np.broadcast_to(g[0], g.shape), dense.swapaxes(1, 2), case.limit)


def _remat(case):
    """The cotangent of the sum of cosines is minus the sine of the product, computed anew in the backward pass. (That
    of a sum of squares, the product itself, would add up with weights whose mean is not zero: dx would be large beside
    its terms, and so would be what rounding it costs.)"""
    x, _, w, dense = _operands(case)

    @jax.checkpoint
    def loss(x, w):
        out = _matmul(case)(x, w)
        return jnp.sum(jnp.cos(out.astype(jnp.float32))), out

    dx, out = jax.jit(jax.grad(loss, has_aux=True))(x[0], w[0])
    check_product(out, x[0], dense[0], case.limit)
    check_product(dx, -jnp.sin(out.astype(jnp.float32)).astype(case.dtype), dense[0].T, case.limit)


def _grad_of_vmap(case):
    x, g, w, dense = _operands(case)

    def loss(x, w):
        return jnp.sum(jax.vmap(_matmul(case))(x, w).astype(jnp.float32) * g.astype(jnp.float32))

    dx = jax.jit(jax.grad(loss))(x, w)
    check_product(dx, g, dense.swapaxes(1, 2), case.limit)


TRANSFORMS = {
    f.__name__.lstrip("_"): f for f in (_jit, _vmap_x, _vmap_w, _vmap_both, _jvp, _grad, _scan, _remat, _grad_of_vmap)
}
_FEW = ("q4_0", "q4_k", "q6_k", "mxfp4", "iq4_xs", "int4", "int3")
_FEW_FORMATS = tuple(f for f in FORMATS if f.name in _FEW)


@pytest.mark.parametrize("case", transform_cases(tuple(TRANSFORMS), _FEW_FORMATS, (0, 1, 9)), ids=str)
def test_transforms(case):
    TRANSFORMS[case.transform](case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", transform_cases(tuple(TRANSFORMS), FORMATS, M[:-1]), ids=str)
def test_gpu_transforms(case):
    TRANSFORMS[case.transform](case)


# Compositions.


@pytest.fixture
def small():
    """An int4 weight of (96, 40), its dense values, and x (5, 96), float32."""
    rng = np.random.default_rng(0)
    w, dense = random_weight(qg.int4(32, symmetric=False), 40, 96, rng)
    return jax.tree.map(jnp.asarray, w), dense, rng.standard_normal((5, 96)).astype(np.float32)


HIGHEST = product_limit("float32", highest=True)
highest = functools.partial(qg.matmul, precision="highest")


def test_linearize(small):
    w, dense, x = small
    out, push = jax.linearize(lambda x: highest(x, w), x)
    check_product(out, x, dense, HIGHEST)
    check_product(jax.jit(push)(x + 1), x + 1, dense, HIGHEST)


def test_vjp_of_jvp_and_linear_transpose(small):
    w, dense, x = small
    g = np.ones((5, 40), np.float32)
    _, pull = jax.vjp(lambda t: jax.jvp(lambda x: highest(x, w), (x,), (t,))[1], x)
    check_product(pull(g)[0], g, dense.T, HIGHEST)
    twice = jax.linear_transpose(jax.linear_transpose(lambda x: highest(x, w), x), g)
    check_product(twice((x,))[0], x, dense, HIGHEST)


@pytest.mark.parametrize("second", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("first", [jax.jacfwd, jax.jacrev])
def test_hessian_of_the_sum_of_squares(small, first, second):
    w, dense, x = small
    hessian = jax.jit(second(first(lambda v: 0.5 * jnp.sum(highest(v, w) ** 2))))(x[0])
    assert nmse(hessian, dense @ dense.T) <= 1e-11


def test_nested_vmap_and_grad(small):
    """Per-example gradients, of a batch of batches."""
    w, dense, x = small
    x = np.stack([x, 2 * x, x - 1])

    def loss(v, w):
        return 0.5 * jnp.sum(highest(v, w) ** 2)

    dx = jax.jit(jax.vmap(jax.vmap(jax.grad(loss), (0, None)), (0, None)))(x, w)
    check_product(dx, x, dense @ dense.T, 2 * HIGHEST)


def test_vmap_over_the_axes_of_a_doubly_stacked_weight():
    rng = np.random.default_rng(1)
    pairs = [random_weight(qg.int8(16), 33, 48, rng, batch=2) for _ in range(3)]
    w = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(w for w, _ in pairs))
    dense = np.stack([d for _, d in pairs])
    assert w.shape == (3, 2, 48, 33)
    x = rng.standard_normal((3, 2, 4, 48)).astype(np.float32)
    out = jax.jit(jax.vmap(jax.vmap(highest)))(x, w)
    check_product(out, x, dense, HIGHEST)
    y = rng.standard_normal((2, 4, 3, 48)).astype(np.float32)
    out = jax.jit(jax.vmap(jax.vmap(highest, (1, 0)), (0, 1)))(y, w)
    check_product(out, y.swapaxes(1, 2), dense.swapaxes(0, 1), HIGHEST)


def test_bias_and_residual_have_gradients(small):
    w, dense, x = small
    bias, residual = np.ones(40, np.float32), np.full((5, 40), 2, np.float32)

    def loss(x, bias, residual):
        out = highest(x, w, bias=bias, activation="relu", residual=residual)
        return jnp.sum(out * jnp.arange(40.0))

    dx, dbias, dresidual = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, bias, residual)
    g = np.broadcast_to(np.arange(40.0), (5, 40)) * (x.astype(np.float64) @ dense + 1 > 0)
    check_product(dx, g, dense.T, HIGHEST)
    np.testing.assert_allclose(dbias, g.sum(0), rtol=1e-6)
    np.testing.assert_array_equal(dresidual, np.broadcast_to(np.arange(40), (5, 40)))


def test_weights_get_no_gradient(small):
    w, _, x = small
    with pytest.raises(TypeError, match="uint32"):
        jax.grad(lambda w: jnp.sum(qg.matmul(x, w)))(w)
    grads = jax.grad(lambda w: jnp.sum(qg.matmul(x, w)), allow_int=True)(w)
    assert all(leaf.dtype == jax.dtypes.float0 for leaf in jax.tree.leaves(grads))


def test_cond_while_and_fori(small):
    w, dense, x = small
    chosen = jax.jit(lambda p, x, w: jax.lax.cond(p, lambda: highest(x, w), lambda: -highest(x, w)))
    check_product(chosen(True, x, w), x, dense, HIGHEST)
    check_product(-chosen(False, x, w), x, dense, HIGHEST)

    def body(_, x):
        return jnp.pad(highest(x, w), ((0, 0), (0, 56))) / 8

    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 3, body, x))(x)
    expected = x.astype(np.float64)
    for _ in range(3):
        expected = np.pad(expected @ dense, ((0, 0), (0, 56))) / 8
    assert nmse(looped, expected) <= 10 * HIGHEST

    start = (0, jnp.zeros((5, 40)))
    _, final = jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, highest(x, w)), start)
    check_product(final, x, dense, HIGHEST)


def test_qtensor_through_jit_donation_and_tree_map(small):
    w, dense, x = small
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    assert stacked.shape == (2, 96, 40)
    assert stacked.format == w.format
    unstacked = jax.jit(lambda s: [s[0], jax.tree.map(lambda a: a[1], s)])(stacked)
    for part in unstacked:
        check_product(highest(x, part), x, dense, HIGHEST)
    moved = jax.jit(lambda w: jax.tree.map(lambda a: a + 0, w), donate_argnums=0)(unstacked[0])
    assert isinstance(moved, qg.QTensor)
    check_product(highest(x, moved), x, dense, HIGHEST)


def test_abstract_values(small):
    w, dense, x = small
    abstract = jax.eval_shape(lambda: w)
    assert isinstance(abstract, qg.QTensor)
    assert abstract.shape == (96, 40)
    out = jax.eval_shape(qg.matmul, jax.ShapeDtypeStruct((2, 7, 96), jnp.bfloat16), abstract)
    assert (out.shape, out.dtype) == ((2, 7, 40), jnp.bfloat16)
    compiled = jax.jit(highest).lower(jax.ShapeDtypeStruct((5, 96), jnp.float32), abstract).compile()
    check_product(compiled(x, w), x, dense, HIGHEST)


def test_weak_types_do_not_leak(small):
    w, _, x = small
    out = jax.eval_shape(lambda s: qg.matmul(jnp.broadcast_to(s, x.shape), w), 1.0)
    assert not out.weak_type


def _export(function, *arguments, platforms=None):
    checks = qg.export_safety_checks()
    exported = export.export(jax.jit(function), platforms=platforms, disabled_checks=checks)(*arguments)
    return export.deserialize(exported.serialize())


def test_export_round_trip(small):
    w, dense, x = small

    def function(x, *leaves):
        return highest(x, jax.tree.unflatten(jax.tree.structure(w), leaves))

    loaded = _export(function, x, *jax.tree.leaves(w))
    check_product(loaded.call(x, *jax.tree.leaves(w)), x, dense, HIGHEST)


def test_export_with_symbolic_m(small):
    w, dense, x = small
    (m,) = export.symbolic_shape("m")
    shape = jax.ShapeDtypeStruct((m, 2, 96), jnp.float32)
    loaded = _export(lambda x: highest(x, w), shape)
    gradient = _export(lambda x: jax.grad(lambda x: jnp.sum(highest(x, w)))(x), shape)
    for size in (1, 6):  # a dimension variable is at least 1
        x = np.random.default_rng(size).standard_normal((size, 2, 96)).astype(np.float32)
        check_product(np.reshape(loaded.call(x), (-1, 40)), x.reshape(-1, 96), dense, HIGHEST)
        ones = np.ones((2 * size, 40))
        check_product(np.reshape(gradient.call(x), (-1, 96)), ones, dense.T, HIGHEST)
