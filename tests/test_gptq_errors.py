"""Damaged and hostile GPTQ checkpoints: a FormatError that names file and tensor, before anything reaches a device."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_qgemm import io
from jax_qgemm.io import _repack
from tests import checkpoint_builder as cb

BAD_CONFIGS = {
    "no bits": ({"bits": None}, "bits"),
    "5 bits": ({"bits": 5}, "bits"),
    "a list of bits": ({"bits": [4]}, "bits"),
    "true bits": ({"bits": True}, "bits"),
    "bits as text": ({"bits": "4"}, "bits"),
    "bits as a float": ({"bits": 4.0}, "bits"),
    "group size 0": ({"group_size": 0}, "group_size"),
    "group size -2": ({"group_size": -2}, "group_size"),
    "no group size": ({"group_size": None}, "group_size"),
    "huge group size": ({"group_size": 10**30}, "group_size"),
    "group size of 4300 digits": ({"group_size": 10**4299}, "group_size"),
    "group size that does not divide k": ({"group_size": 48}, "tensor"),
    "group size without a kernel": ({"group_size": 8}, "tensor"),
    "checkpoint format": ({"checkpoint_format": "marlin"}, "checkpoint_format"),
    "checkpoint format, a number": ({"checkpoint_format": 2}, "checkpoint_format"),
    "marlin": ({"is_marlin_format": True}, "is_marlin_format"),
    "method": ({"quant_method": "awq"}, "quant_method"),
    "sym": ({"sym": "yes"}, "sym"),
    "desc_act": ({"desc_act": 1}, "desc_act"),
    "dynamic": ({"dynamic": ["x"]}, "dynamic"),
    "meta": ({"meta": "gptqmodel"}, "meta"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_bad_configuration(tmp_path, what):
    change, field = BAD_CONFIGS[what]
    oracle = cb.random_weight(4, 64, 40, 32, symmetric=False)
    config = {**cb.gptq_config(oracle, 32, 2), **change}
    directory = cb.write_directory(tmp_path / "a", cb.gptq_tensors(oracle, 2), config)
    with pytest.raises(io.FormatError) as caught:
        io.load_gptq(directory)
    assert field in caught.value.field
    assert caught.value.path.startswith(str(directory))


BAD_TENSORS = {
    "g_idx too large": (cb.replaced("g_idx", cb.with_value(3, 2)), "layer.g_idx", "0 to 2, expected 0 to 1"),
    "g_idx far too large": (cb.replaced("g_idx", cb.with_value(3, 2**31 - 1)), "layer.g_idx", "expected 0 to 1"),
    "g_idx negative": (cb.replaced("g_idx", cb.with_value(3, -1)), "layer.g_idx", "-1 to 1"),
    "groups of different sizes": (cb.replaced("g_idx", cb.with_value(0, 1)), "layer.g_idx", "group 0 has 31 rows"),
    "g_idx too short": (cb.replaced("g_idx", lambda a: a[:-1]), "layer.scales", "does not divide k = 63"),
    "g_idx of floats": (cb.replaced("g_idx", lambda a: a.astype(np.float32)), "layer.g_idx", "dtype F32"),
    "g_idx of two axes": (cb.replaced("g_idx", lambda a: a[None]), "layer.g_idx", "expected 1 axes"),
    "too few scales": (cb.replaced("scales", lambda a: a[:1]), "layer.qzeros", "expected (1, 5)"),
    "too few columns of scales": (cb.replaced("scales", lambda a: a[:, :-1]), "layer.scales", "40 columns"),
    "NaN": (cb.replaced("scales", cb.with_value((1, 3), np.nan)), "layer.scales", "1 of its 80 values are NaN"),
    "infinity": (cb.replaced("scales", cb.with_value((1, 3), -np.inf)), "layer.scales", "NaN or infinite"),
    "scales of integers": (cb.replaced("scales", lambda a: a.astype(np.int32)), "layer.scales", "dtype I32"),
    "no scales": (cb.without("scales"), "layer.qweight", "no scales"),
    "no qzeros": (cb.without("qzeros"), "layer.qweight", "no qzeros"),
    "no qweight": (cb.without("qweight"), "layer.qzeros", "no qweight"),
    "qzeros too narrow": (cb.replaced("qzeros", lambda a: a[:, :-1]), "layer.qzeros", "expected (2, 5)"),
    "qzeros too wide": (cb.replaced("qzeros", lambda a: a.repeat(2, 1)), "layer.qzeros", "expected (2, 5)"),
    "qzeros of other groups": (cb.replaced("qzeros", lambda a: a[:1]), "layer.qzeros", "expected (2, 5)"),
    "qzeros of int64": (cb.replaced("qzeros", lambda a: a.astype(np.int64)), "layer.qzeros", "dtype I64"),
    "qweight too short": (cb.replaced("qweight", lambda a: a[:-1]), "layer.qweight", "expected 8 for k = 64"),
    "qweight of uint8": (cb.replaced("qweight", lambda a: a.view(np.uint8)), "layer.qweight", "dtype U8"),
    "qweight of one axis": (cb.replaced("qweight", lambda a: a.ravel()), "layer.qweight", "expected 2 axes"),
    "qweight without columns": (cb.replaced("qweight", lambda a: a[:, :0]), "layer.qweight", "none of size 0"),
    "weight twice": (
        lambda tensors: tensors | {"layer.weight": np.ones((2, 2), np.float32)}, "layer.", "two tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_bad_tensors_never_reach_a_device(tmp_path, monkeypatch, what):
    change, name, problem = BAD_TENSORS[what]
    oracle = cb.random_weight(4, 64, 40, 32, symmetric=False)
    good = cb.gptq_tensors(oracle, 2, "a_good_one_before")
    tensors = good | change(cb.gptq_tensors(oracle, 2))
    directory = cb.write_directory(tmp_path / "a", tensors, cb.gptq_config(oracle, 32, 2))

    def refuse(*_):
        raise AssertionError("something reached the device")

    monkeypatch.setattr(_repack, "_to_planes", refuse)
    monkeypatch.setattr(jnp, "asarray", refuse)
    with pytest.raises(io.FormatError) as caught:
        io.load_gptq(directory)
    assert name in caught.value.field
    assert problem in caught.value.problem
    assert caught.value.path == str(directory / "model.safetensors")
    assert caught.value.offset >= 8
