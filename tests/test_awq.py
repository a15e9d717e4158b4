"""AWQ checkpoints against an oracle that packs and decodes element by element."""

import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

import jax_qgemm as qg
from jax_qgemm import io
from tests import checkpoint_builder as cb

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_gemm(values):
    """int32 (rows, n / 8): nibble i holds column ORDER[i] of its eight."""
    words = np.zeros((len(values), values.shape[1] // 8), np.uint32)
    for r, c, i in np.ndindex(*words.shape, 8):
        words[r, c] |= np.uint32(int(values[r, 8 * c + ORDER[i]]) << 4 * i)
    return words.view(np.int32)


def gemm_tensors(w):
    return {
        "layer.qweight": pack_gemm(w.codes),
        "layer.qzeros": pack_gemm(w.zero_points),
        "layer.scales": w.scales,
    }


def gemv_tensors(w):
    groups, n = w.scales.shape
    group_size = len(w.codes) // groups
    # In AutoAWQ's words: the groups of eight, rounded up to a multiple of 1, 2 or 4 words.
    multiple = 1 if group_size >= 128 else {64: 2, 32: 4}[group_size]
    width = math.ceil(math.ceil(groups / 8) / multiple) * multiple
    scales, zero_points = np.zeros((n, 8 * width), w.scales.dtype), np.zeros((n, 8 * width), int)
    scales[:, :groups], zero_points[:, :groups] = w.scales.T, w.zero_points.T
    return {
        "layer.qweight": cb.pack_stream(w.codes.T, 4, 1),
        "layer.qzeros": cb.pack_stream(zero_points, 4, 1),
        "layer.scales": scales,
    }


TENSORS = {"gemm": gemm_tensors, "gemv": gemv_tensors}


def config_of(version, group_size, **extra):
    return {
        "quant_method": "awq", "bits": 4, "group_size": group_size, "version": version, "zero_point": True, **extra,
    }  # fmt: skip


COMBINATIONS = list(itertools.product(("gemm", "gemv"), (-1, 32, 64, 128), (True, False)))


@pytest.mark.parametrize(("version", "group_size", "symmetric"), COMBINATIONS)
def test_every_combination(tmp_path, version, group_size, symmetric):
    index = COMBINATIONS.index((version, group_size, symmetric))
    n = 40 if version == "gemm" else 37
    # With groups of 32: more of them than a word of zero points has.
    k = {-1: 144, 32: 352, 64: 192, 128: 384}[group_size]
    oracle = cb.random_weight(4, k, n, group_size, symmetric=symmetric, dtype=cb.DTYPES[index % 3])
    directory = cb.write_directory(tmp_path / "a", TENSORS[version](oracle), config_of(version, group_size))
    tensors, metadata = io.load_awq(directory)
    cb.check_weight(tensors["layer.weight"], oracle, group_size)
    assert cb.weight_of((tensors, metadata)).permutation is None
    io.save_awq(tmp_path / "b", tensors, metadata)
    cb.assert_same_tensors(directory, tmp_path / "b")
    assert (tmp_path / "b" / "config.json").read_text().split() == json.dumps(metadata, indent=2).split()


def test_one_word_by_hand(tmp_path):
    """0x76543210 has i in nibble i, which is column (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    tensors = {
        "layer.qweight": np.full((32, 1), 0x76543210, np.int32),
        "layer.qzeros": np.full((1, 1), 0x11111111, np.int32),
        "layer.scales": np.ones((1, 8), np.float16),
    }
    directory = cb.write_directory(tmp_path / "a", tensors, config_of("gemm", 32))
    dense = cb.decoded(io.load_awq(directory)[0]["layer.weight"])
    np.testing.assert_array_equal(dense, np.tile([-1.0, 3, 0, 4, 1, 5, 2, 6], (32, 1)))


def test_a_k_that_is_no_multiple_of_anything(tmp_path):
    oracle = cb.random_weight(4, 77, 24, -1, symmetric=False)
    directory = cb.write_directory(tmp_path / "a", gemm_tensors(oracle), config_of("gemm", -1))
    tensors, metadata = io.load_awq(directory)
    cb.check_weight(tensors["layer.weight"], oracle, -1)
    io.save_awq(tmp_path / "b", tensors, metadata)
    cb.assert_same_tensors(directory, tmp_path / "b")


def test_names_of_older_configurations(tmp_path):
    oracle = cb.random_weight(4, 64, 24, 32, symmetric=False)
    old = {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}
    directory = cb.write_directory(tmp_path / "a", gemm_tensors(oracle), old)
    (directory / "config.json").unlink()
    (directory / "quant_config.json").write_text(json.dumps(old))
    tensors, metadata = io.load_awq(directory)
    cb.check_weight(tensors["layer.weight"], oracle, 32)
    io.save_awq(tmp_path / "b", tensors, metadata)
    saved = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert saved == config_of("gemm", 32)


BAD_CONFIGS = {
    "gemv_fast": ({"version": "gemv_fast"}, "version"),
    "marlin": ({"version": "marlin"}, "version"),
    "version 2": ({"version": 2}, "version"),
    "llm-awq": ({"backend": "llm-awq"}, "backend"),
    "no zero points": ({"zero_point": False}, "zero_point"),
    "3 bits": ({"bits": 3}, "bits"),
    "a list of bits": ({"bits": [4]}, "bits"),
    "group size 0": ({"group_size": 0}, "group_size"),
    "group size 16": ({"group_size": 16}, "group_size"),
    "another group size": ({"group_size": 64}, "tensor"),
    "method": ({"quant_method": "gptq"}, "quant_method"),
    "the other version": ({"version": "gemv"}, "tensor"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_bad_configuration(tmp_path, what):
    change, field = BAD_CONFIGS[what]
    oracle = cb.random_weight(4, 96, 40, 32, symmetric=False)
    directory = cb.write_directory(tmp_path / "a", gemm_tensors(oracle), {**config_of("gemm", 32), **change})
    with pytest.raises(io.FormatError) as caught:
        io.load_awq(directory)
    assert field in caught.value.field


BAD_TENSORS = {
    "too few scales": (cb.replaced("scales", lambda a: a[:1]), "layer.qzeros"),
    "NaN": (cb.replaced("scales", cb.with_value((1, 3), np.nan)), "layer.scales"),
    "qzeros too narrow": (cb.replaced("qzeros", lambda a: a[:, :-1]), "layer.qzeros"),
    "qzeros of int16": (cb.replaced("qzeros", lambda a: a.astype(np.int16)), "layer.qzeros"),
    "too few columns of scales": (cb.replaced("scales", lambda a: a[:, :-8]), "layer.scales"),
    "group size does not divide k": (cb.replaced("qweight", lambda a: a[:-1]), "layer.scales"),
    "no scales": (cb.without("scales"), "layer.qweight"),
    "no qweight": (cb.without("qweight"), "layer.qzeros"),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_bad_tensors(tmp_path, version, what):
    change, name = BAD_TENSORS[what]
    oracle = cb.random_weight(4, 96, 40, 32, symmetric=False)
    directory = cb.write_directory(tmp_path / "a", change(TENSORS[version](oracle)), config_of(version, 32))
    with pytest.raises(io.FormatError) as caught:
        io.load_awq(directory)
    assert "layer." in caught.value.field
    assert version == "gemv" or name in caught.value.field


@pytest.mark.parametrize(
    ("format", "shape", "version", "message"),
    [
        ("int8", (128, 40), "gemm", "integers of 4 bits"),
        ("q4_0", (128, 40), "gemm", "got format q4_0"),
        (qg.int4(256), (256, 40), "gemm", "group size 256"),
        (qg.int4(-1), (77, 37), "gemm", "n = 37"),
        (qg.int4(-1), (77, 37), "gemv", "k = 77"),
        (qg.int4(128), (128, 40), "gemv_fast", "version must be"),
    ],
)
def test_what_can_not_be_saved(tmp_path, format, shape, version, message):
    with pytest.raises(ValueError, match=message):
        io.save_awq(tmp_path / "a", {"a.weight": cb.quantized(format, *shape)}, version=version)


def test_a_permutation_can_not_be_saved(tmp_path):
    w = cb.quantized(qg.int4(32))
    w.permutation = jnp.arange(64)[::-1]
    with pytest.raises(ValueError, match="AWQ can't hold its permutation"):
        io.save_awq(tmp_path / "a", {"a.weight": w})
