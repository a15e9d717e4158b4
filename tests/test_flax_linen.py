"""QDense against flax.linen.Dense with dequantized kernels."""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jax_qgemm as qg
from jax_qgemm.flax import QDense, quantize_dense
from jax_qgemm.testing import nmse

EXACT = 1e-11  # float32 on the CPU


class Model(nn.Module):
    quantized: bool

    @nn.compact
    def __call__(self, x):
        up = QDense(32, "q4_0", name="up") if self.quantized else nn.Dense(32, name="up")
        return nn.Dense(4, name="head")(jnp.tanh(up(x)))


@pytest.fixture(scope="module")
def params():
    return Model(False).init(jax.random.key(0), jnp.ones((1, 64)))["params"]


@pytest.fixture(scope="module")
def variables(params):
    return quantize_dense(params, "q4_0", where=lambda path: path == ("up",))


def test_trained_parameters(params, variables):
    assert set(variables["params"]["up"]) == {"bias"}
    assert set(variables["params"]["head"]) == {"kernel", "bias"}
    assert isinstance(variables["quantized"]["up"]["kernel"], qg.QTensor)
    kernel = qg.quantize(params["up"]["kernel"], "q4_0").dequantize()
    dense = {**params, "up": {**params["up"], "kernel": kernel}}
    x = jax.random.normal(jax.random.key(1), (17, 64))
    out = jax.jit(Model(True).apply)(variables, x)
    assert nmse(out, Model(False).apply({"params": dense}, x)) <= EXACT
    up = QDense(32, "q4_0").apply({name: tree["up"] for name, tree in variables.items()}, x)
    assert nmse(up, np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)) <= EXACT


def test_init_has_the_kernel_of_dense(params, variables):
    ours = Model(True).init(jax.random.key(0), jnp.ones((1, 64)))
    assert jax.tree.structure(ours) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, ours, variables)


def test_gradient_and_types(variables):
    x = jnp.ones((2, 64))

    def loss(params):
        return jnp.sum(cast(jax.Array, Model(True).apply({**variables, "params": params}, x)) ** 2)

    grads = jax.jit(jax.grad(loss))(variables["params"])
    assert jax.tree.structure(grads) == jax.tree.structure(variables["params"])
    assert np.any(grads["up"]["bias"])
    for dtype, param_dtype in ((None, "float32"), ("bfloat16", "float32"), (None, "bfloat16")):
        for x_dtype in ("bfloat16", "float32"):
            x = jnp.ones((1, 64), x_dtype)
            options = {"dtype": dtype, "param_dtype": param_dtype}
            ours, theirs = (
                jax.eval_shape(lambda layer=layer, x=x: layer.init_with_output(jax.random.key(0), x)[0])
                for layer in (QDense(8, "q8_0", **options), nn.Dense(8, **options))
            )
            assert ours == theirs


def test_checkpoint(variables, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", variables)
    abstract = jax.eval_shape(lambda: Model(True).init(jax.random.key(0), jnp.ones((1, 64))))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "model", abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, variables)


def test_errors(params):
    with pytest.raises(ValueError, match=r"^head: w has k = 32 .* multiple of 256"):
        quantize_dense(params, "q4_k", where=lambda path: path == ("head",))
    with pytest.raises(TypeError, match=r"^up: format must be a name"):
        quantize_dense(params, cast(Any, 4), where=lambda path: path == ("up",))
    with pytest.raises(ValueError, match=r"where accepted no layer of params that has a kernel"):
        quantize_dense(params, "q4_0", where=lambda path: False)
