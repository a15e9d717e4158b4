"""GPTQ checkpoints against an oracle that packs and decodes element by element."""

import itertools
import json
import re
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import jax_qgemm as qg
from jax_qgemm import io
from jax_qgemm.io import _repack
from jax_qgemm.testing import check_product, product_limit
from tests import checkpoint_builder as cb


def load_one(directory, **options):
    loaded = io.load_gptq(directory, **options)
    return cb.weight_of(loaded), loaded[1]


COMBINATIONS = [
    (bits, symmetric, group_size, order)
    for bits, symmetric, group_size, order in itertools.product(
        (2, 3, 4, 8), (True, False), (-1, 32, 64, 128), (False, True)
    )
    if group_size != -1 or not order  # one group has no order
] + [(4, False, 16, True), (3, True, 256, False)]


@pytest.mark.parametrize(("bits", "symmetric", "group_size", "order"), COMBINATIONS)
def test_every_combination(tmp_path, bits, symmetric, group_size, order):
    k = 96 if group_size == -1 else (2 if group_size > 100 else 3) * group_size
    index = COMBINATIONS.index((bits, symmetric, group_size, order))
    version, dtype = 1 + index // 2 % 2, cb.DTYPES[index % 3]
    oracle = cb.random_weight(
        bits, k, cb.N, group_size, symmetric=symmetric, act_order=order, dtype=dtype, low_zero=int(version == 1)
    )
    directory = cb.write_directory(
        tmp_path / "a",
        cb.gptq_tensors(oracle, version),
        cb.gptq_config(oracle, group_size, version, sym=symmetric, desc_act=order),
    )
    w, metadata = load_one(directory)
    cb.check_weight(w, oracle, group_size)
    assert (w.permutation is not None) == order
    if order:
        np.testing.assert_array_equal(w.permutation, sorted(range(k), key=lambda i: (oracle.g_idx[i], i)))
    io.save_gptq(tmp_path / "b", {"layer.weight": w}, metadata)
    cb.assert_same_tensors(directory, tmp_path / "b")
    again = json.loads((tmp_path / "b" / "config.json").read_text())
    assert again == json.loads((directory / "config.json").read_text())
    assert json.loads((tmp_path / "b" / "quantize_config.json").read_text()) == again["quantization_config"]


def test_files_are_as_readable_as_others(tmp_path):
    """The library writes tensors that only their owner may read."""
    w = qg.quantize(np.ones((64, 16), np.float32), qg.int4(32))
    io.save_gptq(tmp_path / "a", {"layer.weight": w})
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "a").iterdir()}
    assert len(modes) == 3
    assert len(set(modes.values())) == 1, modes


def test_three_bit_words_by_hand(tmp_path):
    """Codes 0 to 7, again and again: 24 bits, 0o76543210 = 0xFAC688, cross both borders of the three words."""
    words = np.array([0x88FAC688, 0xC688FAC6, 0xFAC688FA], np.uint32).view(np.int32)
    tensors = {
        "layer.qweight": words[:, None].repeat(32, 1),
        "layer.qzeros": words[None],
        "layer.scales": np.ones((1, 32), np.float16),
        "layer.g_idx": np.zeros(32, np.int32),
    }
    config = {"bits": 3, "group_size": -1, "checkpoint_format": "gptq_v2"}
    w, _ = load_one(cb.write_directory(tmp_path / "a", tensors, config))
    codes = np.arange(32) % 8
    np.testing.assert_array_equal(cb.decoded(w), codes[:, None] - codes[None].astype(np.float32))


def test_a_product_of_half_precision_with_act_order(tmp_path):
    oracle = cb.random_weight(4, 512, 40, 128, symmetric=False, act_order=True)
    directory = cb.write_directory(tmp_path / "a", cb.gptq_tensors(oracle, 2), cb.gptq_config(oracle, 128, 2))
    w, _ = load_one(directory)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        x = np.random.default_rng(2).standard_normal((5, 512)).astype(dtype)
        check_product(jax.jit(qg.matmul)(x, w), x, oracle.dense(), product_limit(dtype))


