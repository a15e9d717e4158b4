"""Every transform of products with weights chosen by index, against float64 oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, Case, M, random_weight, random_x, transform_cases

import jax_qgemm as qg
from jax_qgemm.testing import check_product

# What is chosen of four weights: an index out of range is the nearest.
COUNT = 4
EXPERTS, CHOSEN = np.array([3, 0, 3, -2, 9], np.int32), np.array([3, 0, 3, 0, 3])
OTHERS, OTHERS_CHOSEN = np.array([8, -3, 2, -1, 2], np.int32), np.array([3, 0, 2, 0, 2])
BOTH, BOTH_CHOSEN = np.stack([EXPERTS, OTHERS]), np.stack([CHOSEN, OTHERS_CHOSEN])


def _operands(case: Case):
    """x and cotangents (2, 5, m, ...), stacked weights (2, 4, k, n) and their dense values."""
    rng = case.rng()
    w, dense = random_weight(case.format, case.n, case.k, rng, batch=2 * COUNT)
    w = jax.tree.map(lambda a: jnp.asarray(a.reshape(2, COUNT, *a.shape[1:])), w)
    x, g = (random_x(case, (2, len(EXPERTS), case.m, size), rng) for size in (case.k, case.n))
    return x, g, w, dense.reshape(2, COUNT, case.k, case.n)


def _matmul(case: Case):
    return functools.partial(qg.expert_matmul, precision=case.precision)


def _jit(case):
    x, _, w, dense = _operands(case)
    check_product(jax.jit(_matmul(case))(x[0], w[0], EXPERTS), x[0], dense[0][CHOSEN], case.limit)


def _vmap_x(case):
    x, _, w, dense = _operands(case)
    out = jax.jit(jax.vmap(_matmul(case), (1, None, None), 1))(x.swapaxes(0, 1), w[0], EXPERTS)
    check_product(jnp.swapaxes(out, 0, 1), x, np.stack([dense[0][CHOSEN]] * 2), case.limit)


def _vmap_experts(case):
    x, _, w, dense = _operands(case)
    out = jax.jit(jax.vmap(_matmul(case), (None, None, 1)))(x[0], w[0], BOTH.T)
    check_product(out, np.stack([x[0]] * 2), dense[0][BOTH_CHOSEN], case.limit)


def _vmap_x_and_experts(case):
    x, _, w, dense = _operands(case)
    out = jax.jit(jax.vmap(_matmul(case), (0, None, 0)))(x, w[0], BOTH)
    check_product(out, x, dense[0][BOTH_CHOSEN], case.limit)


def _vmap_w(case):
    """Each stack keeps to itself: an index out of range is the nearest of its own."""
    x, _, w, dense = _operands(case)
    out = jax.jit(jax.vmap(_matmul(case), (None, 0, None)))(x[0], w, EXPERTS)
    check_product(out, np.stack([x[0]] * 2), dense[:, CHOSEN], case.limit)


def _vmap_all(case):
    x, _, w, dense = _operands(case)
    out = jax.jit(jax.vmap(_matmul(case)))(x, w, BOTH)
    check_product(out, x, dense[np.arange(2)[:, None], BOTH_CHOSEN], case.limit)


def _nested_vmap(case):
    """Of entries, inside a map over layers: every index is a scalar then."""
    x, _, w, dense = _operands(case)
    out = jax.jit(jax.vmap(jax.vmap(_matmul(case), (0, None, 0))))(x, w, BOTH)
    check_product(out, x, dense[np.arange(2)[:, None], BOTH_CHOSEN], case.limit)


def _jvp(case):
    x, _, w, dense = _operands(case)
    push = jax.jit(lambda x, t, w: jax.jvp(lambda x: _matmul(case)(x, w, EXPERTS), (x,), (t,)))
    out, tangent = push(x[0], x[1], w[1])
    check_product(out, x[0], dense[1][CHOSEN], case.limit)
    check_product(tangent, x[1], dense[1][CHOSEN], case.limit)


def _grad(case):
    x, g, w, dense = _operands(case)

    def loss(x, w, experts):
        return jnp.sum(_matmul(case)(x, w, experts).astype(jnp.float32) * g[0].astype(jnp.float32))

    dx = jax.jit(jax.grad(loss))(x[0], w[0], EXPERTS)
    assert dx.dtype == case.dtype
    check_product(dx, g[0], dense[0][CHOSEN].swapaxes(1, 2), case.limit)


def _scan(case):
    """Over layers, each with its own stack and experts, its derivative beside its product."""
    x, g, w, dense = _operands(case)

    def step(carry, layer):
        w, experts, x, g = layer
        out, pull = jax.vjp(lambda x: _matmul(case)(x, w, experts), x)
        return carry + 1, (out, pull(g)[0])

    count, (out, dx) = jax.jit(lambda *layers: jax.lax.scan(step, 0, layers))(w, BOTH, x, g)
    chosen = dense[np.arange(2)[:, None], BOTH_CHOSEN]
    assert count == 2
    check_product(out, x, chosen, case.limit)
    check_product(dx, g, chosen.swapaxes(-1, -2), case.limit)


def _remat(case):
    """The cotangent of the sum of cosines is minus the sine of the product, computed anew in the backward pass. (That
    of a sum of squares, the product itself, would add up with weights whose mean is not zero: dx would be large beside
    its terms, and so would be what rounding it costs.)"""
    x, _, w, dense = _operands(case)

    @jax.checkpoint
    def loss(x, w, experts):
        out = _matmul(case)(x, w, experts)
        return jnp.sum(jnp.cos(out.astype(jnp.float32))), out

    dx, out = jax.jit(jax.grad(loss, has_aux=True))(x[0], w[0], EXPERTS)
    check_product(out, x[0], dense[0][CHOSEN], case.limit)
    cotangent = -jnp.sin(out.astype(jnp.float32)).astype(case.dtype)
    check_product(dx, cotangent, dense[0][CHOSEN].swapaxes(1, 2), case.limit)


def _grad_of_vmap(case):
    x, g, w, dense = _operands(case)

    def loss(x, w, experts):
        out = jax.vmap(_matmul(case))(x, w, experts)
        return jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32))

    dx = jax.jit(jax.grad(loss))(x, w, BOTH)
    check_product(dx, g, dense[np.arange(2)[:, None], BOTH_CHOSEN].swapaxes(-1, -2), case.limit)


TRANSFORMS = {
    f.__name__.lstrip("_"): f
    for f in (
        _jit, _vmap_x, _vmap_experts, _vmap_x_and_experts, _vmap_w, _vmap_all, _nested_vmap, _jvp, _grad, _scan, _remat,
        _grad_of_vmap,
    )
}  # fmt: skip
_FEW_FORMATS = tuple(f for f in FORMATS if f.name in ("q4_0", "q4_k", "q6_k", "mxfp4", "int4", "int8"))


@pytest.mark.parametrize("case", transform_cases(tuple(TRANSFORMS), _FEW_FORMATS, (0, 1, 9)), ids=str)
def test_transforms(case):
    TRANSFORMS[case.transform](case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", transform_cases(tuple(TRANSFORMS), FORMATS, M[:-1]), ids=str)
def test_gpu_transforms(case):
    TRANSFORMS[case.transform](case)
