"""quantize: what it converts and what it refuses, against the unconverted model with dequantized weights."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_qgemm as qg
import jax_qgemm.flax as qf
from jax_qgemm.testing import nmse

EXACT = 1e-11  # float32 on the CPU


def float64(array):
    return np.asarray(array).astype(np.float64)


def round_trip(matrix, format="q4_0"):
    """What quantization makes of a dense (*batch, k, n)."""
    return qg.quantize(matrix, format).dequantize()


class MLP(nnx.Module):
    def __init__(self, rngs, **options):
        self.up = nnx.Linear(64, 32, rngs=rngs, **options)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.down = nnx.Linear(32, 64, use_bias=False, rngs=rngs, **options)

    def __call__(self, x):
        return x + self.down(self.norm(jnp.tanh(self.up(x))))


class Model(nnx.Module):
    """Layers in every kind of container, one of them at two places."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(48, 64, rngs=rngs)
        self.blocks = nnx.List([MLP(rngs)])
        self.named = nnx.Dict(mlp=MLP(rngs))
        self.plain = nnx.data({"list": [nnx.Linear(64, 64, rngs=rngs)]})
        self.head = nnx.Sequential(nnx.Linear(64, 64, rngs=rngs), jnp.tanh)
        self.tied = self.head.layers[0]

    def __call__(self, ids):
        x = self.embed(ids)
        for block in (*self.blocks, self.named["mlp"]):
            x = block(x)
        x = self.tied(self.head(self.plain["list"][0](x)))
        return self.embed.attend(x)


def types(model):
    return {"/".join(map(str, path)): type(module) for path, module in nnx.iter_modules(model)}


def converted(model):
    return {path for path, kind in types(model).items() if kind.__module__.startswith("jax_qgemm")}


@nnx.jit
def call(model, *args):
    return model(*args)


def with_round_trips(model):
    """The same model, unconverted, its weights replaced by what quantization makes of them."""
    model = nnx.clone(model)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            module.kernel[...] = round_trip(module.kernel[...])
        elif isinstance(module, nnx.Embed):
            module.embedding[...] = round_trip(module.embedding[...].T).T
    return model


def test_model():
    model: Any = Model(nnx.Rngs(0))
    ids = jnp.arange(12).reshape(2, 6)
    before = jax.tree.map(np.array, nnx.state(model))
    quantized = qf.quantize(model, "q4_0")
    assert converted(quantized) == {
        "embed",
        *(f"{mlp}/{layer}" for mlp in ("blocks/0", "named/mlp") for layer in ("up", "down")),
        "plain/list/0",
        "head/layers/0",
    }
    assert {types(quantized)[p] for p in ("embed", "blocks/0/up")} == {qf.QEmbed, qf.QLinear}
    assert quantized.tied is quantized.head.layers[0]
    assert nmse(call(quantized, ids), call(with_round_trips(model), ids)) <= EXACT
    # The original is what it was, and shares no variable with the copy.
    assert not converted(model)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    quantized.blocks[0].norm.scale[...] = jnp.zeros(32)
    np.testing.assert_array_equal(model.blocks[0].norm.scale[...], np.ones(32))


def test_attention():
    attention = nnx.MultiHeadAttention(
        num_heads=4,
        in_features=64,
        qkv_features=32,
        out_features=48,
        decode=False,
        normalize_qk=True,
        bias_init=nnx.initializers.normal(),
        rngs=nnx.Rngs(0),
    )
    quantized = qf.quantize(attention, "q4_0")
    assert {type(getattr(quantized, p)) for p in ("query", "key", "value", "out")} == {qf.QLinearGeneral}
    dense = nnx.clone(attention)
    for projection, k in (("query", 64), ("key", 64), ("value", 64), ("out", 32)):
        kernel = getattr(dense, projection).kernel
        kernel[...] = round_trip(kernel[...].reshape(k, -1)).reshape(kernel.shape)
    x = jax.random.normal(jax.random.key(1), (2, 7, 64))
    mask = nnx.make_causal_mask(jnp.ones((2, 7)))
    out, expected = (nnx.jit(lambda m, x: m(x, mask=mask))(m, x) for m in (quantized, dense))
    assert out.shape == (2, 7, 48)
    assert nmse(out, expected) <= EXACT


