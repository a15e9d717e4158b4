"""compressed-tensors checkpoints against an oracle that packs and decodes element by element."""

import itertools
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_qgemm as qg
from jax_qgemm import io
from jax_qgemm.testing import check_product, product_limit
from tests import checkpoint_builder as cb

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack_tensors(w, *, symmetric, prefix="layer"):
    """pack-quantized: signed values plus 2**(bits - 1) are the oracle's unsigned ones."""
    tensors = {
        f"{prefix}.weight_packed": cb.pack_stream(w.codes.T, w.bits, 1),
        f"{prefix}.weight_scale": w.scales.T,
        f"{prefix}.weight_shape": np.array(w.codes.T.shape, np.int64),
    }
    if not symmetric:
        tensors[f"{prefix}.weight_zero_point"] = cb.pack_stream(w.zero_points.T, w.bits, 0)
    if (np.diff(w.g_idx) < 0).any():
        tensors[f"{prefix}.weight_g_idx"] = w.g_idx
    return tensors


def int_tensors(w, *, symmetric, prefix="layer"):
    """int-quantized."""
    tensors = {f"{prefix}.weight": (w.codes.T - 128).astype(np.int8), f"{prefix}.weight_scale": w.scales.T}
    if not symmetric:
        tensors[f"{prefix}.weight_zero_point"] = (w.zero_points.T - 128).astype(np.int8)
    if (np.diff(w.g_idx) < 0).any():
        tensors[f"{prefix}.weight_g_idx"] = w.g_idx
    return tensors


def group_of(bits, group_size, symmetric, **extra):
    strategy = "channel" if group_size == -1 else "group"
    size = None if group_size == -1 else group_size
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": size}
    return {"targets": ["Linear"], "weights": weights | extra, "input_activations": None}


def config_of(*groups, format="pack-quantized", **extra):
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ["lm_head"],
        **extra,
    }


COMBINATIONS = [
    (format, bits, symmetric, group_size, order)
    for (format, bits), symmetric, group_size, order in itertools.product(
        [("pack-quantized", 4), ("pack-quantized", 8), ("int-quantized", 8)],
        (True, False),
        (-1, 32, 128),
        (False, True),
    )
    if group_size != -1 or not order
]


