"""Random checkpoint directories: whatever the bytes, the readers give a result or a FormatError."""

import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jax_qgemm import io
from tests import checkpoint_builder as cb

ORACLE = cb.random_weight(4, 64, 40, 32, symmetric=False, act_order=True)
CONFIG = cb.gptq_config(ORACLE, 32, 2)
_SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def edited(data, region):
    """`data` with a few bytes of its first `region` changed, removed or repeated, or cut short."""

    @st.composite
    def edits(draw):
        raw = bytearray(data)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, min(region, len(raw)) - 1))
            match draw(st.sampled_from(["byte", "digit", "remove", "repeat", "cut"])):
                case "byte":
                    raw[at] = draw(st.integers(0, 255))
                case "digit":
                    digits = [m.start() for m in re.finditer(rb"[0-9]", bytes(raw[:region]))]
                    if digits:
                        raw[draw(st.sampled_from(digits))] = draw(st.sampled_from(b"0123456789-.e"))
                case "remove":
                    del raw[at : at + draw(st.integers(1, 30))]
                case "repeat":
                    raw[at:at] = raw[at : at + draw(st.integers(1, 60))]
                case "cut":
                    del raw[at:]
            if not raw:
                break
        return bytes(raw)

    return edits()


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return cb.write_directory(tmp_path_factory.mktemp("fuzz") / "a", cb.gptq_tensors(ORACLE, 2), CONFIG)


def load_or_refuse(load, path):
    refused = None
    try:
        return load(path)
    except io.FormatError as error:
        refused = error
    assert refused.field
    assert refused.offset >= 0
    return None


def good_file():
    names = ("g_idx", "qweight", "qzeros", "scales")
    tensors = cb.gptq_tensors(ORACLE, 2)
    header, data = {}, b""
    for name in names:
        value = np.ascontiguousarray(tensors[f"layer.{name}"])
        dtype = "F16" if name == "scales" else "I32"
        header[f"layer.{name}"] = cb.entry(len(data), len(data) + value.nbytes, dtype, value.shape)
        data += value.tobytes()
    return cb.container(header, data)


FILE = good_file()
HEADER = 8 + int.from_bytes(FILE[:8], "little")


@pytest.mark.filterwarnings("ignore:.*zero points of version 1")
@settings(max_examples=400, **_SETTINGS)
@given(edited(FILE, HEADER))
@example(FILE)
def test_edited_header(valid, data):
    (valid / "model.safetensors").write_bytes(data)
    loaded = load_or_refuse(io.load_gptq, valid)
    if data == FILE:
        assert loaded is not None
    if loaded is not None and "layer.weight" in loaded[0]:
        w = loaded[0]["layer.weight"]
        assert np.isfinite(cb.decoded(w)).all()


@settings(max_examples=150, **_SETTINGS)
@given(edited(FILE, len(FILE)))
def test_edited_file(valid, data):
    (valid / "model.safetensors").write_bytes(data)
    load_or_refuse(io.load_gptq, valid)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic", "meta", "quant_method", "version")


@pytest.mark.filterwarnings("ignore:.*zero points of version 1")
@settings(max_examples=200, **_SETTINGS)
@given(st.sampled_from(KEYS), JSON, st.sampled_from([io.load_gptq, io.load_awq, io.load_compressed_tensors]))
def test_any_value_in_the_configuration(valid, key, value, load):
    (valid / "model.safetensors").write_bytes(FILE)
    method = {io.load_gptq: "gptq", io.load_awq: "awq"}.get(load, "compressed-tensors")
    config = {**CONFIG, "quant_method": method, "format": "gptq_v2", key: value}
    (valid / "config.json").write_text(json.dumps({"quantization_config": config}))
    load_or_refuse(load, valid)


@pytest.mark.filterwarnings("ignore:.*zero points of version 1")
@settings(max_examples=200, **_SETTINGS)
@given(edited(json.dumps({"quantization_config": CONFIG}).encode(), 1000))
def test_edited_configuration(valid, text):
    (valid / "model.safetensors").write_bytes(FILE)
    (valid / "config.json").write_bytes(text)
    load_or_refuse(io.load_gptq, valid)


@settings(max_examples=150, **_SETTINGS)
@given(JSON, st.sampled_from(["format", "config_groups", "sparsity_config", "transform_config", "ignore"]))
def test_any_value_in_config_groups(tmp_path, value, key):
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32, "symmetric": False}}
    groups = [value, {**group, "weights": value}]
    for change in ({key: value}, *({"config_groups": {"g": g}} for g in groups)):
        config = {"quant_method": "compressed-tensors", "config_groups": {"g": group}, **change}
        tensors = {
            "a.weight_packed": np.zeros((8, 4), np.int32),
            "a.weight_scale": np.ones((8, 1), np.float16),
            "a.weight_shape": np.array([8, 32], np.int64),
        }
        load_or_refuse(io.load_compressed_tensors, cb.write_directory(tmp_path / "a", tensors, config))