def test_k_and_n_that_do_not_fill_their_last_words(tmp_path):
    oracle = cb.random_weight(3, 77, 5, -1, symmetric=False)
    directory = cb.write_directory(tmp_path / "a", cb.gptq_tensors(oracle, 2), cb.gptq_config(oracle, -1, 2))
    w, metadata = load_one(directory)
    cb.check_weight(w, oracle, -1)
    io.save_gptq(tmp_path / "b", {"layer.weight": w}, metadata)
    cb.assert_same_tensors(directory, tmp_path / "b")


def test_many_steps_give_the_same_weight(tmp_path, monkeypatch):
    oracle = cb.random_weight(3, 128, 83, 32, symmetric=False, act_order=True)
    directory = cb.write_directory(tmp_path / "a", cb.gptq_tensors(oracle, 2), cb.gptq_config(oracle, 32, 2))
    whole, metadata = load_one(directory)
    monkeypatch.setattr(_repack, "_STEP_ELEMENTS", 128 * 40)  # 32 rows of n at a time
    parts, _ = load_one(directory)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    io.save_gptq(tmp_path / "b", {"layer.weight": parts}, metadata)
    cb.assert_same_tensors(directory, tmp_path / "b")


@pytest.mark.parametrize("group_size", [-1, 32])
def test_g_idx_may_be_missing(tmp_path, group_size):
    oracle = cb.random_weight(4, 96, cb.N, group_size, symmetric=False)
    tensors = cb.gptq_tensors(oracle, 2)
    del tensors["layer.g_idx"]
    config = cb.gptq_config(oracle, group_size, 2, desc_act=False)
    w, _ = load_one(cb.write_directory(tmp_path / "a", tensors, config))
    cb.check_weight(w, oracle, group_size)
    with pytest.raises(io.FormatError, match="no g_idx"):
        load_one(cb.write_directory(tmp_path / "b", tensors, config | {"desc_act": True}))


def test_a_group_of_all_rows_is_per_channel(tmp_path):
    oracle = cb.random_weight(4, 96, cb.N, 96, symmetric=False)
    directory = cb.write_directory(tmp_path / "a", cb.gptq_tensors(oracle, 2), cb.gptq_config(oracle, 96, 2))
    cb.check_weight(load_one(directory)[0], oracle, -1)


def test_other_tensors_and_names(tmp_path):
    oracle = cb.random_weight(4, 64, cb.N, 32, symmetric=True)
    plain = {
        "layer.bias": np.arange(cb.N).astype(np.float16),
        "norm.weight": np.arange(4).astype(ml_dtypes.bfloat16),
        "ids": np.arange(3, dtype=np.int64),
        "kv_scale": np.array([0.5, 448]).astype(ml_dtypes.float8_e4m3fn),
        "scalar": np.array(2.5, np.float32),
    }
    tensors = cb.gptq_tensors(oracle, prefix="a.b") | cb.gptq_tensors(oracle, prefix="") | plain
    tensors = {name.removeprefix("."): value for name, value in tensors.items()}
    directory = cb.write_directory(tmp_path / "a", tensors, cb.gptq_config(oracle, 32))
    loaded, metadata = io.load_gptq(directory)
    assert loaded.keys() == {"a.b.weight", "weight", *plain}
    assert metadata["model_type"] == "test"
    for name, value in plain.items():
        assert np.asarray(loaded[name]).dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(loaded[name]), value)
    assert isinstance(loaded["layer.bias"], jax.Array)
    assert isinstance(loaded["ids"], np.ndarray)  # JAX would make it int32
    io.save_gptq(tmp_path / "b", loaded, metadata)
    np.testing.assert_array_equal(np.asarray(io.load_gptq(tmp_path / "b")[0]["kv_scale"]), plain["kv_scale"])
    assert io.load_gptq(directory, tensors=["weight"])[0].keys() == {"weight"}
    assert io.load_gptq(directory, tensors=lambda name: "b." in name)[0].keys() == {"a.b.weight"}
    with pytest.raises(ValueError, match=re.escape("'a.b.qweight'")):
        io.load_gptq(directory, tensors=["a.b.qweight"])
    with pytest.raises(TypeError, match="single string"):
        io.load_gptq(directory, tensors="weight")