@pytest.mark.parametrize(("format", "bits", "symmetric", "group_size", "order"), COMBINATIONS)
def test_every_combination(tmp_path, format, bits, symmetric, group_size, order):
    k = 77 if group_size == -1 else 3 * group_size
    index = COMBINATIONS.index((format, bits, symmetric, group_size, order))
    dtype = cb.DTYPES[index % 3]
    oracle = cb.random_weight(bits, k, cb.N, group_size, symmetric=symmetric, act_order=order, dtype=dtype)
    make = int_tensors if format == "int-quantized" else pack_tensors
    config = config_of(group_of(bits, group_size, symmetric, actorder="group" if order else None), format=format)
    directory = cb.write_directory(tmp_path / "a", make(oracle, symmetric=symmetric), config)
    tensors, metadata = io.load_compressed_tensors(directory)
    w = cb.weight_of((tensors, metadata))
    assert any(plane.name == "zero_points" for plane in w.format.planes) != symmetric
    cb.check_weight(w, oracle, group_size)
    assert (w.permutation is not None) == order
    io.save_compressed_tensors(tmp_path / "b", tensors, metadata)
    cb.assert_same_tensors(directory, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == metadata


def fp4_weight(name, n, k):
    """Tensors and their meaning, float64 (k, n)."""
    rng = np.random.default_rng(k)
    group = 16 if name == "nvfp4" else 32
    codes = rng.integers(0, 16, (n, k))
    packed = np.zeros((n, k // 2), np.uint8)
    for i, j in np.ndindex(n, k):
        packed[i, j // 2] |= codes[i, j] << 4 * (j % 2)
    if name == "nvfp4":
        bits = rng.integers(0, 127, (n, k // group)).astype(np.uint8)
        divisor = np.float32(1234.5)
        scales = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float64) / float(divisor)
        extra = {"weight_scale": bits.view(ml_dtypes.float8_e4m3fn), "weight_global_scale": np.array([divisor])}
    else:
        bits = rng.integers(100, 140, (n, k // group)).astype(np.uint8)
        scales = 2.0 ** (bits.astype(int) - 127)
        extra = {"weight_scale": bits}
    dense = np.empty((k, n))
    for i, j in np.ndindex(n, k):
        dense[j, i] = (-1) ** (codes[i, j] >> 3) * E2M1[codes[i, j] & 7] * scales[i, j // group]
    return {f"layer.{last}": value for last, value in {"weight_packed": packed, **extra}.items()}, dense


def fp4_config(name):
    group = group_of(4, 16 if name == "nvfp4" else 32, True, type="float")
    group["weights"]["strategy"] = "tensor_group" if name == "nvfp4" else "group"
    return config_of(group, format=f"{name}-pack-quantized")


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("k", [64, 320])
def test_4_bit_floats(tmp_path, name, k):
    tensors, dense = fp4_weight(name, cb.N, k)
    directory = cb.write_directory(tmp_path / "a", tensors, fp4_config(name))
    loaded, metadata = io.load_compressed_tensors(directory)
    w = cb.weight_of((loaded, metadata))
    assert (w.format.name, w.shape) == (name, (k, cb.N))
    np.testing.assert_allclose(cb.decoded(w), dense, rtol=2e-7 if name == "nvfp4" else 0)
    x = np.random.default_rng(1).standard_normal((3, k)).astype(np.float32)
    check_product(qg.matmul(jnp.asarray(x), w), x, dense, product_limit(np.float32))
    io.save_compressed_tensors(tmp_path / "b", loaded, metadata)
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == metadata
    cb.assert_same_tensors(directory, tmp_path / "b")


def test_mxfp4_scales_of_their_own_dtype(tmp_path):
    tensors, dense = fp4_weight("mxfp4", cb.N, 64)
    tensors["layer.weight_scale"] = tensors["layer.weight_scale"].view(ml_dtypes.float8_e8m0fnu)
    directory = cb.write_directory(tmp_path / "a", tensors, fp4_config("mxfp4"))
    w = io.load_compressed_tensors(directory)[0]["layer.weight"]
    np.testing.assert_array_equal(cb.decoded(w), dense)


def test_a_model_of_several_formats(tmp_path):
    int4 = cb.random_weight(4, 96, cb.N, 32, symmetric=False)
    int8 = cb.random_weight(8, 96, cb.N, -1, symmetric=True)
    fp4, dense = fp4_weight("nvfp4", cb.N, 64)
    tensors = fp4 | pack_tensors(int4, symmetric=False, prefix="a.b") | int_tensors(int8, symmetric=True, prefix="c")
    tensors |= {"layer.input_global_scale": np.array([3.0], np.float32), "norm.weight": np.ones(3, np.float16)}
    groups = [
        group_of(4, 32, False) | {"format": "pack-quantized"},
        group_of(8, -1, True) | {"format": "int-quantized"},
        fp4_config("nvfp4")["config_groups"]["group_0"] | {"format": "nvfp4-pack-quantized"},
    ]
    directory = cb.write_directory(tmp_path / "a", tensors, config_of(*groups, format="mixed-precision"))
    loaded, metadata = io.load_compressed_tensors(directory)
    assert loaded.keys() == {"a.b.weight", "c.weight", "layer.weight", "layer.input_global_scale", "norm.weight"}
    cb.check_weight(loaded["a.b.weight"], int4, 32)
    cb.check_weight(loaded["c.weight"], int8, -1)
    np.testing.assert_allclose(cb.decoded(loaded["layer.weight"]), dense, rtol=2e-7)
    io.save_compressed_tensors(tmp_path / "b", loaded, metadata)
    cb.assert_same_tensors(directory, tmp_path / "b")
    # Without the metadata: int8 is packed, every scheme is a group that names its modules.
    io.save_compressed_tensors(tmp_path / "c", loaded)
    again, made = io.load_compressed_tensors(tmp_path / "c")
    assert again.keys() == loaded.keys()
    for name in ("a.b.weight", "c.weight", "layer.weight"):
        np.testing.assert_array_equal(cb.decoded(again[name]), cb.decoded(loaded[name]))
    assert made["quantization_config"]["format"] == "mixed-precision"
    targets = [group["targets"] for group in made["quantization_config"]["config_groups"].values()]
    assert sorted(targets) == [["a.b"], ["c"], ["layer"]]


def test_zero_points_that_are_not_packed(tmp_path):
    oracle = cb.random_weight(4, 64, cb.N, 32, symmetric=False)
    tensors = pack_tensors(oracle, symmetric=False)
    tensors["layer.weight_zero_point"] = (oracle.zero_points.T - 8).astype(np.int8)
    directory = cb.write_directory(tmp_path / "a", tensors, config_of(group_of(4, 32, False)))
    cb.check_weight(io.load_compressed_tensors(directory)[0]["layer.weight"], oracle, 32)
    tensors["layer.weight_zero_point"][3, 1] = 8
    with pytest.raises(io.FormatError, match="expected -8 to 7"):
        io.load_compressed_tensors(cb.write_directory(tmp_path / "a", tensors, config_of(group_of(4, 32, False))))


def test_an_unused_g_idx(tmp_path):
    oracle = cb.random_weight(4, 64, cb.N, 32, symmetric=True)
    tensors = pack_tensors(oracle, symmetric=True) | {"layer.weight_g_idx": np.full(64, -1, np.int32)}
    directory = cb.write_directory(tmp_path / "a", tensors, config_of(group_of(4, 32, True)))
    w = cb.weight_of(io.load_compressed_tensors(directory))
    cb.check_weight(w, oracle, 32)
    assert w.permutation is None


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (cb.N,)])
def test_scales_of_a_tensor_or_a_channel(tmp_path, shape):
    oracle = cb.random_weight(8, 64, cb.N, -1, symmetric=True)
    tensors = int_tensors(oracle, symmetric=True)
    if shape != (cb.N,):
        oracle.scales[:] = oracle.scales[0, 0]
    tensors["layer.weight_scale"] = oracle.scales[0, : int(np.prod(shape))].reshape(shape)
    group = group_of(8, -1, True)
    group["weights"]["strategy"] = "channel" if shape == (cb.N,) else "tensor"
    directory = cb.write_directory(tmp_path / "a", tensors, config_of(group, format="int-quantized"))
    cb.check_weight(io.load_compressed_tensors(directory)[0]["layer.weight"], oracle, -1)
