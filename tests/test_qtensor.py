"""QTensor as a pytree: its shape, its slices, its bytes and its words."""

import copy
import pickle

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, k_of, random_weight

import jax_qgemm as qg
from jax_qgemm.formats import GGUF_FORMATS

RNG = np.random.default_rng


@pytest.fixture
def stacked():
    w, dense = random_weight(qg.formats.get_format("q4_k"), 40, 512, RNG(0), batch=3)
    return jax.tree.map(jnp.asarray, w), dense


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_planes_are_unsigned_and_slices_stay_aligned(format):
    w, _ = random_weight(format, 16, k_of("three blocks", format), RNG(0), batch=2)
    for plane in w.planes:
        assert np.issubdtype(plane.dtype, np.unsignedinteger)
        assert plane.shape[-1] * plane.dtype.itemsize % 16 == 0
    assert len(w.planes) == len(format.planes)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("n", [1, 16, 33])
def test_padding_is_static_and_holds_zeros(format, n):
    """Scales of padded rows and columns are zero; aligned weights have no padding at all."""
    k = k_of("tail", format)
    packed = jnp.asarray(RNG(1).standard_normal((format.k_block, 16)), jnp.float32)
    if format.name not in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "nvfp4"):
        assert qg.quantize(packed, format).padding == (0, 0)
    w, _ = random_weight(format, n, k, RNG(1))
    assert w.padding == (-k % format.k_block, -n % 16)
    assert w.shape == (k, n)
    whole = qg.QTensor(w.planes, w.format, (0, 0))
    values = np.array(whole.dequantize())
    assert values.shape == (k + w.padding[0], n + w.padding[1])
    assert not values[:, n:].any()
    if format.group:
        assert not values[k:].any()


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_planes_of_gguf_bytes_are_those_of_the_layout(name):
    """from_gguf_bytes packs what the independent packer of the tests packs."""
    format = GGUF_FORMATS[name]
    k = k_of("tail", format)
    raw = cases.random_blocks(format, 37, k, RNG(2), any_scale=True)
    w = qg.QTensor.from_gguf_bytes(raw, name)
    fields = jax.jit(format.from_bytes)(raw.reshape(37, -1, format.block_bytes))
    expected = cases.pack({n: np.asarray(a) for n, a in fields.items()}, format, 37, k)
    for ours, theirs in zip(w.planes, expected.planes, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_gguf_bytes_round_trip(name):
    format = GGUF_FORMATS[name]
    raw = RNG(3).integers(0, 256, (2, 19, 3 * format.block_bytes), np.uint8)
    w = qg.QTensor.from_gguf_bytes(raw, name)
    assert w.shape == (2, 3 * format.block, 19)
    np.testing.assert_array_equal(np.asarray(w.to_gguf_bytes()), raw)


def test_large_tables_are_repacked_in_steps():
    """Several steps give what one gives."""
    format = GGUF_FORMATS["q4_0"]
    raw = RNG(4).integers(0, 256, (40000, 32 * format.block_bytes), np.uint8)
    w = qg.QTensor.from_gguf_bytes(raw, "q4_0")
    assert w.shape == (1024, 40000)
    np.testing.assert_array_equal(np.asarray(w.to_gguf_bytes()), raw)


def test_shape_follows_the_arrays(stacked):
    w, dense = stacked
    assert (w.shape, w.ndim, w.size) == ((3, 512, 40), 3, 3 * 512 * 40)
    assert w.nbytes == sum(np.asarray(p).nbytes for p in w.planes)
    np.testing.assert_array_equal(np.asarray(w.dequantize()), dense.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(w[1].dequantize()), dense[1].astype(np.float32))
    assert w[1:].shape == (2, 512, 40)
    deeper = jax.tree.map(lambda a: a[None], w)
    assert deeper.shape == (1, 3, 512, 40)
    assert deeper[0, 2].shape == (512, 40)


@pytest.mark.parametrize("index", [(0, 0), (slice(None), 3), ..., (0, ...)], ids=str)
def test_only_batch_axes_are_indexed(stacked, index):
    with pytest.raises(IndexError, match=r"leading batch axes.*\(3, 512, 40\)"):
        stacked[0][index]


def test_pytree_round_trip(stacked):
    w, _ = stacked
    leaves, treedef = jax.tree.flatten(w)
    again = jax.tree.unflatten(treedef, leaves)
    assert isinstance(again, qg.QTensor)
    assert (again.format, again.padding) == (w.format, w.padding)
    assert jax.tree.structure(again) == treedef
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(w)]
    assert paths == [f".{p.name}" for p in w.format.planes]


def test_casts_of_floats_leave_it_alone(stacked):
    w, _ = stacked
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a, w)
    for a, b in zip(jax.tree.leaves(cast), jax.tree.leaves(w), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_unflatten_takes_any_leaves(stacked):
    """Transforms put placeholders in place of arrays."""
    w, _ = stacked
    axes = jax.tree.map(lambda _: 0, w)
    assert jax.tree.leaves(axes) == [0] * len(w.planes)
    assert "q4_k" in repr(axes)
    assert jax.tree.map(lambda _: None, w).planes == (None,) * len(w.planes)


def test_repr(stacked):
    text = repr(stacked[0])
    assert "q4_k" in text
    assert "3, 512, 40" in text
    assert f"{stacked[0].nbytes:,} bytes" in text
    int4 = random_weight(qg.int4(64, symmetric=False), 16, 64, RNG(0))[0]
    assert "group_size=64" in repr(int4)
    assert "asymmetric" in repr(int4)


def test_formats_are_values():
    assert qg.int4(64) == qg.int4(64)
    assert hash(qg.int4(64)) == hash(qg.int4(64))
    assert qg.int4(64) != qg.int4(64, symmetric=False)
    assert qg.formats.get_format("int4") == qg.int4(128)
    with pytest.raises(AttributeError):
        qg.int4(64).group = 32  # pyright: ignore[reportAttributeAccessIssue]


def test_copies(stacked):
    for again in (copy.deepcopy(stacked[0]), pickle.loads(pickle.dumps(stacked[0]))):
        assert again.format == stacked[0].format
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(stacked[0]), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dequantize_rounds_once(dtype):
    w, dense = random_weight(qg.int8(16, symmetric=False, scale_dtype="float32"), 20, 48, RNG(5))
    expected = dense.astype(np.float32).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(w.dequantize(dtype)), expected)


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "int4", "int8", "mxfp4"])
def test_quantize_under_jit_is_quantize(name):
    kernel = RNG(6).standard_normal((2, 256, 24)).astype(np.float32)
    eager = qg.quantize(kernel, name)
    jitted = jax.jit(lambda a: qg.quantize(a, name))(kernel)
    assert eager.shape == jitted.shape == (2, 256, 24)
    for a, b in zip(eager.planes, jitted.planes, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