@pytest.mark.parametrize("param_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("dtype", "preferred"), [(None, None), ("bfloat16", None), ("float16", "float32"), (None, "bfloat16")]
)
def test_result_types(param_dtype, dtype, preferred):
    """Every mix of types gives what the layers of Flax give."""
    options = {
        "dtype": dtype,
        "param_dtype": param_dtype,
        "preferred_element_type": preferred,
        "rngs": nnx.Rngs(0),
    }
    model = nnx.List(
        [
            nnx.Linear(32, 16, **options),
            nnx.Linear(32, 16, use_bias=False, **options),
            nnx.LinearGeneral(32, (4, 4), **options),
        ]
    )
    quantized = qf.quantize(model, "q4_0")
    for ours, theirs in zip(quantized, model, strict=True):
        for x_dtype in ("float16", "bfloat16", "float32", "int32"):
            x = jax.ShapeDtypeStruct((2, 32), x_dtype)
            assert jax.eval_shape(ours, x) == jax.eval_shape(theirs, x)


def test_embed_types():
    for dtype, param_dtype in ((None, "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")):
        embed = nnx.Embed(16, 32, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        quantized = qf.quantize(embed, "q4_0")
        assert type(quantized) is qf.QEmbed
        ids, x = jax.ShapeDtypeStruct((3,), "int32"), jax.ShapeDtypeStruct((2, 32), "float32")
        assert jax.eval_shape(quantized, ids) == jax.eval_shape(embed, ids)
        assert jax.eval_shape(quantized.attend, x) == jax.eval_shape(embed.attend, x)


def test_precision_is_kept():
    layer = qf.quantize(nnx.Linear(32, 16, precision="highest", rngs=nnx.Rngs(0)), "q4_0")
    assert "highest=True" in str(jax.make_jaxpr(layer)(jnp.ones((2, 32))))
    layer = qf.quantize(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), "q4_0")
    assert "highest=False" in str(jax.make_jaxpr(layer)(jnp.ones((2, 32))))


# Choice of layers and formats.


def test_where_by_name_and_by_type():
    model = Model(nnx.Rngs(0))
    quantized = qf.quantize(model, "q4_0", where=lambda path, module: "mlp" in path)
    assert converted(quantized) == {"named/mlp/up", "named/mlp/down"}
    quantized = qf.quantize(model, "q4_0", where=lambda path, module: isinstance(module, nnx.Embed))
    assert converted(quantized) == {"embed"}
    # What is converted is left alone by the next conversion.
    quantized = qf.quantize(quantized, "q8_0", where=lambda path, module: path[:1] == ("blocks",))
    quantized = qf.quantize(quantized, qg.int4(32))
    assert quantized.embed.w.format.name == "q4_0"
    assert quantized.blocks[0].up.w.format.name == "q8_0"
    assert quantized.named["mlp"].up.w.format == qg.int4(32)


def test_format_by_layer():
    def format(path, module):
        if isinstance(module, nnx.Embed):
            return None
        return "q8_0" if path[-1] == "down" else qg.int4(32, symmetric=False)

    quantized = qf.quantize(Model(nnx.Rngs(0)), format)
    assert type(quantized.embed) is nnx.Embed
    assert quantized.blocks[0].down.w.format.name == "q8_0"
    assert quantized.blocks[0].up.w.format == qg.int4(32, symmetric=False)


class Tied(nnx.Module):
    """Two layers over one variable, and a third use of it on demand."""

    def __init__(self, second: type = nnx.Linear, third=False):
        rngs = nnx.Rngs(0)
        self.a, self.b = nnx.Linear(32, 32, rngs=rngs), second(32, 32, rngs=rngs)
        setattr(self.b, "embedding" if second is nnx.Embed else "kernel", self.a.kernel)
        if third:
            self.c = self.a.kernel


def test_a_shared_kernel_stays_shared():
    model = qf.quantize(Tied(), "q4_0")
    ours, theirs = model.a.packed, model.b.packed
    assert all(a is b for a, b in zip(ours.planes, theirs.planes, strict=True))
    assert len(jax.tree.leaves(nnx.state(model, qf.QWeight))) == len(ours.planes)
    assert model.a.bias is not model.b.bias


@pytest.mark.parametrize(
    ("model", "format", "where"),
    [
        (Tied(third=True), "q4_0", None),
        (Tied(), "q4_0", lambda path, module: path == ("a",)),
        (Tied(), lambda path, module: "q4_0" if path == ("a",) else "q8_0", None),
        (Tied(nnx.Embed), "q4_0", None),  # its table is the transpose
    ],
    ids=["third use", "one of two", "two formats", "transposed"],
)
def test_a_tie_is_never_broken(model, format, where):
    with pytest.raises(ValueError, match=r"a: its kernel is shared by a/kernel, "):
        qf.quantize(model, format, where)


