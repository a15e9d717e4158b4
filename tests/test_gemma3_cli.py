"""The command line of the Gemma 3 example, its perplexity, and what they print, on a tiny GGUF file."""

import importlib
import re

import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed: pip install 'jax_qgemm[flax]'")

import gemma3_tiny as tiny

from examples.gemma3 import __main__ as cli
from examples.gemma3.config import Config
from examples.gemma3.model import Gemma3
from examples.gemma3.perplexity import perplexity
from examples.gemma3.tokenizer import Tokenizer
from jax_qgemm.io import save_gguf

TEXT = "the cat sat on the mat and said nothing at all for a while " * 12


@pytest.fixture(scope="module")
def tensors():
    return tiny.tensors()


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    save_gguf(path, tensors, tiny.METADATA)
    return path


def oracle_perplexity(tensors, windows):
    """exp of the mean -log p over (ids, first scored position) windows, in float64."""
    losses = []
    for ids, first in windows:
        logits = tiny.oracle_logits(tensors, ids[:-1])
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-logp[i - 1, ids[i]] for i in range(first, len(ids))]
    return np.exp(np.mean(losses)), len(losses)


def test_perplexity_of_a_text_shorter_than_a_window(tensors):
    model = Gemma3(Config.from_metadata(tiny.METADATA), tensors)
    tokenizer = Tokenizer.from_metadata(tiny.METADATA)
    expected, count = oracle_perplexity(tensors, [(tokenizer.encode(TEXT[:23]), 1)])
    assert perplexity(model, tokenizer, TEXT[:23]) == (pytest.approx(expected, rel=1e-5), count)


def test_perplexity_scores_the_second_half_of_each_window(tensors):
    model = Gemma3(Config.from_metadata(tiny.METADATA), tensors)
    tokenizer = Tokenizer.from_metadata(tiny.METADATA)
    ids = tokenizer.encode(TEXT)
    windows = [([2, *ids[i + 1 : i + 256]], 128) for i in (0, 256)]
    expected, count = oracle_perplexity(tensors, windows)
    assert perplexity(model, tokenizer, TEXT, context=256) == (pytest.approx(expected, rel=1e-5), count)
    with pytest.raises(ValueError, match="context must be at least 2, got 1"):
        perplexity(model, tokenizer, TEXT, context=1)
    with pytest.raises(ValueError, match="at least two tokens, got 1"):
        perplexity(model, tokenizer, "")


def test_generation(path, tensors, capsys):
    cli.main(["--gguf", str(path), "--prompt", "the cat", "--max-tokens", "6"])
    out = capsys.readouterr().out
    tokenizer = Tokenizer.from_metadata(tiny.METADATA)
    ids = tokenizer.encode("the cat")
    for _ in range(6):
        ids.append(int(tiny.oracle_logits(tensors, ids)[-1].argmax()))
    assert f"\n{tokenizer.decode(ids)}\n" in out

    size = sum(t.nbytes for t in tensors.values()) / 2**20
    f16 = sum(2 * t.size for t in tensors.values()) / 2**20
    assert f"weights in memory {size:.0f} MiB; as f16 {f16:.0f} MiB ({f16 / size:.1f} times that)" in out
    assert re.search(rf"prefill {len(ids) - 6} tokens in \d+ ms, [\d.]+ tokens/s", out)
    assert re.search(r"decode 8 tokens in \d+ ms, [\d.]+ tokens/s", out)
    assert re.search(r"first token after [\d.]+ s; compilation took [\d.]+ s in all", out)
    assert re.search(r"peak \d+ MiB of host memory", out)


def test_chat_wraps_the_prompt(path, monkeypatch, capsys):
    prompts = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: prompts.append(text) or encode(self, text))
    cli.main(["--gguf", str(path), "--prompt", "hi", "--chat", "--max-tokens", "1"])
    assert prompts == ["<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"]
    assert "decode" not in capsys.readouterr().out


def test_perplexity_and_comparison(path, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT[:23])
    cli.main(["--gguf", str(path), "--perplexity", str(tmp_path / "text")])
    scored = len(Tokenizer.from_metadata(tiny.METADATA).encode(TEXT[:23])) - 1
    assert re.search(rf"perplexity \d+\.\d{{4}} over {scored} tokens", capsys.readouterr().out)
    cli.main(["--gguf", str(path), "--compare", "--prompt", TEXT[:23]])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(("layer", "logits"))]
    assert [row[:-7] for row in rows[:-1]] == [["layer", str(i)] for i in range(2)]
    errors = [float(e) for row in rows for e in row if re.fullmatch(r"[\d.]+e-\d+", e)]
    assert len(errors) == 6
    assert all(e < 1e-10 for e in errors)


def test_missing_demo_package_names_the_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SystemExit, match=r"install the demo extra: pip install \"jax_qgemm\[demo\]\""):
        cli.main([])


@pytest.mark.parametrize("bad", [["--max-tokens", "0"], ["--temperature", "-1"], ["--compare", "--perplexity", "f"]])
def test_bad_arguments(bad, capsys):
    with pytest.raises(SystemExit):
        cli.main(bad)
    assert "error:" in capsys.readouterr().err
