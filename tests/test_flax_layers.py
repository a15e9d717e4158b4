"""QLinear, QLinearGeneral and QEmbed: numbers against float64 numpy, types against the layers of Flax."""

import copy
import functools
import importlib
import pickle
import sys
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_qgemm as qg
from jax_qgemm.flax import QEmbed, QLinear, QLinearGeneral, QWeight
from jax_qgemm.testing import check_product, nmse

K, N = 96, 40  # k ends in the middle of a k-block of 64, n in the middle of a tile of 16
EXACT = 1e-11  # float32 on the CPU


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@functools.cache
def weight(*shape, format="q4_0", seed=0):
    return qg.quantize(normal(seed, *shape), format)


def float64(array):
    return np.asarray(array).astype(np.float64)


def dense(w):
    return float64(w.dequantize())


@nnx.jit
def call(layer, x):
    return layer(x)


@nnx.jit
def attend(layer, x):
    return layer.attend(x)


@pytest.mark.parametrize("format", ["q4_0", "q4_1", qg.int8(-1)], ids=str)
def test_linear(format):
    w, x, bias = weight(K, N, format=format), normal(1, 2, 17, K), normal(2, N)
    check_product(QLinear(w)(x), x, dense(w), EXACT)
    out = QLinear(w, bias)(x)
    assert out.shape == (2, 17, N)
    assert nmse(out, float64(x) @ dense(w) + float64(bias)) <= EXACT


def test_linear_computes_in_dtype():
    w, x, bias = weight(K, N), normal(1, 17, K), normal(2, N)
    out = QLinear(w, bias, dtype=jnp.bfloat16)(x)
    assert out.dtype == jnp.bfloat16
    rounded = float64(x.astype(jnp.bfloat16)) @ dense(w) + float64(bias.astype(jnp.bfloat16))
    assert nmse(out, rounded) <= 2e-5
    # A sum in bfloat16 would be off by far more than the rounding of x.
    out = QLinear(w, dtype=jnp.bfloat16, preferred_element_type=jnp.float32)(x)
    assert out.dtype == jnp.float32
    check_product(out, x.astype(jnp.bfloat16), dense(w), EXACT)


def test_linear_of_a_bfloat16_input():
    """Without `dtype` and `param_dtype` the type of x decides: the weight has none."""
    w, x = weight(K, N), normal(1, 3, K, dtype=jnp.bfloat16)
    assert QLinear(w)(x).dtype == jnp.bfloat16
    assert QLinear(w, jnp.zeros(N, jnp.bfloat16))(x).dtype == jnp.bfloat16
    assert QLinear(w, jnp.zeros(N, jnp.float32))(x).dtype == jnp.float32


def test_linear_attributes():
    w = weight(K, N)
    layer = QLinear(w, normal(1, N))
    assert (layer.in_features, layer.out_features) == (K, N)
    assert isinstance(layer.bias, nnx.Param)
    assert QLinear(w).bias is None
    for ours, given in zip(layer.w.planes, w.planes, strict=True):
        np.testing.assert_array_equal(ours, given)
    paths = dict(nnx.to_flat_state(nnx.state(layer, QWeight)))
    assert list(paths) == [("packed", "codes"), ("packed", "scales")]


def test_permutation_and_scales_are_no_parameters():
    """The float arrays beside the planes stay out of training too, and count in the product."""
    rng = np.random.default_rng(0)
    plain = weight(K, N)
    w = qg.QTensor(
        plain.planes,
        plain.format,
        plain.padding,
        permutation=jnp.asarray(rng.permutation(K), jnp.int32),
        input_scale=jnp.asarray(rng.uniform(0.5, 2, K), jnp.float32),
        global_scale=jnp.float32(3),
    )
    layer = QLinear(w)
    assert not jax.tree.leaves(nnx.state(layer, nnx.Param))
    x = normal(1, 5, K)
    packed_order = dense(plain) * 3 / float64(w.input_scale)[:, None]
    logical = np.zeros_like(packed_order)
    logical[np.asarray(w.permutation)] = packed_order
    assert nmse(layer(x), float64(x) @ logical) <= EXACT


