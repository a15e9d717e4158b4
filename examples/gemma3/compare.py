"""Compares the model layer by layer with a float32 reference over the dequantized weights.

The reference is written anew, without cache, chunks or rings: a full mask and dense products at full float32
precision. It holds the dense weights of one layer at a time, and of the output matrix a slice of columns.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_qgemm as qg
from examples.gemma3.model import MAX_CHUNK, Block, Gemma3, Linear

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
      ValueError: ids is empty or longer than MAX_CHUNK.
    """
    if not 0 < len(ids) <= MAX_CHUNK:
        raise ValueError(f"ids must hold between 1 and {MAX_CHUNK} tokens, got {len(ids)}")
    cache = model.new_cache(len(ids))
    spans = model.spans(0, len(ids), len(ids), cache)
    x = model.embed_tokens(jnp.asarray([ids], jnp.int32))
    reference = x
    for i, (block, layer) in enumerate(zip(model.blocks, cache, strict=True)):
        out, _ = block(x, spans[block.sliding], layer)
        dense = _dense_weights(block)
        error = _nmse(out - x, _reference_block(model, block, dense, x) - x)
        reference = _reference_block(model, block, dense, reference)
        linears = [*_linears(block).values()]
        yield Row(f"layer {i}", _formats(linears), error, _nmse(out, reference))
        x = out
    x, reference = x[:, -_LOGIT_ROWS:], reference[:, -_LOGIT_ROWS:]
    logits = model.logits(x)
    yield Row(
        "logits",
        _formats([model.output]),
        _logits_nmse(model, logits, x),
        _logits_nmse(model, logits, reference),
    )


def _linears(block: Block) -> dict[str, Linear]:
    attention, ffn = block.attention, block.ffn
    return {
        **{"q": attention.q, "k": attention.k, "v": attention.v, "out": attention.out},
        **{"gate": ffn.gate, "up": ffn.up, "down": ffn.down},
    }


def _formats(linears: Sequence[Linear]) -> str:
    weights = [linear.w.get_value() for linear in linears]
    names = {str(w.format) if isinstance(w, qg.QTensor) else str(w.dtype) for w in weights}
    return " ".join(sorted(names))


def _dense_weights(block: Block) -> dict[str, jax.Array]:
    weights = {name: linear.w.get_value() for name, linear in _linears(block).items()}
    return {
        name: w.dequantize(jnp.float32) if isinstance(w, qg.QTensor) else w.T.astype(jnp.float32)
        for name, w in weights.items()
    }


def _norm(x: jax.Array, scale: Any, eps: float) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * scale.get_value()


@jax.default_matmul_precision("highest")
def _reference_block(model: Gemma3, block: Block, dense: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    c, attention = model.config, block.attention
    positions = jnp.arange(x.shape[1])
    base, scale = (c.rope_base_local, 1.0) if block.sliding else (c.rope_base, c.rope_scale)
    frequency = base ** (-jnp.arange(c.key_dim // 2) / (c.key_dim // 2))
    turn = jnp.exp(1j * (positions[:, None] * scale * frequency))[:, None]

    def heads(h: jax.Array, dim: int) -> jax.Array:
        return h.reshape(*h.shape[:-1], -1, dim)

    def rotated(h: jax.Array) -> jax.Array:
        pairs = jax.lax.complex(*jnp.split(h, 2, axis=-1)) * turn
        return jnp.concatenate([pairs.real, pairs.imag], axis=-1)

    h = _norm(x, block.attention_norm.scale, c.norm_eps)
    q = rotated(_norm(heads(h @ dense["q"], c.key_dim), attention.q_norm.scale, c.norm_eps))
    k = rotated(_norm(heads(h @ dense["k"], c.key_dim), attention.k_norm.scale, c.norm_eps))
    v = heads(h @ dense["v"], c.value_dim)
    group = c.num_heads // c.num_kv_heads
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * c.query_scale
    distance = positions[:, None] - positions
    seen = (distance >= 0) & (distance < (c.sliding_window if block.sliding else len(positions)))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    attended = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1) @ dense["out"]
    x = x + _norm(attended, block.attention_post_norm.scale, c.norm_eps)

    h = _norm(x, block.ffn_norm.scale, c.norm_eps)
    h = (jax.nn.gelu(h @ dense["gate"], approximate=True) * (h @ dense["up"])) @ dense["down"]
    return x + _norm(h, block.ffn_post_norm.scale, c.norm_eps)


@jax.default_matmul_precision("highest")
def _logits_nmse(model: Gemma3, logits: jax.Array, x: jax.Array) -> float:
    """Error of `logits` against the reference's, computed from `x` a slice of the vocabulary at a time."""
    cap = model.config.logit_softcap
    x = _norm(x, model.norm.scale, model.config.norm_eps)
    squared_error = energy = 0.0
    vocabulary = logits.shape[-1]
    for begin in range(0, vocabulary, _LOGIT_COLUMNS):
        columns = jnp.arange(begin, min(begin + _LOGIT_COLUMNS, vocabulary))
        expected = x @ model.output.take(columns).astype(jnp.float32).T
        expected = np.asarray(cap * jnp.tanh(expected / cap) if cap else expected, np.float64)
        squared_error += np.sum((np.asarray(logits[..., columns], np.float64) - expected) ** 2)
        energy += np.sum(expected**2)
    return float(squared_error / energy)


def _nmse(actual: jax.Array, expected: jax.Array) -> float:
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.sum((a - b) ** 2) / np.sum(b**2))
