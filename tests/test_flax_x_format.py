"""Flax layers that quantize x: numbers against NumPy's codes in float64, and training through them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import random_weight
from flax import linen, nnx
from quantized_x import F32, LIMITS, quantized

import jax_qgemm as qg
import jax_qgemm.flax as qf
from jax_qgemm.testing import check_product, nmse, product_limit

K, N = 192, 48
EXACT = product_limit("float32", highest=True)


def random(format: Any, batch: int | None = None) -> tuple[qg.QTensor, np.ndarray]:
    w, dense = random_weight(format, N, K, np.random.default_rng(0), batch=batch)
    return jax.tree.map(jnp.asarray, w), dense


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


@nnx.jit
def call(layer, x):
    return layer(x)


@pytest.mark.parametrize(("x_format", "format"), [("int8", qg.int8(-1)), ("int8", qg.int4(64)), ("fp8", qg.int4(-1))])
def test_linear(x_format, format):
    w, dense = random(format)
    x, bias = normal(1, 2, 7, K), normal(2, N)
    exact = quantized(x, x_format) @ dense + bias
    assert nmse(call(qf.QLinear(w, bias, x_format=x_format), x), exact) <= LIMITS[x_format]
    assert nmse(call(qf.QLinear(w, bias), x), exact) > 1e-6  # x itself


def test_linear_general():
    w, dense = random(qg.int4(64))
    x = normal(1, 5, 3, 64)
    layer = qf.QLinearGeneral(w, in_features=(3, 64), out_features=(6, 8), axis=(-2, -1), x_format="int8")
    check_product(call(layer, x).reshape(5, N), quantized(x.reshape(5, K), "int8"), dense, LIMITS["int8"])
    w, dense = random(qg.int4(64), batch=3)
    x = normal(2, 3, 5, K)
    layer = qf.QLinearGeneral(w, in_features=K, out_features=N, batch_axis={0: 3}, x_format="int8")
    check_product(call(layer, x), quantized(x, "int8"), dense, LIMITS["int8"])


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(10, K, rngs=rngs)
        self.up = nnx.Linear(K, N, rngs=rngs)
        self.heads = nnx.LinearGeneral(N, (4, 8), rngs=rngs)

    def __call__(self, ids):
        return self.heads(self.up(self.embed(ids)))


def test_quantize_passes_it_to_products():
    model: Any = qf.quantize(Block(nnx.Rngs(0)), qg.int4(-1), x_format="int8")
    assert (model.up.x_format, model.heads.x_format) == ("int8", "int8")
    x = np.asarray(model.embed(jnp.arange(10)))
    check_product(model.up(jnp.asarray(x)), quantized(x, "int8"), model.up.w.dequantize(), LIMITS["int8"])
    assert call(model, jnp.arange(10)).shape == (10, 4, 8)
    abstract: Any = nnx.eval_shape(lambda: qf.quantize(Block(nnx.Rngs(0)), qg.int8(-1), x_format="int8"))
    assert abstract.up.x_format == "int8"


def test_layers_of_a_scan():
    w, dense = random(qg.int4(64), batch=4)
    layers = qf.QLinear(w, x_format="int8")
    x = normal(3, 5, K)

    @nnx.jit
    @functools.partial(nnx.scan, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def apply(x, layer):
        return x, layer(x)

    _, out = apply(jnp.asarray(x), layers)
    check_product(out, np.broadcast_to(quantized(x, "int8"), (4, 5, K)), dense, LIMITS["int8"])


def test_gradients_are_those_of_x_itself():
    w, dense = random(qg.int4(64))
    layer = qf.QLinear(w, normal(2, N), x_format="int8", precision="highest")
    x, g = normal(4, 9, K), normal(5, 9, N)

    @nnx.jit
    def gradients(layer, x):
        return nnx.grad(lambda layer, x: jnp.sum(layer(x) * g), argnums=(0, 1))(layer, x)

    dlayer, dx = gradients(layer, x)
    check_product(dx, g, dense.T, EXACT)
    np.testing.assert_allclose(dlayer.bias[...], g.astype(np.float64).sum(0), rtol=1e-5, atol=1e-5)


def test_biases_train():
    w, dense = random(qg.int8(-1))
    layer = qf.QLinear(w, jnp.zeros(N), x_format="int8")
    optimizer = nnx.Optimizer(layer, optax.sgd(0.5), wrt=nnx.Param)
    x = normal(6, 3, K)
    target = quantized(x, "int8") @ dense + normal(7, N)

    def loss(layer):
        return jnp.mean(jnp.sum((layer(x) - target) ** 2, -1)) / 2

    before = loss(layer)
    for _ in range(20):
        optimizer.update(layer, nnx.grad(loss)(layer))
    assert loss(layer) < 1e-6 * before


def test_dense():
    layer = qf.QDense(N, "int4", x_format="int8")
    dense: Any = linen.Dense(N)
    x = jnp.asarray(normal(8, 5, 256))
    params = dense.init(jax.random.key(0), x)["params"]
    variables = qf.quantize_dense({"layer": params}, "int4", lambda path: True)
    variables = {name: tree["layer"] for name, tree in variables.items()}
    exact = np.asarray(variables["quantized"]["kernel"].dequantize(), np.float64)
    check_product(layer.apply(variables, x), quantized(np.asarray(x), "int8"), exact, LIMITS["int8"])


def test_bad_x_formats_are_named_before_anything_is_converted():
    w, _ = random(qg.int8(-1))
    with pytest.raises(ValueError, match="x_format must be one of int8, fp8 or None, got 'int4'"):
        qf.QLinear(w, x_format="int4")
    with pytest.raises(ValueError, match=r"x is quantized to fp8, but w is int8.*not exact"):
        qf.QLinear(w, x_format="fp8")
    with pytest.raises(ValueError, match="x_format must be one of int8, fp8 or None, got 'q8_1'"):
        qf.quantize(Block(nnx.Rngs(0)), "int8", x_format="q8_1")
    with pytest.raises(ValueError, match=r"^up: x is quantized to int8, but w is q4_0: expected int4 or int8 weights"):
        qf.quantize(Block(nnx.Rngs(0)), "q4_0", lambda path, _: path == ("up",), x_format="int8")
    embedding = qf.quantize(Block(nnx.Rngs(0)), "q4_0", lambda path, _: path == ("embed",), x_format="int8")
    assert isinstance(embedding.embed, qf.QEmbed)