class LinearWithNorm(nnx.Linear):
    pass


def test_subclasses_are_left_alone():
    model = nnx.List([nnx.Linear(32, 16, rngs=nnx.Rngs(0)), LinearWithNorm(16, 16, rngs=nnx.Rngs(0))])
    assert converted(qf.quantize(model, "q4_0")) == {"0"}
    with pytest.raises(TypeError, match=r"1: can't convert LinearWithNorm: only modules of exactly the types"):
        qf.quantize(model, "q4_0", where=lambda path, module: True)


def dot_general(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda r: nnx.Conv(32, 16, 3, rngs=r), "layer: can't convert Conv: only modules of"),
        (lambda r: nnx.Einsum("ab,bc->ac", (32, 16), rngs=r), "layer: can't convert Einsum: only"),
        (
            lambda r: nnx.Linear(32, 16, dot_general=dot_general, rngs=r),
            "layer: can't convert Linear: its own dot_general, ",
        ),
        (
            lambda r: nnx.LinearGeneral(32, 16, dot_general_cls=lambda: dot_general, rngs=r),
            "layer: can't convert LinearGeneral: its own dot_general_cls",
        ),
        (
            lambda r: nnx.Embed(16, 32, promote_dtype=lambda *a, **k: a[0], rngs=r),
            "layer: can't convert Embed: its own promote_dtype",
        ),
        (
            lambda r: nnx.Linear(32, 16, param_dtype=jnp.complex64, rngs=r),
            "layer: w must be .* got complex64",
        ),
    ],
    ids=["Conv", "Einsum", "dot_general", "dot_general_cls", "promote_dtype", "dtype"],
)
def test_refused_layers(layer, message):
    model = nnx.Dict(layer=layer(nnx.Rngs(0)))
    with pytest.raises(TypeError, match=message):
        qf.quantize(model, "q4_0", where=lambda path, module: path == ("layer",))


def test_errors():
    rngs = nnx.Rngs(0)
    model = nnx.Dict(mlp=nnx.Dict(up=nnx.Linear(48, 16, rngs=rngs)))
    with pytest.raises(ValueError, match=r"^mlp/up: w has k = 48 .* needs a positive multiple of 32"):
        qf.quantize(model, "q4_0")
    with pytest.raises(ValueError, match=r"^the model itself: w has k = 48"):
        qf.quantize(model["mlp"]["up"], "q4_0")
    with pytest.raises(ValueError, match=r"unknown format 'q4_9'"):
        qf.quantize(model, "q4_9")
    with pytest.raises(TypeError, match=r"^mlp/up: format must be a name or a Format .* got int"):
        qf.quantize(model, cast(Any, 4))
    with pytest.raises(TypeError, match=r"model must be an nnx.Module, got dict"):
        qf.quantize({}, "q4_0")
    with pytest.raises(ValueError, match=r"no module was selected that is an nnx.Linear"):
        qf.quantize(nnx.Dict(norm=nnx.LayerNorm(8, rngs=rngs)), "q4_0")
    with pytest.raises(ValueError, match=r"no module was selected .* where accepted Dict at mlp$"):
        qf.quantize(model, "q4_0", where=lambda path, module: path == ("mlp",))
    with pytest.raises(TypeError, match=r"^mlp/up: the kernel is abstract: call quantize inside nnx.eval_shape"):
        qf.quantize(nnx.eval_shape(lambda: model), "int8")
    bad = nnx.Dict(a=nnx.Linear(32, 16, rngs=rngs), b=nnx.Linear(32, 16, rngs=rngs))
    bad["b"].kernel[...] = bad["b"].kernel[...].at[3, 4].set(jnp.nan)
    with pytest.raises(ValueError, match=r"^b: w has values that are not finite"):
        qf.quantize(bad, "q4_0")
    bad["b"].kernel = nnx.Param(jnp.zeros((32, 2, 16)))
    with pytest.raises(ValueError, match=r"^b: the kernel has shape \(32, 2, 16\), expected \(32, 16\)"):
        qf.quantize(bad, "q4_0")


def test_progress(capsys):
    model = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    qf.quantize(model, "q4_0", progress=False)
    assert capsys.readouterr().err == ""
    qf.quantize(model, "q4_0", progress=True)
    assert "1/1" in capsys.readouterr().err


# Stacked layers, abstract models, checkpoints.


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
