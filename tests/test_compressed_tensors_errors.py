"""Damaged and hostile compressed-tensors checkpoints: a FormatError, before anything reaches a device."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_qgemm as qg
from jax_qgemm import io
from jax_qgemm.io import _repack
from tests import checkpoint_builder as cb
from tests.test_compressed_tensors import config_of, fp4_config, fp4_weight, group_of, pack_tensors


def with_weights(**change):
    config = config_of(group_of(4, 32, False))
    config["config_groups"]["group_0"]["weights"] |= change
    return config


GOOD = config_of(group_of(4, 32, False))
BAD_CONFIGS = {
    "float8": (GOOD | {"format": "float-quantized"}, "quantization_config.format"),
    "2:4 sparsity": (GOOD | {"format": "marlin-24"}, "quantization_config.format"),
    "format of a list": (GOOD | {"format": ["pack-quantized"]}, "quantization_config.format"),
    "sparse": (GOOD | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "rotations": (GOOD | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    "no groups": (GOOD | {"config_groups": {}}, "config_groups"),
    "groups of a list": (GOOD | {"config_groups": []}, "config_groups"),
    "group of a string": (GOOD | {"config_groups": {"group_0": "W4A16"}}, "config_groups.group_0"),
    "groups without weights": (GOOD | {"config_groups": {"group_0": {"targets": []}}}, "config_groups"),
    "format of a group": (config_of(group_of(4, 32, False) | {"format": "dense"}), "group_0.format"),
    "bits of a list": (with_weights(num_bits=[4]), "weights.num_bits"),
    "5 bits": (with_weights(num_bits=5), "weights.num_bits"),
    "8 bits": (with_weights(num_bits=8), "layer.weight_packed"),
    "symmetric": (with_weights(symmetric=True), "layer.weight_packed"),
    "group size 0": (with_weights(group_size=0), "weights.group_size"),
    "negative group size": (with_weights(group_size=-32), "weights.group_size"),
    "another group size": (with_weights(group_size=64), "layer.weight_packed"),
    "per channel": (with_weights(group_size=None, strategy="channel"), "layer.weight_packed"),
    "blocks": (with_weights(strategy="block"), "weights.strategy"),
    "8-bit floats": (with_weights(type="float", num_bits=8), "weights.type"),
    "4-bit floats in groups of 64": (with_weights(type="float", group_size=64, symmetric=True), "weights.group_size"),
    "dynamic": (with_weights(dynamic=True), "weights.dynamic"),
    "4 bits in bytes": (config_of(group_of(4, 32, False), format="int-quantized"), "weights.num_bits"),
    "method": (GOOD | {"quant_method": "gptq"}, "quant_method"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_bad_configuration(tmp_path, what):
    config, field = BAD_CONFIGS[what]
    oracle = cb.random_weight(4, 128, cb.N, 32, symmetric=False)
    directory = cb.write_directory(tmp_path / "a", pack_tensors(oracle, symmetric=False), config)
    with pytest.raises(io.FormatError) as caught:
        io.load_compressed_tensors(directory)
    assert field in caught.value.field


def test_a_checkpoint_without_quantized_tensors(tmp_path):
    directory = cb.write_directory(tmp_path / "a", {"a.weight": np.ones((2, 2), np.float16)}, GOOD)
    with pytest.raises(io.FormatError, match="no tensor of the checkpoint is quantized"):
        io.load_compressed_tensors(directory)


BAD_TENSORS = {
    "NaN": (cb.replaced("weight_scale", cb.with_value((3, 1), np.nan)), "layer.weight_scale", "NaN"),
    "too few scales": (cb.replaced("weight_scale", lambda a: a[:, :1]), "layer.weight_zero_point", "expected (5, 1)"),
    "groups that do not divide k": (
        lambda t: cb.replaced("weight_scale", lambda a: a.repeat(3, 1)[:, :3])(cb.without("weight_zero_point")(t)),
        "layer.weight_scale", "do not divide k = 64",
    ),
    "scales of other columns": (cb.replaced("weight_scale", lambda a: a[:-1]), "layer.weight_scale", "n = 37"),
    "one row of scales": (cb.replaced("weight_scale", lambda a: a[:1]), "layer.weight_scale", "n = 37"),
    "no scales": (cb.without("weight_scale"), "layer.weight_packed", "no weight_scale"),
    "no packed weight": (cb.without("weight_packed"), "layer.", "neither weight nor weight_packed"),
    "no shape": (cb.without("weight_shape"), "layer.weight_packed", "no weight_shape"),
    "shape of three": (cb.replaced("weight_shape", lambda a: np.append(a, 1)), "layer.weight_shape", "expected (2,)"),
    "negative k": (cb.replaced("weight_shape", cb.with_value(1, -64)), "layer.weight_shape", "k = -64"),
    "huge k": (cb.replaced("weight_shape", cb.with_value(1, 2**62)), "layer.weight_packed", "got shape (37, 8)"),
    "another n": (cb.replaced("weight_shape", cb.with_value(0, 38)), "layer.weight_shape", "n = 38"),
    "packed too narrow": (cb.replaced("weight_packed", lambda a: a[:, :-1]), "layer.weight_packed", "8 words for 4"),
    "packed as int64": (cb.replaced("weight_packed", lambda a: a.astype(np.int64)), "layer.weight_packed", "dtype I64"),
    "zero points too short": (cb.replaced("weight_zero_point", lambda a: a[:-1]), "layer.weight_zero_point", "(5, 2)"),
    "zero points as floats": (
        cb.replaced("weight_zero_point", lambda a: a.astype(np.float32)), "layer.weight_zero_point", "dtype F32",
    ),
    "g_idx too large": (
        lambda t: t | {"layer.weight_g_idx": np.full(64, 2, np.int32)}, "layer.weight_g_idx", "expected 0 to 1",
    ),
    "g_idx partly -1": (
        lambda t: t | {"layer.weight_g_idx": np.arange(64, dtype=np.int32) // 32 - 1}, "layer.weight_g_idx", "-1 to 0",
    ),
    "g_idx too short": (
        lambda t: t | {"layer.weight_g_idx": np.zeros(63, np.int32)}, "layer.weight_g_idx", "(64,)",
    ),
    "a weight twice": (
        lambda t: t | {"layer.weight": np.ones((2, 2), np.int8)}, "layer.weight", "also has a weight_packed",
    ),
    "a global scale": (
        lambda t: t | {"layer.weight_global_scale": np.ones(1, np.float32)}, "weight_global_scale", "not expected",
    ),
    "a weight of floats": (
        lambda t: {"layer.weight": np.ones((2, 2), np.float16), "layer.weight_scale": np.ones((2, 1), np.float16)},
        "layer.weight", "got dtype F16 beside weight_scale",
    ),
    "a weight of float8": (
        lambda t: {
            "layer.weight": np.ones((2, 2)).astype(ml_dtypes.float8_e4m3fn),
            "layer.weight_scale": np.ones((2, 1), np.float16),
        },
        "layer.weight", "got dtype F8_E4M3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_bad_tensors_never_reach_a_device(tmp_path, monkeypatch, what):
    change, name, problem = BAD_TENSORS[what]
    oracle = cb.random_weight(4, 64, cb.N, 32, symmetric=False)
    tensors = change(pack_tensors(oracle, symmetric=False))
    tensors |= pack_tensors(oracle, symmetric=False, prefix="a_good_one_before")
    directory = cb.write_directory(tmp_path / "a", tensors, GOOD)

    def refuse(*_):
        raise AssertionError("something reached the device")

    monkeypatch.setattr(_repack, "_to_planes", refuse)
    monkeypatch.setattr(jnp, "asarray", refuse)
    with pytest.raises(io.FormatError) as caught:
        io.load_compressed_tensors(directory)
    assert name in caught.value.field
    assert problem in caught.value.problem


def as_float8(value):
    return np.uint8(value).view(ml_dtypes.float8_e4m3fn)


BAD_FP4 = {
    "NaN scale": ("nvfp4", cb.replaced("weight_scale", cb.with_value((1, 1), as_float8(0x7F))), "negative or NaN"),
    "negative scale": ("nvfp4", cb.replaced("weight_scale", cb.with_value((1, 1), as_float8(0x81))), "negative or NaN"),
    "NaN exponent": ("mxfp4", cb.replaced("weight_scale", cb.with_value((1, 1), 255)), "NaN"),
    "global scale of 0": ("nvfp4", cb.replaced("weight_global_scale", np.zeros_like), "expected a positive number"),
    "global scale of NaN": ("nvfp4", cb.replaced("weight_global_scale", cb.with_value(0, np.nan)), "positive"),
    "tiny global scale": ("nvfp4", cb.replaced("weight_global_scale", cb.with_value(0, 1e-44)), "finite"),
    "two global scales": ("nvfp4", cb.replaced("weight_global_scale", lambda a: a.repeat(2)), "one value"),
    "no global scale": ("nvfp4", cb.without("weight_global_scale"), "mxfp4, but no group"),
    "too few scales": ("nvfp4", cb.replaced("weight_scale", lambda a: a[:, :-1]), "expected (37, 8)"),
    "scales of floats": ("mxfp4", cb.replaced("weight_scale", lambda a: a.astype(np.float32)), "dtype F32"),
    "zero points": ("mxfp4", lambda t: t | {"layer.weight_zero_point": np.zeros((1, 1), np.int8)}, "not expected"),
    "act-order": ("mxfp4", lambda t: t | {"layer.weight_g_idx": np.zeros(128, np.int32)}, "not supported in mxfp4"),
    "a k of half a block": ("nvfp4", cb.replaced("weight_packed", lambda a: a[:, :48]), "k = 96, expected"),
}


@pytest.mark.parametrize("what", BAD_FP4)
def test_bad_4_bit_floats(tmp_path, what):
    name, change, problem = BAD_FP4[what]
    tensors, _ = fp4_weight(name, cb.N, 128)
    directory = cb.write_directory(tmp_path / "a", change(tensors), fp4_config(name))
    with pytest.raises(io.FormatError) as caught:
        io.load_compressed_tensors(directory)
    assert problem in caught.value.problem


@pytest.mark.parametrize(
    ("format", "global_scale", "message"),
    [
        ("q4_0", None, "can't hold q4_0"),
        (qg.int3(32), None, "can't hold int3"),
        ("mxfp4", 2.0, "mxfp4 with a global_scale"),
        (qg.int4(32), 2.0, "global_scale of int4"),
    ],
)
def test_what_can_not_be_saved(tmp_path, format, global_scale, message):
    w = cb.quantized(format)
    w.global_scale = None if global_scale is None else jnp.float32(global_scale)
    with pytest.raises(ValueError, match=message):
        io.save_compressed_tensors(tmp_path / "a", {"a.weight": w})