GENERAL = {  # shape of x, the product as an einsum with the kernel, arguments
    "heads": ((2, 5, 96), "abi,ijk->abjk", {"in_features": 96, "out_features": (4, 10)}),
    "two axes": (
        (2, 5, 3, 32),
        "abij,ijk->abk",
        {"axis": (-2, -1), "in_features": (3, 32), "out_features": 40},
    ),
    "apart": ((3, 5, 32), "iaj,ijkl->akl", {"axis": (0, -1), "in_features": (3, 32), "out_features": (8, 5)}),
    # Flax takes the axes in the order in which x has them.
    "turned": ((5, 3, 32), "aij,ijk->ak", {"axis": (-1, 1), "in_features": (3, 32), "out_features": 40}),
    "batch": (
        (3, 5, 96),
        "bai,bijk->bajk",
        {"batch_axis": {0: 3}, "in_features": 96, "out_features": (4, 10)},
    ),
    "two batch axes": (
        (1, 3, 3, 5, 32),
        "abiuj,abijk->abuk",
        {"batch_axis": {0: 1, 1: 3}, "axis": (2, 4), "in_features": (3, 32), "out_features": 40},
    ),
}


@pytest.mark.parametrize("case", GENERAL)
def test_linear_general(case):
    shape, einsum, arguments = GENERAL[case]
    flax_layer = nnx.LinearGeneral(**arguments, rngs=nnx.Rngs(0))
    kernel, flax_bias = flax_layer.kernel[...], flax_layer.bias
    assert flax_bias is not None
    batch = tuple(arguments.get("batch_axis", {}).values())
    w = qg.quantize(kernel.reshape(*batch, K, N), "q4_0")
    x, bias = normal(1, *shape), normal(2, *flax_bias.shape)
    expected = np.einsum(einsum, float64(x), dense(w).reshape(kernel.shape))
    assert nmse(call(QLinearGeneral(w, **arguments), x), expected) <= EXACT
    out = call(QLinearGeneral(w, bias, **arguments), x)
    assert out.shape == jax.eval_shape(flax_layer, x).shape
    kept = expected.ndim - bias.ndim
    bias = bias.reshape(*batch, *(1,) * kept, *bias.shape[len(batch) :])
    assert nmse(out, expected + float64(bias)) <= EXACT


def test_linear_general_of_an_empty_input():
    layer = QLinearGeneral(weight(K, N), jnp.ones((4, 10)), in_features=K, out_features=(4, 10))
    assert layer(jnp.zeros((0, 5, K))).shape == (0, 5, 4, 10)


def test_embed():
    w = weight(K, N)
    layer = QEmbed(w)
    assert (layer.features, layer.num_embeddings) == (K, N)
    indices = np.array([[0, 39, 31], [-1, -40, 7], [1, 1, 40]])
    rows = np.array(call(layer, indices))
    assert np.isnan(rows[2, 2]).all()  # out of range
    np.testing.assert_array_equal(rows[:2], np.asarray(w.dequantize()).T[indices[:2]])
    x = normal(1, 2, 5, K)
    check_product(attend(layer, x), x, dense(w), EXACT)


def test_embed_types():
    w, x = weight(K, N), normal(1, 5, K, dtype=jnp.bfloat16)
    layer = QEmbed(w)
    assert jax.eval_shape(layer, jnp.arange(3)).dtype == jnp.float32
    assert layer.attend(x).dtype == jnp.bfloat16
    out = layer.attend(x, preferred_element_type=jnp.float32)
    assert out.dtype == jnp.float32
    check_product(out, x, dense(w), EXACT)
    layer = QEmbed(w, dtype=jnp.bfloat16)
    assert jax.eval_shape(layer, jnp.arange(3)).dtype == jnp.bfloat16
    assert layer.attend(x.astype(jnp.float32)).dtype == jnp.bfloat16


