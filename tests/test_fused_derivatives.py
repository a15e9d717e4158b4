"""Derivatives of products with an epilogue in every float operand, against differences in float64."""

import functools
import itertools

import epilogue_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_operands import LIMIT, NAMES, SIZE, K, M, N, Operands, apply, count, operands

import jax_qgemm as qg
from jax_qgemm.testing import nmse

FLOATS = ("x", "scale", "bias", "residual")


def flat(data: Operands, activation):
    """The float64 result as a function of one vector that holds the float operands, and that vector."""
    leaves, tree = jax.tree.flatten([data.float64[n] for n in FLOATS])
    ends = np.cumsum([leaf.size for leaf in leaves])
    function = oracle.gated if data.gated else oracle.fused

    def evaluate(vector):
        parts = np.split(vector, ends[:-1])
        parts = [p.reshape(leaf.shape) for p, leaf in zip(parts, leaves, strict=True)]
        x, scale, bias, residual = jax.tree.unflatten(tree, parts)
        options = {"scale": scale, "bias": bias, "residual": residual}
        return function(x, data.float64["w"], activation=activation, **options)

    return evaluate, np.concatenate([leaf.ravel() for leaf in leaves])


def vector(values):
    """Float operands, or what belongs to each, in the order of `flat`."""
    # The bias, of one tile or of a gate's tile and its partner's, lies as its halves do.
    return np.concatenate([np.ravel(value) for value in values]).astype(np.float64)


def of_floats(data: Operands, activation):
    return lambda x, *rest: apply(data.gated, activation)(x, data.values["w"], *rest)


def differences(evaluate, point, step=1e-6):
    """The Jacobian, (*result, len(point))."""
    columns = [(evaluate(point + step * e) - evaluate(point - step * e)) / (2 * step) for e in np.eye(len(point))]
    return np.stack(columns, axis=-1)


def check_first_derivatives(gated, activation):
    data = operands(gated)
    evaluate, point = flat(data, activation)
    jacobian = differences(evaluate, point)
    values = [data.values[n] for n in FLOATS]
    rng = np.random.default_rng(3)

    cotangent = rng.standard_normal((M, N)).astype(np.float32)
    out, pull = jax.vjp(jax.jit(of_floats(data, activation)), *values)
    assert nmse(out, evaluate(point)) <= LIMIT
    assert nmse(vector(pull(cotangent)), np.einsum("mn,mnp->p", cotangent, jacobian)) <= 10 * LIMIT

    tangents = [rng.standard_normal(np.shape(v)).astype(np.float32) for v in values]
    out, tangent = jax.jvp(jax.jit(of_floats(data, activation)), values, tangents)
    assert nmse(out, evaluate(point)) <= LIMIT
    assert nmse(tangent, jacobian @ vector(tangents)) <= 10 * LIMIT


def check_second_derivatives(gated, activation):
    """The derivative of the gradient along a direction: forward over reverse."""
    data = operands(gated)
    evaluate, point = flat(data, activation)
    rng = np.random.default_rng(4)
    values = [data.values[n] for n in FLOATS]
    tangents = [rng.standard_normal(np.shape(v)).astype(np.float32) for v in values]
    weights = rng.standard_normal((M, N)).astype(np.float32)

    def loss(*values):
        return jnp.sum(jnp.sin(of_floats(data, activation)(*values)) * weights)

    gradient = jax.grad(loss, argnums=range(4))
    _, product = jax.jvp(jax.jit(gradient), tuple(values), tuple(tangents))

    def expected_gradient(point):
        return differences(lambda p: np.sum(np.sin(evaluate(p)) * weights), point, 1e-4)

    direction, step = vector(tangents), 1e-4
    expected = (expected_gradient(point + step * direction) - expected_gradient(point - step * direction)) / (2 * step)
    assert nmse(vector(product), expected) <= 1e-9


each_function = pytest.mark.parametrize(
    ("gated", "activation"), list(itertools.product([False, True], oracle.ACTIVATIONS)), ids=str
)
each_order = pytest.mark.parametrize(
    "check", [check_first_derivatives, check_second_derivatives], ids=["first", "second"]
)


@each_function
@each_order
def test_derivatives(check, gated, activation):
    check(gated, activation)


@pytest.mark.gpu
@each_function
@each_order
def test_gpu_derivatives(check, gated, activation):
    check(gated, activation)


@pytest.mark.parametrize("gated", [False, True])
def test_jacobians(gated):
    data = operands(gated)
    evaluate, point = flat(data, "gelu")
    expected = differences(evaluate, point)[..., : M * K].reshape(M, N, M, K)
    for transform in (jax.jacfwd, jax.jacrev):
        jacobian = jax.jit(transform(of_floats(data, "gelu")))(*(data.values[n] for n in FLOATS))
        assert nmse(jacobian, expected) <= 10 * LIMIT


def test_gradients_under_vmap_remat_and_narrow_types():
    data = operands(True, {"x": (SIZE,), "w": (SIZE,)})
    x, w, scale, bias, residual = (data.values[n] for n in NAMES)

    @jax.checkpoint
    def loss(x, w):
        return jnp.sum(apply(True)(x, w, scale, bias, residual))

    gradient = jax.jit(jax.vmap(jax.grad(loss)))(x, w)
    for i in range(SIZE):
        item = data.item(x=i, w=i)
        options = {n: item[n] for n in ("scale", "bias", "residual")}
        expected = differences(
            lambda v, item=item, options=options: oracle.gated(
                v.reshape(M, K), item["w"], activation="silu", **options
            ).sum(),
            item["x"].ravel(),
        )
        assert nmse(gradient[i], expected.reshape(M, K)) <= 10 * LIMIT
    narrow = jax.grad(lambda x, b, r: jnp.sum(qg.gated_matmul(x, w[0], bias=b, residual=r)), argnums=(0, 1, 2))
    dtypes = [d.dtype for d in narrow(jnp.bfloat16(x[0]), jnp.float16(bias), jnp.bfloat16(residual))]
    assert dtypes == [jnp.bfloat16, jnp.float16, jnp.bfloat16]


def test_derivatives_do_no_needless_work():
    """The sums once forward; a product with w.T only for x."""
    data = operands(False)
    values = [data.values[n] for n in NAMES]

    def products(argument):
        function = jax.grad(lambda *a: jnp.sum(apply(False)(*a) ** 2), argnums=argument)
        return count("qmatmul", jax.jit(function), *values), count("qmatmul_fused", function, *values)

    assert products(NAMES.index("x")) == (2, 0)
    assert products(NAMES.index("bias")) == products(NAMES.index("residual")) == (1, 0)


def test_linear_transpose():
    """With a global_scale alone the product is linear, and stays so."""
    data = operands(False)
    w = data.values["w"]
    w = qg.QTensor(w.planes, w.format, w.padding, global_scale=data.values["scale"])
    function = functools.partial(qg.matmul, w=w, precision="highest")
    cotangent = data.values["residual"]
    (out,) = jax.linear_transpose(function, data.values["x"])(cotangent)
    assert nmse(out, np.float64(cotangent) @ data.float64["w"].T * data.float64["scale"]) <= LIMIT


def test_weights_get_no_gradient():
    data = operands(True)
    x, w = data.values["x"], data.values["w"]
    with pytest.raises(TypeError, match="uint32"):
        jax.grad(lambda w: jnp.sum(qg.gated_matmul(x, w)))(w)
    gradient = jax.grad(lambda w: jnp.sum(qg.gated_matmul(x, w)), allow_int=True)(w)
    assert all(leaf.dtype == jax.dtypes.float0 for leaf in jax.tree.leaves(gradient))
