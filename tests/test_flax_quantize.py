"""quantize: what it converts and what it refuses, against the unconverted model with dequantized weights."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_models import EXACT, Model, call, converted, round_trip, types, with_round_trips

import jax_qgemm as qg
import jax_qgemm.flax as qf
from jax_qgemm.testing import nmse


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
