"""quantize over stacked layers, under tracing, through checkpoints and with sharding metadata."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax_models import EXACT, MLP, Model, call, round_trip
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_qgemm as qg
import jax_qgemm.flax as qf
from jax_qgemm.testing import nmse


def stacked(layers=3, **options) -> Any:
    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def create(rngs):
        return nnx.List([MLP(rngs, **options), nnx.MultiHeadAttention(2, 64, decode=False, rngs=rngs)])

    return create(nnx.Rngs(0))


@nnx.jit
@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def scan(layer, x):
    mlp, attention = layer
    return attention(mlp(x))


def test_stacked_layers():
    model = stacked()
    quantized = qf.quantize(model, "q4_0")
    assert quantized[0].up.w.shape == (3, 64, 32)
    assert quantized[1].query.w.shape == (3, 64, 64)
    dense = nnx.clone(model)
    for layer in (dense[0].up, dense[0].down):
        layer.kernel[...] = round_trip(layer.kernel[...])
    for name in ("query", "key", "value", "out"):
        kernel = getattr(dense[1], name).kernel
        kernel[...] = round_trip(kernel[...].reshape(3, 64, 64)).reshape(kernel.shape)
    x = jax.random.normal(jax.random.key(1), (2, 5, 64))
    assert nmse(scan(quantized, x), scan(dense, x)) <= EXACT


def test_checkpoint_into_an_abstract_model(tmp_path):
    def create(seed):
        return qf.quantize(Model(nnx.Rngs(seed)), "q4_0")

    model = create(0)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(model))
    abstract = nnx.eval_shape(lambda: create(1))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(abstract)))
    graphdef, state = nnx.split(abstract)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = nnx.merge(graphdef, checkpointer.restore(tmp_path / "model", state))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(restored), nnx.state(model))
    kinds = [(a.dtype, b.dtype) for a, b in zip(*map(jax.tree.leaves, map(nnx.state, (restored, model))), strict=True)]
    assert all(a == b for a, b in kinds)
    assert {a.name for a, _ in kinds} == {"uint32", "uint16", "float32"}
    assert restored.tied is restored.head.layers[0]
    ids = jnp.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(call(restored, ids), call(model, ids))


# Sharding.


def metadata(layer):
    return tuple(variable.get_metadata("out_sharding") for variable in layer.packed.planes)


def linear(out_sharding, **options):
    return nnx.Linear(128, 32, rngs=nnx.Rngs(0), kernel_metadata={"out_sharding": out_sharding, **options})


def attention():
    return nnx.MultiHeadAttention(
        4,
        128,
        decode=False,
        rngs=nnx.Rngs(0),
        kernel_metadata={"out_sharding": ("embed", "heads", "kv")},
        out_kernel_metadata={"out_sharding": (None, "kv", "embed")},
        bias_metadata={"out_sharding": ("heads", "kv")},
        out_bias_metadata={"out_sharding": ("embed",)},
    )


def embed():
    return nnx.Embed(32, 128, rngs=nnx.Rngs(0), embedding_metadata={"out_sharding": ("vocab", "embed")})


def test_sharding_metadata():
    """The names of k and n go to the axes (n/16, k/k_block, payload) of the planes."""

    def abstract(create, format: Any = "q4_0"):
        with nnx.use_eager_sharding(False):
            return nnx.eval_shape(lambda: qf.quantize(create(), format))

    layer = abstract(lambda: linear(("embed", "mlp"), owner="me"))
    assert metadata(layer) == (("mlp", "embed", None),) * 2
    assert layer.packed.planes[0].get_metadata("owner") == "me"
    # One scale per channel: nothing of k to shard.
    layer = abstract(lambda: linear(("embed", "mlp")), qg.int8(-1))
    assert metadata(layer) == (("mlp", "embed", None), ("mlp", None, None))
    assert metadata(abstract(lambda: linear(P("embed")))) == (P(None, "embed", None),) * 2
    assert metadata(abstract(embed)) == (("vocab", "embed", None),) * 2
    layer = abstract(attention)
    assert metadata(layer.query) == (("heads", "embed", None),) * 2
    assert metadata(layer.out) == (("embed", "kv", None),) * 2
    assert layer.query.bias.get_metadata("out_sharding") == ("heads", "kv")
    layer = abstract(lambda: stacked(kernel_metadata={"out_sharding": ("embed", "mlp")}))
    assert metadata(layer[0].up) == (("layers", "mlp", None, None),) * 2  # k = 64 is one block


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_arrays_are_sharded(axis_type):
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        dense = linear(("x", "y"))
        layer = qf.quantize(dense, "q4_0")
        expected = round_trip(np.asarray(dense.kernel[...]))
        general = nnx.LinearGeneral(
            (4, 32),
            (4, 8),
            axis=(-2, -1),
            rngs=nnx.Rngs(0),
            kernel_metadata={"out_sharding": P("x", None, "y")},
        )
        general = qf.quantize(general, "q4_0")
    for converted_layer in (layer, general):
        for variable in converted_layer.packed.planes:
            assert variable.get_value().sharding == NamedSharding(mesh, P("y", "x", None))
    gathered = jax.tree.map(np.asarray, layer.w)
    np.testing.assert_array_equal(gathered.dequantize(), expected)


def test_abstract_model_on_a_mesh():
    """Flax's own tools give each plane its sharding."""
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    _, state = nnx.get_abstract_model(lambda: qf.quantize(linear(("x", "y")), "q4_0"), mesh)
    leaves = jax.tree.leaves(state["packed"])
    assert [leaf.sharding for leaf in leaves] == [NamedSharding(mesh, P("y", "x", None))] * 2
    named = linear(NamedSharding(mesh, P("x", "y")))
    assert metadata(qf.quantize(named, "q4_0")) == (NamedSharding(mesh, P("y", "x", None)),) * 2
