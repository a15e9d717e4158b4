"""The Gemma 3 example on a tiny random model, against a float64 NumPy forward pass without cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed: pip install 'jax_qgemm[flax]'")

import gemma3_tiny as tiny
from flax import nnx

import jax_qgemm as qg
from examples.gemma3.cache import extend, new_cache
from examples.gemma3.compare import compare
from examples.gemma3.config import Config
from examples.gemma3.generate import Generator, Sampling
from examples.gemma3.model import FeedForward, Gemma3, InterleavedFeedForward, interleave_gates
from jax_qgemm.flax import QLinear

LONG = 280


def nmse(a, b):
    return np.sum((a - b) ** 2) / np.sum(b**2)


@pytest.fixture(scope="module")
def tensors():
    return tiny.tensors()


@pytest.fixture(scope="module")
def model(tensors):
    return Gemma3(Config.from_metadata(tiny.METADATA), tensors)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(0, tiny.VOCABULARY, LONG).tolist()


@pytest.fixture(scope="module")
def expected(tensors, ids):
    return tiny.oracle_logits(tensors, ids)


@pytest.fixture(scope="module")
def generate(model):
    return Generator(model, steps=4)


@functools.partial(jax.jit, static_argnames="graph")
def forward(graph, state, ids, count, cache):
    model = nnx.merge(graph, state)
    x, recent = model(ids, cache)
    return model.logits(x), extend(cache, recent, count) if cache else None


def run(model, ids, sizes, length, capacity):
    """Logits of ids (t,) fed in chunks of the given sizes, each padded to `length`."""
    graph, state = nnx.split(model)
    cache, start, out = new_cache(model.config, capacity, model.dtype), 0, []
    for size in sizes:
        chunk = [*ids[start : start + size], *[3] * (length - size)]
        logits, cache = forward(graph, state, jnp.asarray([chunk]), size, cache)
        out.append(logits[0, :size])
        start += size
    return np.concatenate(out)


@pytest.mark.parametrize(
    ("sizes", "length"),
    [([64], 64), ([1] * 20, 1), ([5, 1, 30, 2], 32), ([3] * 8, 3), ([200, 60, 20], 200)],
    ids=["one chunk", "token by token", "padded chunks", "chunks below the window", "long"],
)
def test_cached_chunks_equal_full_forward(model, ids, expected, sizes, length):
    actual = run(model, ids, sizes, length, capacity=512)
    assert actual.dtype == np.float32
    assert nmse(actual, expected[: sum(sizes)]) < 1e-10


def test_sliding_layers_keep_only_what_they_see(model):
    cache = new_cache(model.config, 1024, model.dtype)
    assert [(k.shape, v.shape) for k, v in cache.layers] == [
        ((1, 2, slots, 32), (1, 2, slots, 16)) for slots in (8, 1024)
    ]


def test_batch(model, ids, tensors):
    batch = np.reshape(ids[:60], (2, 30))
    logits, _ = forward(*nnx.split(model), jnp.asarray(batch), 30, None)
    for row, actual in zip(batch, logits, strict=True):
        assert nmse(np.asarray(actual), tiny.oracle_logits(tensors, row.tolist())) < 1e-10


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 2e-3), ("float16", 5e-5)])
def test_narrow_activations(tensors, ids, expected, dtype, limit):
    model = Gemma3(Config.from_metadata(tiny.METADATA), tensors, jnp.dtype(dtype))
    assert nmse(run(model, ids, [20, 1], 20, 64), expected[:21]) < limit


def test_unquantized_and_untied_matrices(ids):
    tensors = tiny.tensors(quantized=False)
    tensors["output.weight"] = jnp.roll(tensors["token_embd.weight"], 1, axis=0).astype(jnp.float32)
    model = Gemma3(Config.from_metadata(tiny.METADATA), tensors)
    assert nmse(run(model, ids, [20], 20, 32), tiny.oracle_logits(tensors, ids[:20])) < 1e-10


def test_embedding_and_output_are_one_qtensor(model, tensors):
    assert model.output is model.embed
    held = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model)))
    assert held == sum(a.nbytes for a in jax.tree.leaves(tensors))


def test_missing_tensor_raises(tensors):
    config = Config.from_metadata(tiny.METADATA)
    with pytest.raises(ValueError, match=r"no tensor blk\.1\.ffn_up\.weight"):
        Gemma3(config, {n: t for n, t in tensors.items() if n != "blk.1.ffn_up.weight"})


def test_interleaved_gates(tensors, ids):
    """Joined where the formats agree, here in the first of two layers; the model is the same."""
    up = qg.quantize(tensors["blk.0.ffn_up.weight"].dequantize(), "q4_0")
    tensors = tensors | {"blk.0.ffn_up.weight": up}
    joined = dict(tensors)
    interleave_gates(joined)
    names = ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")
    assert joined.keys() == tensors.keys() - set(names) | {"blk.0.ffn_gate_up.weight"}
    assert sum(t.nbytes for t in joined.values()) == sum(t.nbytes for t in tensors.values())
    model = Gemma3(Config.from_metadata(tiny.METADATA), joined)
    assert [type(block.ffn) for block in model.blocks] == [InterleavedFeedForward, FeedForward]
    logits, _ = forward(*nnx.split(model), jnp.asarray([ids[:40]]), 40, None)
    assert nmse(np.asarray(logits[0]), tiny.oracle_logits(tensors, ids[:40])) < 1e-10
    assert all(row.error < 1e-10 for row in compare(model, ids[:40]))


@pytest.mark.parametrize("prompt", [1, 17, 260])
def test_greedy_generation_follows_the_oracle(generate, tensors, ids, prompt):
    generated = [i for chunk in generate(ids[:prompt], 11) for i in chunk]
    assert len(generated) == 11
    logits = tiny.oracle_logits(tensors, ids[:prompt] + generated)
    assert generated == logits[prompt - 1 : -1].argmax(-1).tolist()


def test_generation_streams_and_stops(generate, ids, monkeypatch):
    chunks = list(generate(ids[:9], 10))
    assert [len(c) for c in chunks] == [1, 4, 4, 1]
    tokens = [i for c in chunks for i in c]
    for stop in set(tokens):
        monkeypatch.setattr(generate, "stop_ids", {stop})
        assert [i for c in generate(ids[:9], 10) for i in c] == tokens[: tokens.index(stop)]


def test_generation_compiles_once_per_shape_and_repeats_its_seed(model, ids):
    generate = Generator(model, sampling=Sampling(1.0, top_k=50))
    runs, compilations = [], []
    for seed in (0, 0, 1):
        runs.append([i for chunk in generate(ids[:5], 24, seed) for i in chunk])
        compilations.append(generate.timing.compile_s)
    assert runs[0] == runs[1] != runs[2]
    assert compilations[0] > 0
    list(generate(ids[:14], 30))
    assert [*compilations[1:], generate.timing.compile_s] == [0, 0, 0]
    assert generate.timing.prefill_tokens == 14
    assert generate.timing.decode_tokens == 32


def test_generation_refuses_what_the_context_cannot_hold(model):
    with pytest.raises(ValueError, match=r"between 1 and 24 tokens \(context 1024, max_tokens 1000\), got 25"):
        next(Generator(model)([1] * 25, 1000))
    with pytest.raises(ValueError, match="got 0"):
        next(Generator(model)([], 10))


def test_sampling_draws_by_probability():
    logits = jnp.log(jnp.asarray([[0.5, 0.1, 0.25, 0.15]]))
    keys = jax.random.split(jax.random.key(0), 20_000)

    def frequencies(sampling):
        drawn = jax.vmap(lambda key: sampling(logits, key)[0])(keys)
        return np.bincount(np.asarray(drawn), minlength=4) / len(keys)

    # Five standard deviations of the mean of 20,000 draws are below 0.018.
    np.testing.assert_allclose(frequencies(Sampling(1.0)), [0.5, 0.1, 0.25, 0.15], atol=0.018)
    np.testing.assert_allclose(frequencies(Sampling(1.0, top_k=2)), [2 / 3, 0, 1 / 3, 0], atol=0.018)
    squares = np.asarray([0.25, 0.01, 0.0625, 0.0225])
    np.testing.assert_allclose(frequencies(Sampling(0.5)), squares / squares.sum(), atol=0.018)
    assert frequencies(Sampling())[0] == 1


def test_compare_finds_no_error_and_finds_a_planted_one(model, tensors, ids):
    rows = list(compare(model, ids[:22]))
    assert [r.name for r in rows] == ["layer 0", "layer 1", "logits"]
    assert rows[0].formats == "q4_0 q4_1 q5_0 q5_1 q8_0"
    assert rows[-1].formats == "q8_0"
    assert all(r.error < 1e-10 and r.total_error < 1e-10 for r in rows)

    class DropsAColumn(QLinear):
        def __call__(self, x, out_sharding=None):
            return super().__call__(x).at[..., 5].set(0)

    broken = Gemma3(Config.from_metadata(tiny.METADATA), tensors)
    ffn = broken.blocks[1].ffn
    assert isinstance(ffn, FeedForward)
    ffn.up = DropsAColumn(tensors["blk.1.ffn_up.weight"])
    rows = list(compare(broken, ids[:22]))
    assert rows[1].error > 1e-4
    assert all(r.error < 1e-10 for i, r in enumerate(rows) if i != 1)
    assert all(r.total_error > 1e-5 for r in rows[1:])


class TestConfig:
    def test_defaults_are_those_of_llama_cpp(self):
        config = Config.from_metadata(
            {
                "general.architecture": "gemma3",
                "gemma3.context_length": 32768,
                "gemma3.block_count": 26,
                "gemma3.embedding_length": 1152,
                "gemma3.feed_forward_length": 6912,
                "gemma3.attention.head_count": 4,
                "gemma3.attention.key_length": 256,
                "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
                "gemma3.attention.sliding_window": 512,
            }
        )
        assert [i for i, sliding in enumerate(config.sliding) if not sliding] == [5, 11, 17, 23]
        assert (config.rope_base, config.rope_base_local, config.rope_scale) == (1e4, 1e4, 1.0)
        assert (config.num_kv_heads, config.value_dim, config.query_scale) == (4, 256, 1 / 16)
        assert config.logit_softcap == 0

    def test_27b_scales_queries_by_the_width_of_the_model(self):
        sizes = {
            "gemma3.block_count": 62,
            "gemma3.embedding_length": 5376,
            "gemma3.attention.head_count": 32,
            "gemma3.attention.key_length": 128,
        }
        assert Config.from_metadata(tiny.METADATA | sizes).query_scale == pytest.approx(168**-0.5, rel=1e-12)

    @pytest.mark.parametrize(
        ("changes", "sliding"),
        [
            ({"gemma3.attention.sliding_window_pattern": [True, True]}, (1, 1)),
            ({"gemma3.attention.sliding_window_pattern": np.array([False, True])}, (0, 1)),
            ({"gemma3.attention.sliding_window_pattern": 1}, (0, 0)),
            ({"gemma3.attention.sliding_window": 0}, (0, 0)),
        ],
    )
    def test_sliding_patterns(self, changes, sliding):
        assert Config.from_metadata(tiny.METADATA | changes).sliding == tuple(map(bool, sliding))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"general.architecture": "llama"}, "must be 'gemma3', got 'llama'"),
            ({"gemma3.block_count": None}, "no gemma3.block_count"),
            ({"gemma3.rope.scaling.type": "yarn"}, "must be 'linear' or 'none', got 'yarn'"),
            ({"gemma3.attention.sliding_window_pattern": [True]}, "must have 2 entries, got 1"),
        ],
    )
    def test_bad_metadata(self, changes, message):
        with pytest.raises(ValueError, match=message):
            Config.from_metadata(tiny.METADATA | changes)


def test_global_attention_without_a_window(ids):
    """A window as long as the text is the same as none, but for the RoPE base of sliding layers."""
    rope = {"gemma3.rope.freq_base": 1e4, "gemma3.rope.scaling.factor": 1.0}
    wide = tiny.METADATA | rope | {"gemma3.attention.sliding_window": 64}
    none = tiny.METADATA | rope | {"gemma3.attention.sliding_window": 0}
    models = [Gemma3(Config.from_metadata(m), tiny.tensors()) for m in (wide, none)]
    batch = jnp.asarray([ids[:40]])
    wide, none = (np.float64(forward(*nnx.split(model), batch, 40, None)[0]) for model in models)
    assert nmse(wide, none) < 1e-10


def test_qtensors_reach_the_model_packed(model):
    assert all(isinstance(b.attention.q.w, qg.QTensor) for b in model.blocks)
