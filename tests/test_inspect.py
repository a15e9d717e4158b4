"""The doctor: what it says of good checkpoints, and that it finds the traps."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_qgemm as qg
from jax_qgemm import inspect as command
from jax_qgemm import io
from tests import checkpoint_builder as cb
from tests import gguf_builder as gb


def model(format, layers=3, k=256, n=48):
    """Weights of mean zero, as those of models are, and a norm."""
    rng = np.random.default_rng(0)
    tensors: dict = {
        f"layers.{i}.{name}.weight": qg.quantize(jnp.asarray(rng.standard_normal((k, n), np.float32)), format)
        for i in range(layers)
        for name in ("up", "down")
    }
    return tensors | {"norm.weight": np.ones(n, np.float32)}


def edit(path, change, name="model.safetensors"):
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name)


def relabel(path, **values):
    for name in ("config.json", "quantize_config.json"):
        if (path / name).exists():
            config = json.loads((path / name).read_text())
            config.get("quantization_config", config).update(values)
            (path / name).write_text(json.dumps(config))


def findings(path):
    return [(f.severity, f.where, f.problem) for f in io.inspect(path).findings]


def test_a_good_gptq_checkpoint(tmp_path):
    tensors = model(qg.int4(64, symmetric=False))
    io.save_gptq(tmp_path, tensors, version=2)
    report = io.inspect(tmp_path)
    assert (report.kind, report.details) == ("gptq", "version 2, 4 bits, group size 64")
    assert report.findings == ()
    assert report.loadable
    assert {t.name: (t.format, t.shape, t.quantized) for t in report.tensors} == {
        name: (str(w.format), w.shape, True) if isinstance(w, qg.QTensor) else ("float32", w.shape, False)
        for name, w in tensors.items()
    }
    # 4 bits a code; 16 of scale and 4 of zero point in 64; 32 of g_idx in a row of 48.
    weights = [t for t in report.tensors if t.quantized]
    assert sum(t.nbytes for t in weights) * 8 == sum(t.size for t in weights) * (4 + 20 / 64 + 32 / 48)
    lines = str(report).splitlines()
    assert lines[0] == f"{tmp_path}: gptq, version 2, 4 bits, group size 64"
    assert lines[2].split() == ["format", "tensors", "elements", "bytes", "bits", "each"]
    assert lines[3].split()[-4:] == ["6", "73,728", "45,888", "4.98"]
    assert lines[4].split() == ["float32", "1", "48", "192", "32.00"]
    assert lines[-1] == "nothing suspicious"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_a_wrong_version_shows_in_the_values(tmp_path, bits, version):
    make = {2: qg.int2, 3: qg.int3, 4: qg.int4, 8: qg.int8}[bits]
    io.save_gptq(tmp_path, model(make(64, symmetric=False)), version=version)
    assert findings(tmp_path) == []
    relabel(tmp_path, checkpoint_format="gptq_v2" if version == 1 else "gptq")
    (found,) = findings(tmp_path)
    assert found[:2] == ("warning", "zero points")
    assert f"speaks for version {version}: pass version={version}" in found[2]


def test_a_wrong_version_of_symmetric_weights_is_an_error(tmp_path):
    io.save_gptq(tmp_path, model(qg.int4(64)), version=2)
    relabel(tmp_path, checkpoint_format="gptq")
    assert not io.inspect(tmp_path).loadable
    found = findings(tmp_path)
    assert len(found) == 6
    assert found[0][:2] == ("error", "model.safetensors: tensor 'layers.0.down.qzeros'")
    assert "pass version=2" in found[0][2]


def test_act_order_and_zero_points_that_wrap_around(tmp_path):
    oracle = cb.random_weight(4, 128, 48, 32, symmetric=False, act_order=True)
    tensors = cb.gptq_tensors(oracle, 1)
    cb.write_directory(tmp_path / "a", tensors, cb.gptq_config(oracle, 32))
    found = findings(tmp_path / "a")
    assert [(severity, where) for severity, where, _ in found] == [
        ("warning", "1 tensors such as layer.qzeros"),
        ("note", "1 weights"),
    ]
    count = int((oracle.zero_points == 0).sum())
    assert found[0][2].startswith(f"{count} zero points of version 1 wrap around to 0")
    assert "act-order" in found[1][2]


@pytest.mark.parametrize("group_size", [-1, 64])
def test_awq(tmp_path, group_size):
    io.save_awq(tmp_path, model(qg.int4(group_size, symmetric=False)))
    report = io.inspect(tmp_path)
    assert (report.kind, report.details) == ("awq", f"version gemm, 4 bits, group size {group_size}")
    assert report.findings == ()
    shifted, disordered = tmp_path / "shifted", tmp_path / "disordered"
    for path in (shifted, disordered):
        io.save_awq(path, model(qg.int4(group_size, symmetric=False)))

    def minus_one(tensors):
        for name in [name for name in tensors if name.endswith("qzeros")]:
            tensors[name] -= 0x11111111

    def plain_order(tensors):
        for name in [name for name in tensors if name.endswith("qzeros")]:
            nibbles = tensors[name].view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
            columns = nibbles[..., [0, 4, 1, 5, 2, 6, 3, 7]].astype(int)
            tensors[name] = cb.pack_stream(columns.reshape(len(columns), -1), 4, 1)

    edit(shifted, minus_one)
    edit(disordered, plain_order)
    assert [f[:2] for f in findings(shifted)] == [("warning", "zero points")]
    assert "stored minus one" in findings(shifted)[0][2]
    assert [f[:2] for f in findings(disordered)] == [("warning", "zero points")]
    assert "another order" in findings(disordered)[0][2]


def test_awq_gemv(tmp_path):
    io.save_awq(tmp_path, model(qg.int4(64, symmetric=False)), version="gemv")
    report = io.inspect(tmp_path)
    assert report.details == "version gemv, 4 bits, group size 64"
    assert report.findings == ()


def test_compressed_tensors(tmp_path):
    tensors = model(qg.int4(64), 1) | {"other.weight": cb.quantized("nvfp4")}
    io.save_compressed_tensors(tmp_path, tensors)
    report = io.inspect(tmp_path)
    assert (report.kind, report.details) == ("compressed-tensors", "nvfp4-pack-quantized, pack-quantized")
    assert report.findings == ()
    assert {t.name for t in report.tensors} == tensors.keys()


def test_what_can_not_be_loaded_is_an_error_of_its_tensor(tmp_path):
    io.save_gptq(tmp_path, model(qg.int4(64)))

    def spoil(tensors):
        tensors["layers.1.up.scales"][0, 0] = np.nan
        tensors["layers.2.up.g_idx"][0] = 99

    edit(tmp_path, spoil)
    report = io.inspect(tmp_path)
    assert not report.loadable
    assert {(f.severity, f.where) for f in report.findings} == {
        ("error", "model.safetensors: tensor 'layers.1.up.scales'"),
        ("error", "model.safetensors: tensor 'layers.2.up.g_idx'"),
    }
    assert str(report).splitlines()[-2].startswith("error: model.safetensors: tensor 'layers.")


def test_layers_that_differ_from_the_others(tmp_path):
    tensors = model(qg.int4(64), 12)
    del tensors["layers.7.up.weight"]
    tensors["layers.3.extra"] = np.ones(2, np.float32)
    for i in range(7):
        tensors[f"layers.0.experts.{i}.bias"] = np.ones(2, np.float32)
    io.save_gptq(tmp_path, tensors)
    assert sorted(findings(tmp_path)) == [
        ("note", "layers.0", "unlike the other layers in 7 tensors"),
        ("warning", "layers.3", "unlike the other layers: extra, which others lack"),
        ("warning", "layers.7", "unlike the other layers: no up.weight"),
    ]


def test_gguf(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(gb.small().data)
    report = io.inspect(path)
    assert (report.kind, report.details) == ("gguf", "version 3, architecture 'test'")
    assert [(t.name, t.format, t.shape, t.nbytes) for t in report.tensors] == [
        ("x", "f32", (3,), 12),
        ("w", "q8_0", (32, 2), 68),
        ("y", "f32", (2, 4), 32),
    ]
    assert report.findings == ()
    path.write_bytes(gb.build([], [gb.Tensor(b"v", (256, 1), gb.IQ2_XXS, 0)], bytes(66)).data)
    assert not io.inspect(path).loadable


def test_what_is_no_quantized_checkpoint(tmp_path):
    path = cb.write_directory(tmp_path / "a", {"a": np.ones(2, np.float32)}, {"quant_method": "bitsandbytes"})
    with pytest.raises(io.FormatError, match="got 'bitsandbytes', expected gptq, awq or compressed-tensors"):
        io.inspect(path)
    (path / "config.json").write_text("{}")
    with pytest.raises(io.FormatError, match="not quantized"):
        io.inspect(path)


def test_command_line(tmp_path, capsys):
    io.save_gptq(tmp_path, model(qg.int4(64)))
    assert command.main([str(tmp_path), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "layers.0.up.weight  int4(group_size=64, symmetric, float16 scales)  (256, 48)  " in out
    assert str(io.inspect(tmp_path)) in out
    edit(tmp_path, lambda tensors: tensors.pop("layers.0.up.scales"))
    assert command.main([str(tmp_path)]) == 1
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert command.main([str(tmp_path)]) == 2
    assert "header size" in capsys.readouterr().err
    assert command.main([str(tmp_path / "none")]) == 2


def test_module_runs(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(gb.small().data)
    run = [sys.executable, "-m", "jax_qgemm.inspect", str(path)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout == f"{io.inspect(path)}\n"