def test_embed_of_one_row():
    """nnx.Embed broadcasts a table of one row, whatever the index."""
    w = weight(K, 1)
    np.testing.assert_array_equal(call(QEmbed(w), np.array([0, 3])), np.tile(w.dequantize().T, (2, 1)))


def test_layers_share_a_weight():
    """The packed weight of one layer given to another is tied to it, through split, jit and update too."""

    class Model(nnx.Module):
        def __init__(self):
            self.embed = QEmbed(weight(K, N))
            self.head = QLinear(self.embed.packed, jnp.zeros(N))

        def __call__(self, indices):
            return self.head(self.embed(indices))

    model = nnx.merge(*nnx.split(Model()))
    assert model.head.packed.planes[0] is model.embed.packed.planes[0]
    table = dense(model.embed.w)
    assert nmse(call(model, np.arange(20)), table.T[:20] @ table) <= EXACT
    other = weight(K, N, seed=9)
    for variable, plane in zip(model.embed.packed.planes, other.planes, strict=True):
        variable[...] = plane
    assert nmse(call(model, np.arange(20)), dense(other).T[:20] @ dense(other)) <= EXACT


# Transforms and objects.


class Block(nnx.Module):
    """Three layers, stacked."""

    def __init__(self):
        self.up = QLinear(weight(3, K, N), 0.1 * normal(5, 3, N))
        self.down = nnx.Param(0.1 * normal(6, 3, N, K))

    def __call__(self, x):
        return x + jnp.tanh(self.up(x)) @ self.down


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def scan(block, x):
    return block(x)


def scan64(block, x):
    """The output, and what the gradient of half its squared sum is in the bias."""
    layers = list(zip(dense(block.up.w), float64(block.up.bias[...]), float64(block.down[...]), strict=True))
    x, hidden = float64(x), []
    for w, bias, down in layers:
        hidden.append(np.tanh(x @ w + bias))
        x = x + hidden[-1] @ down
    cotangent, gradient = x, np.zeros(block.up.bias.shape)
    for i, (w, _, down) in reversed(list(enumerate(layers))):
        inner = (cotangent @ down.T) * (1 - hidden[i] ** 2)
        gradient[i] = inner.sum(axis=0)
        cotangent = cotangent + inner @ w.T
    return x, gradient


def test_scan_over_stacked_blocks():
    block, x = Block(), 0.1 * normal(1, 2, K)  # where tanh is far from its limits: 1 - tanh**2 is exact
    out, gradient = scan64(block, x)
    assert nmse(nnx.jit(scan)(block, x), out) <= EXACT
    grads = nnx.jit(nnx.grad(lambda block: 0.5 * jnp.sum(scan(block, x) ** 2)))(block)
    assert set(dict(nnx.to_flat_state(grads))) == {("down",), ("up", "bias")}
    assert nmse(grads["up"]["bias"][...], gradient) <= EXACT


def test_vmap_over_stacked_layers():
    w, bias, x = weight(3, K, N), normal(1, 3, N), normal(2, 3, 17, K)
    out = nnx.vmap(call)(QLinear(w, bias), x)
    assert nmse(out, float64(x) @ dense(w) + float64(bias)[:, None]) <= EXACT
    shared = nnx.vmap(call, in_axes=(None, 0))(QLinear(weight(K, N)), x)
    check_product(shared, x, dense(weight(K, N)), EXACT)


def test_gradient_of_the_input():
    w, x, ct = weight(K, N), normal(1, 17, K), normal(2, 17, N)
    layer = QLinear(w, normal(3, N))
    dx = jax.grad(lambda x: jnp.sum(layer(x) * ct))(x)
    check_product(dx, ct, dense(w).T, EXACT)


