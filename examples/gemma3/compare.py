"""Compares the model layer by layer with a float32 reference over the dequantized weights.

The reference is written anew, without cache, chunks or rings: a full mask and dense products at full float32
precision. It holds the dense weights of one layer at a time, and of the output matrix a slice of columns.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_qgemm as qg
from examples.gemma3.cache import Layer, Recent, new_recent
from examples.gemma3.config import Config
from examples.gemma3.model import Block, Gemma3, InterleavedFeedForward, Span

_LOGIT_ROWS = 16  # positions whose logits are compared: the last ones
_LOGIT_COLUMNS = 8192


class Row(NamedTuple):
    """One line of the comparison; errors as NMSE, sum((a - b)^2) / sum(b^2).

    Attributes:
      name: of the layer, or "logits".
      formats: of its matrices.
      error: of what the layer adds to the residual, from the same input as the reference; of the logits,
        from the same last layer.
      total_error: of the output, where model and reference have each run from the embedding on.
    """

    name: str
    formats: str
    error: float
    total_error: float


def compare(model: Gemma3, ids: Sequence[int]) -> Iterator[Row]:
    """Yields the errors of each layer, then those of the logits of the last tokens.

    Raises:
      ValueError: ids is empty.
    """
    if not ids:
        raise ValueError("ids must hold at least one token, got none")
    x, spans, recent = _begin(*nnx.split(model), jnp.asarray([ids], jnp.int32))
    reference = x
    for i, (block, layer) in enumerate(zip(model.blocks, recent, strict=True)):
        out = _run(*nnx.split(block), x, spans[block.sliding], layer)
        dense = _dense_weights(block)
        expected = _reference_block(model.config, block.sliding, dense, x)
        reference = _reference_block(model.config, block.sliding, dense, reference)
        yield Row(f"layer {i}", _formats(_linears(block)), _nmse(out - x, expected - x), _nmse(out, reference))
        x = out
    x, reference = x[:, -_LOGIT_ROWS:], reference[:, -_LOGIT_ROWS:]
    logits = _logits(*nnx.split(model), x)
    errors = [_logits_nmse(model, logits, h) for h in (x, reference)]
    yield Row("logits", _formats({"output": model.output}), *errors)


@functools.partial(jax.jit, static_argnames="graph")
def _begin(graph: Any, state: Any, ids: jax.Array) -> tuple[jax.Array, dict[bool, Span], Recent]:
    model = nnx.merge(graph, state)
    recent = new_recent(model.config, ids.shape[1], model.dtype)
    return model.embed_tokens(ids), model.spans(ids.shape[1], None, recent, 0), recent


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph: Any, state: Any, x: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).logits(x)


@functools.partial(jax.jit, static_argnames="graph")
def _run(graph: Any, state: Any, x: jax.Array, span: Span, recent: Layer) -> jax.Array:
    return nnx.merge(graph, state)(x, span, None, recent)[0]


def _linears(block: Block) -> dict[str, Any]:
    attention, ffn = block.attention, block.ffn
    interleaved = isinstance(ffn, InterleavedFeedForward)
    return {
        **{"q": attention.q, "k": attention.k, "v": attention.v, "out": attention.out},
        **({"gate_up": ffn.gate_up} if interleaved else {"gate": ffn.gate, "up": ffn.up}),
        "down": ffn.down,
    }


def _formats(linears: dict[str, Any]) -> str:
    weights = [linear.w for linear in linears.values()]
    return " ".join(sorted({str(w.format if isinstance(w, qg.QTensor) else w.dtype) for w in weights}))


def _dense_weights(block: Block) -> dict[str, jax.Array]:
    """All weights of a layer in float32, matrices as (k, n)."""
    weights = {name: linear.w for name, linear in _linears(block).items()}
    norms = {
        "attention_norm": block.attention_norm,
        "q_norm": block.attention.q_norm,
        "k_norm": block.attention.k_norm,
        "attention_post_norm": block.attention_post_norm,
        "ffn_norm": block.ffn_norm,
        "ffn_post_norm": block.ffn_post_norm,
    }
    dense = {
        name: w.dequantize(jnp.float32) if isinstance(w, qg.QTensor) else w.astype(jnp.float32)
        for name, w in weights.items()
    }
    if "gate_up" in dense:  # 16 columns of each in turn
        gate_up = dense.pop("gate_up")
        tiles = gate_up.reshape(len(gate_up), -1, 2, 16)
        dense["gate"], dense["up"] = (tiles[:, :, i].reshape(len(gate_up), -1) for i in range(2))
    return dense | {name: norm.scale.get_value() for name, norm in norms.items()}


def _norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * scale


@functools.partial(jax.jit, static_argnums=(0, 1))
@jax.default_matmul_precision("highest")
def _reference_block(c: Config, sliding: bool, w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    positions = jnp.arange(x.shape[1])
    base, scale = (c.rope_base_local, 1.0) if sliding else (c.rope_base, c.rope_scale)
    frequency = base ** (-jnp.arange(c.key_dim // 2) / (c.key_dim // 2))
    turn = jnp.exp(1j * (positions[:, None] * scale * frequency))[:, None]

    def norm(h: jax.Array, name: str) -> jax.Array:
        return _norm(h, w[name], c.norm_eps)

    def heads(h: jax.Array, dim: int) -> jax.Array:
        return h.reshape(*h.shape[:-1], -1, dim)

    def rotated(h: jax.Array) -> jax.Array:
        pairs = jax.lax.complex(*jnp.split(h, 2, axis=-1)) * turn
        return jnp.concatenate([pairs.real, pairs.imag], axis=-1)

    h = norm(x, "attention_norm")
    q = rotated(norm(heads(h @ w["q"], c.key_dim), "q_norm"))
    k = rotated(norm(heads(h @ w["k"], c.key_dim), "k_norm"))
    v = heads(h @ w["v"], c.value_dim)
    group = c.num_heads // c.num_kv_heads
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * c.query_scale
    distance = positions[:, None] - positions
    seen = (distance >= 0) & (distance < (c.sliding_window if sliding else len(positions)))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    attended = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1) @ w["out"]
    x = x + norm(attended, "attention_post_norm")

    h = norm(x, "ffn_norm")
    h = (jax.nn.gelu(h @ w["gate"], approximate=True) * (h @ w["up"])) @ w["down"]
    return x + norm(h, "ffn_post_norm")


@jax.default_matmul_precision("highest")
def _logits_nmse(model: Gemma3, logits: jax.Array, x: jax.Array) -> float:
    """Error of `logits` against the reference's, computed from `x` a slice of the vocabulary at a time."""
    cap = model.config.logit_softcap
    x = _norm(x, model.norm.scale.get_value(), model.config.norm_eps)
    squared_error = energy = 0.0
    vocabulary = logits.shape[-1]
    for begin in range(0, vocabulary, _LOGIT_COLUMNS):
        columns = jnp.arange(begin, min(begin + _LOGIT_COLUMNS, vocabulary))
        expected = x @ model.output(columns).astype(jnp.float32).T
        expected = np.asarray(cap * jnp.tanh(expected / cap) if cap else expected, np.float64)
        squared_error += np.sum((np.asarray(logits[..., columns], np.float64) - expected) ** 2)
        energy += np.sum(expected**2)
    return float(squared_error / energy)


def _nmse(actual: jax.Array, expected: jax.Array) -> float:
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.sum((a - b) ** 2) / np.sum(b**2))