# Zero points of version 1.


def wrapping(bits, prefix="layer", *, by_word):
    """A weight with zero points of 0 between others, as a writer of version 1 stores them."""
    oracle = cb.random_weight(bits, 32, 64, 32, symmetric=False, seed=5)
    tensors = cb.gptq_tensors(oracle, 1, prefix)
    if by_word:
        words = cb.pack_stream(oracle.zero_points, bits, 1)
        ones = sum(1 << shift for shift in range(0, 32, bits))
        stored = [(int(word) - ones) & 0xFFFFFFFF for word in words.view(np.uint32).ravel()]
        tensors[f"{prefix}.qzeros"] = np.array(stored, np.uint32).view(np.int32).reshape(words.shape)
    assert (oracle.zero_points == 0).any()
    return oracle, tensors


# GPTQModel stores 3-bit zero points field by field.
@pytest.mark.parametrize(
    ("bits", "by_word"), [(2, False), (3, False), (4, False), (8, False), (2, True), (4, True), (8, True)]
)
def test_zero_points_that_wrap_around(tmp_path, bits, by_word):
    oracle, tensors = wrapping(bits, by_word=by_word)
    config = cb.gptq_config(oracle, 32)
    directory = cb.write_directory(tmp_path / "a", tensors, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w, _ = load_one(directory, wrapped="word" if by_word else "field")
    cb.check_weight(w, oracle, 32)
    if not by_word:
        with pytest.warns(UserWarning, match=r"zero points of version 1, such as some of layer\.qzeros, wrap"):
            w, _ = load_one(directory)
        cb.check_weight(w, oracle, 32)
    for quantizer in ("gptqmodel:5.2.0", ["GPTQModel:1.4.0", "other"]):
        cb.write_directory(tmp_path / "a", tensors, config | {"meta": {"quantizer": quantizer}})
        w, _ = load_one(directory, wrapped=None if by_word or bits == 3 else "field")
        cb.check_weight(w, oracle, 32)


def test_zero_points_that_contradict_the_configuration(tmp_path):
    oracle = cb.random_weight(4, 64, cb.N, 32, symmetric=True)
    later = cb.write_directory(tmp_path / "later", cb.gptq_tensors(oracle, 2), cb.gptq_config(oracle, 32, 1, sym=True))
    with pytest.raises(io.FormatError, match=r"symmetric, but .* Read as version 2 they are: pass version=2") as caught:
        load_one(later)
    assert caught.value.field == "tensor 'layer.qzeros'"
    cb.check_weight(load_one(later, version=2)[0], oracle, 32)
    earlier = cb.write_directory(
        tmp_path / "earlier", cb.gptq_tensors(oracle, 1), cb.gptq_config(oracle, 32, 2, sym=True)
    )
    with pytest.raises(io.FormatError, match="pass version=1"):
        load_one(earlier)
    cb.check_weight(load_one(earlier, version=1)[0], oracle, 32)
    oracle = cb.random_weight(4, 64, cb.N, 32, symmetric=False)
    config = cb.gptq_config(oracle, 32, 2, sym=True)
    neither = cb.write_directory(tmp_path / "neither", cb.gptq_tensors(oracle, 2), config)
    with pytest.raises(io.FormatError, match="pass version=1 or version=2"):
        load_one(neither)
    cb.check_weight(load_one(neither, version=2)[0], oracle, 32)


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="version must be 1, 2 or None, got 3"):
        io.load_gptq(tmp_path, version=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wrapped must be"):
        io.load_gptq(tmp_path, wrapped="bit")  # type: ignore[arg-type]


# Configuration.


def test_configuration_in_a_file_of_its_own(tmp_path):
    oracle = cb.random_weight(4, 64, cb.N, 32, symmetric=False)
    config = cb.gptq_config(oracle, 32, 2)
    directory = cb.write_directory(tmp_path / "a", cb.gptq_tensors(oracle, 2), config)
    own = directory / "quantize_config.json"
    own.write_text(json.dumps(config))
    cb.check_weight(load_one(directory)[0], oracle, 32)
    own.write_text(json.dumps(config | {"bits": 8}))
    with pytest.raises(io.FormatError, match=r"quantize_config\.json: bits at byte 0: it differs"):
        load_one(directory)
    (directory / "config.json").unlink()
    own.write_text(json.dumps(config))
    w, metadata = load_one(directory)
    cb.check_weight(w, oracle, 32)
    assert metadata == {"quantization_config": config}
    own.unlink()
    with pytest.raises(io.FormatError, match="there is no quantization_config"):
        load_one(directory)


def test_modules_of_other_widths(tmp_path):
    four = cb.random_weight(4, 64, cb.N, 32, symmetric=False)
    eight = cb.random_weight(8, 64, cb.N, 64, symmetric=False)
    tensors = cb.gptq_tensors(four, 2) | cb.gptq_tensors(eight, 2, "other")
    config = cb.gptq_config(four, 32, 2)
    with pytest.raises(io.FormatError, match=r"other\.qzeros"):
        io.load_gptq(cb.write_directory(tmp_path / "a", tensors, config))
    dynamic = {"+:other": {"bits": 8, "group_size": 64}}
    loaded, _ = io.load_gptq(cb.write_directory(tmp_path / "b", tensors, config | {"dynamic": dynamic}))
    cb.check_weight(loaded["layer.weight"], four, 32)
    cb.check_weight(loaded["other.weight"], eight, -1)


# Writing.


def test_saving_what_quantize_made(tmp_path):
    tensors = {"a.weight": cb.quantized(qg.int4(32)), "b.weight": cb.quantized(qg.int4(32, symmetric=False), 96, 33)}
    io.save_gptq(tmp_path / "a", tensors)
    config = json.loads((tmp_path / "a" / "quantize_config.json").read_text())
    expected = {"bits": 4, "group_size": 32, "sym": False, "desc_act": False, "checkpoint_format": "gptq_v2"}
    assert config == expected | {"quant_method": "gptq"}
    loaded = io.load_gptq(tmp_path / "a")
    for name, w in tensors.items():
        assert cb.weight_of(loaded, name).format == w.format
        np.testing.assert_array_equal(cb.decoded(loaded[0][name]), cb.decoded(w))


def test_symmetric_weights_are_saved_as_version_1(tmp_path):
    io.save_gptq(tmp_path / "a", {"a.weight": cb.quantized(qg.int8(64))})
    assert (load_file(tmp_path / "a" / "model.safetensors")["a.qzeros"].view(np.uint8) == 127).all()
    assert cb.weight_of(io.load_gptq(tmp_path / "a"), "a.weight").format == qg.int8(64)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({}, {}, "no QTensor"),
        ({"a": "int4"}, {}, "must end in 'weight'"),
        ({"a.weight": "q4_0"}, {}, "got format q4_0"),
        ({"a.weight": "int4", "b.weight": "int8"}, {}, "one width and one group size"),
        ({"a.weight": qg.int4(32), "b.weight": qg.int4(64)}, {}, "one width and one group size"),
        ({"a.weight": "int4"}, {"version": 3}, "version must be"),
        ({"a.weight": "int4", "a.scales": np.ones(3, np.float32)}, {}, "written as 'a.scales'"),
    ],
)
def test_what_can_not_be_saved(tmp_path, tensors, options, message):
    values = {
        name: value if isinstance(value, np.ndarray) else cb.quantized(value, 128) for name, value in tensors.items()
    }
    with pytest.raises(ValueError, match=message):
        io.save_gptq(tmp_path / "a", values, **options)
    assert not (tmp_path / "a").exists() or not any((tmp_path / "a").iterdir())


def test_zero_points_that_version_1_can_not_hold(tmp_path):
    oracle = cb.random_weight(4, 64, cb.N, 32, symmetric=False)
    directory = cb.write_directory(tmp_path / "a", cb.gptq_tensors(oracle, 2), cb.gptq_config(oracle, 32, 2))
    tensors, metadata = io.load_gptq(directory)
    with pytest.raises(ValueError, match=r"tensors\['layer.weight'\]: version 1 of GPTQ .* pass version=2"):
        io.save_gptq(tmp_path / "b", tensors, metadata, version=1)