def test_training_leaves_the_payload_alone():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(8, K, rngs=rngs)
            self.frozen = QLinear(weight(K, N), jnp.zeros(N))
            self.last = nnx.Linear(N, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(jax.nn.gelu(self.frozen(self.first(x))))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    before = jax.tree.map(np.array, nnx.state(model, QWeight))
    bias = np.array(model.frozen.bias[...])
    x = normal(1, 32, 8)
    y = jnp.sin(x.sum(axis=-1, keepdims=True))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]
    assert np.any(np.array(model.frozen.bias[...]) != bias)
    after = nnx.state(model, QWeight)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert jax.tree.leaves(after)


@pytest.mark.parametrize(
    "duplicate",
    [nnx.clone, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: nnx.merge(*nnx.split(m))],
    ids=["clone", "deepcopy", "pickle", "merge"],
)
def test_copies(duplicate):
    general = QLinearGeneral(weight(K, N), in_features=K, out_features=(4, 10))
    model = nnx.List([QLinear(weight(K, N), normal(1, N)), general, QEmbed(weight(K, N))])
    copied = duplicate(model)
    x = normal(2, 3, K)
    for ours, theirs in zip(model, copied, strict=True):
        assert theirs is not ours
        function = attend if isinstance(ours, QEmbed) else call
        np.testing.assert_array_equal(function(ours, x), function(theirs, x))


# Errors.


def test_errors():
    w, no_weight = weight(K, N), cast(Any, jnp.ones((K, N)))
    with pytest.raises(TypeError, match=r"w must be a QTensor .*, got ArrayImpl"):
        QLinear(no_weight)
    with pytest.raises(ValueError, match=r"bias has shape \(39,\), expected \(40,\)"):
        QLinear(w, jnp.ones(39))
    with pytest.raises(ValueError, match=r"bias has shape \(40,\), expected \(4, 10\)"):
        QLinearGeneral(w, jnp.ones(N), in_features=K, out_features=(4, 10))
    with pytest.raises(ValueError, match=r"w has shape \(96, 40\), but in_features \(96,\) .* ask for \(96, 25\)"):
        QLinearGeneral(w, in_features=K, out_features=(5, 5))
    with pytest.raises(ValueError, match=r"in_features \(96,\) on axis \(-2, -1\)"):
        QLinearGeneral(w, in_features=K, out_features=N, axis=(-2, -1))
    general = QLinearGeneral(w, in_features=(3, 32), out_features=N, axis=(-2, -1))
    with pytest.raises(ValueError, match=r"x has shape \(2, 96\), expected sizes \(3, 32\) on axis \(-2, -1\)"):
        general(jnp.ones((2, K)))
    with pytest.raises(ValueError, match=r"x has shape \(16,\), expected sizes"):
        general(jnp.ones(16))
    stacked = QLinearGeneral(weight(3, K, N), in_features=K, out_features=N, batch_axis={0: 3})
    with pytest.raises(ValueError, match=r"x has shape \(2, 96\), .* leading axes \(3,\)"):
        stacked(jnp.ones((2, K)))
    with pytest.raises(ValueError, match=r"x has shape \(2, 32\), but w has shape \(96, 40\)"):
        QLinear(w)(jnp.ones((2, 32)))
    with pytest.raises(ValueError, match=r"one weight of shape \(k, n\), got shape \(3, 96, 40\)"):
        QLinear(weight(3, K, N))(jnp.ones((2, K)))
    with pytest.raises(TypeError, match="indices must be integers, got float32"):
        QEmbed(w)(jnp.ones(3))
    with pytest.raises(TypeError, match=r"out_sharding must be a tuple, .* got str"):
        QLinear(w, kernel_metadata={"out_sharding": "x"})


@pytest.mark.parametrize("layer", [QLinear, QEmbed])
def test_out_sharding_is_refused(layer):
    argument = jnp.ones((2, K)) if layer is QLinear else jnp.arange(3)
    with pytest.raises(ValueError, match="out_sharding must be None for a quantized layer"):
        layer(weight(K, N))(argument, out_sharding=jax.P("x"))


def test_import_without_flax(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("jax_qgemm.flax")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match=r"needs Flax: pip install 'jax_qgemm\[flax\]'"):
        importlib.import_module("jax_qgemm.flax")
