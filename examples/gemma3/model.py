"""Gemma 3 as Flax nnx modules whose matrices are QTensors.

Shapes: b sequences of t tokens; s slots of keys and values; h query heads, of which groups of g share one of
the v key and value heads; d elements of a head. The residual stream, the norms, the softmax and the logits
are float32; the inputs and outputs of the matrix products and the cache have the model's `dtype`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import jax_qgemm as qg
from examples.gemma3.cache import Cache, Layer, Recent, new_recent, stored_positions
from examples.gemma3.config import Config
from jax_qgemm.flax import QEmbed, QLinear

LAYER_TENSORS = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm", "attn_output"),
    *("post_attention_norm", "ffn_norm", "ffn_down", "post_ffw_norm"),
)
GATE, UP, GATE_UP = "ffn_gate", "ffn_up", "ffn_gate_up"

Tensors = Mapping[str, Any]  # QTensors, and arrays where the file does not quantize


def select(tensors: Tensors, prefix: str, names: Sequence[str]) -> dict[str, Any]:
    """The named tensors, without their prefix and `.weight`; ValueError where one is missing."""
    missing = [name for name in names if f"{prefix}{name}.weight" not in tensors]
    if missing:
        raise ValueError(f"the GGUF file has no tensor {prefix}{missing[0]}.weight")
    return {name: tensors[f"{prefix}{name}.weight"] for name in names}


def interleave_gates(tensors: dict[str, Any]) -> None:
    """Joins the two matrices in front of each feed-forward layer's gate where the file gives them the same format.

    In place and layer by layer: at no time are two copies of more than one layer in memory.
    """
    for name in [name for name in tensors if name.endswith(f".{GATE}.weight")]:
        prefix = name.removesuffix(f"{GATE}.weight")
        gate, up = tensors[name], tensors.get(f"{prefix}{UP}.weight")
        if not isinstance(gate, qg.QTensor) or not isinstance(up, qg.QTensor):
            continue
        if (gate.format, gate.shape) == (up.format, up.shape) and gate.shape[-1] % 16 == 0:
            tensors[f"{prefix}{GATE_UP}.weight"] = qg.interleave_gate_up(gate, up)
            del tensors[name], tensors[f"{prefix}{UP}.weight"]


def layer_tensors(tensors: Tensors, prefix: str) -> dict[str, Any]:
    front = (GATE_UP,) if f"{prefix}{GATE_UP}.weight" in tensors else (GATE, UP)
    return select(tensors, prefix, (*LAYER_TENSORS, *front))


class Span(NamedTuple):
    """Where the tokens of a call stand, for one kind of layer."""

    cos: jax.Array  # (t, d/2)
    sin: jax.Array  # (t, d/2)
    offset: jax.Array  # of the first token among the recent ones
    sees_cached: Any  # (t, slots of the cache); None without a cache
    sees_recent: jax.Array  # (t, recent tokens)


class DenseLinear(nnx.Module):
    """A matrix that the file does not quantize, (n, k), in the place of a QLinear."""

    def __init__(self, rows: jax.Array):
        self.rows = nnx.Param(rows)

    @property
    def w(self) -> jax.Array:
        return self.rows.get_value().T

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.w.astype(x.dtype)


class DenseEmbed(DenseLinear):
    """The same in the place of a QEmbed."""

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.rows.get_value()[ids]

    def attend(self, x: jax.Array, *, preferred_element_type: Any = None) -> jax.Array:
        return jnp.matmul(x, self.w.astype(x.dtype), preferred_element_type=preferred_element_type)


def linear(w: qg.QTensor | jax.Array) -> QLinear | DenseLinear:
    return QLinear(w) if isinstance(w, qg.QTensor) else DenseLinear(w)


def embedding(w: qg.QTensor | jax.Array) -> QEmbed | DenseEmbed:
    return QEmbed(w) if isinstance(w, qg.QTensor) else DenseEmbed(w)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale in float32. GGUF's scale already holds the 1 that Gemma adds to its weight."""

    def __init__(self, scale: jax.Array, eps: float, dtype: Any):
        self.scale = nnx.Param(scale.astype(jnp.float32))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * inverse * self.scale.get_value()).astype(self.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of (b, t, h, d): element i of the first half is paired with i of the second."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    def __init__(self, config: Config, weights: Tensors, dtype: Any):
        self.config, self.dtype = config, dtype
        self.q = linear(weights["attn_q"])
        self.k = linear(weights["attn_k"])
        self.v = linear(weights["attn_v"])
        self.out = linear(weights["attn_output"])
        # Rotated in float32, rounded after.
        self.q_norm = RMSNorm(weights["attn_q_norm"], config.norm_eps, jnp.float32)
        self.k_norm = RMSNorm(weights["attn_k_norm"], config.norm_eps, jnp.float32)

    def __call__(self, x: jax.Array, span: Span, cached: Layer | None, recent: Layer):
        """(b, t, embed_dim) to the same, and the recent keys and values with those of x."""
        c = self.config
        b, t, _ = x.shape
        q = self.q_norm(self.q(x).reshape(b, t, c.num_heads, c.key_dim))
        k = self.k_norm(self.k(x).reshape(b, t, c.num_kv_heads, c.key_dim))
        v = self.v(x).reshape(b, t, c.num_kv_heads, c.value_dim)
        q = rotate(q, span.cos, span.sin) * c.query_scale
        k = rotate(k, span.cos, span.sin)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(new, 1, 2).astype(self.dtype), span.offset, axis=2)
            for old, new in zip(recent, (k, v), strict=True)
        )
        # One product per key head, the queries of its group as rows: (b, v, g * t, d).
        q = jnp.swapaxes(q, 1, 2).astype(self.dtype).reshape(b, c.num_kv_heads, -1, c.key_dim)

        def scores(keys: jax.Array, seen: jax.Array) -> jax.Array:
            products = jnp.einsum("bvqd,bvsd->bvqs", q, keys, preferred_element_type=jnp.float32)
            return jnp.where(seen, products.reshape(b, c.num_heads, t, -1), -jnp.inf)

        def average(weights: jax.Array, values: jax.Array) -> jax.Array:
            weights = weights.astype(self.dtype).reshape(b, c.num_kv_heads, -1, values.shape[2])
            return jnp.matmul(weights, values, preferred_element_type=jnp.float32)

        if cached is None:
            out = average(jax.nn.softmax(scores(keys, span.sees_recent), axis=-1), values)
        else:
            both = [scores(cached[0], span.sees_cached), scores(keys, span.sees_recent)]
            weights = jax.nn.softmax(jnp.concatenate(both, axis=-1), axis=-1)
            of_cached, of_recent = jnp.split(weights, [cached[0].shape[2]], axis=-1)
            out = average(of_cached, cached[1]) + average(of_recent, values)
        out = jnp.swapaxes(out.astype(self.dtype).reshape(b, c.num_heads, t, c.value_dim), 1, 2)
        return self.out(out.reshape(b, t, -1)), (keys, values)


class FeedForward(nnx.Module):
    def __init__(self, weights: Tensors):
        self.gate = linear(weights[GATE])
        self.up = linear(weights[UP])
        self.down = linear(weights["ffn_down"])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class InterleavedFeedForward(nnx.Module):
    """The same in two products instead of three."""

    def __init__(self, weights: Tensors):
        self.gate_up = QLinear(weights[GATE_UP])
        self.down = linear(weights["ffn_down"])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(qg.gated_matmul(x, self.gate_up.w, activation="gelu_tanh"))


class Block(nnx.Module):
    """A layer: attention and feed-forward, each with a norm before and one after, on the residual."""

    def __init__(self, config: Config, weights: Tensors, sliding: bool, dtype: Any):
        eps = config.norm_eps
        self.sliding = sliding
        self.attention_norm = RMSNorm(weights["attn_norm"], eps, dtype)
        self.attention = Attention(config, weights, dtype)
        self.attention_post_norm = RMSNorm(weights["post_attention_norm"], eps, jnp.float32)
        self.ffn_norm = RMSNorm(weights["ffn_norm"], eps, dtype)
        self.ffn = InterleavedFeedForward(weights) if GATE_UP in weights else FeedForward(weights)
        self.ffn_post_norm = RMSNorm(weights["post_ffw_norm"], eps, jnp.float32)

    def __call__(self, x: jax.Array, span: Span, cached: Layer | None, recent: Layer):
        attended, recent = self.attention(self.attention_norm(x), span, cached, recent)
        x = x + self.attention_post_norm(attended)
        return x + self.ffn_post_norm(self.ffn(self.ffn_norm(x))), recent


class Gemma3(nnx.Module):
    """A Gemma 3 text model.

    Args:
      config: its hyperparameters.
      tensors: the tensors of the GGUF file by name, matrices as QTensors (k, n) or, where the file does not
        quantize them, arrays (n, k); perhaps after `interleave_gates`.
      dtype: of the activations and of the cache.

    Raises:
      ValueError: a tensor that the configuration asks for is missing.
    """

    def __init__(self, config: Config, tensors: Tensors, dtype: Any = jnp.float32):
        self.config, self.dtype = config, jnp.dtype(dtype)
        top = select(tensors, "", ("token_embd", "output_norm"))
        self.embed = embedding(top["token_embd"])
        # Without a matrix of its own the output is tied to the embedding: one module, one QTensor.
        tied = "output.weight" not in tensors
        self.output = self.embed if tied else embedding(tensors["output.weight"])
        self.blocks = nnx.List(
            [
                Block(config, layer_tensors(tensors, f"blk.{i}."), sliding, self.dtype)
                for i, sliding in enumerate(config.sliding)
            ]
        )
        self.norm = RMSNorm(top["output_norm"], config.norm_eps, self.dtype)

    def spans(self, length: int, cache: Cache | None, recent: Recent, offset: Any) -> dict[bool, Span]:
        """By kind of layer (True: sliding), where `length` tokens from `offset` on stand."""
        c = self.config
        start = 0 if cache is None else cache.length
        index = offset + jnp.arange(length)
        spans = {}
        for sliding in set(c.sliding):
            base, scale = (c.rope_base_local, 1.0) if sliding else (c.rope_base, c.rope_scale)
            frequency = base ** (-jnp.arange(0, c.key_dim, 2, dtype=jnp.float32) / c.key_dim)
            angles = (start + index)[:, None] * scale * frequency

            def sees(positions: jax.Array, sliding: bool = sliding) -> jax.Array:
                distance = (start + index)[:, None] - positions
                seen = (positions >= 0) & (distance >= 0)
                return seen & (distance < c.sliding_window) if sliding else seen

            sees_cached = None
            if cache is not None:
                slots = cache.layers[c.sliding.index(sliding)][0].shape[2]
                sees_cached = sees(stored_positions(cache.length, slots))
            sees_recent = sees(start + jnp.arange(recent[0][0].shape[2]))
            spans[sliding] = Span(jnp.cos(angles), jnp.sin(angles), jnp.asarray(offset), sees_cached, sees_recent)
        return spans

    def embed_tokens(self, ids: jax.Array) -> jax.Array:
        """Rows of the embedding times the square root of its width: (b, t) to float32 (b, t, embed_dim)."""
        return self.embed(ids).astype(jnp.float32) * self.config.embed_dim**0.5

    def __call__(
        self,
        ids: jax.Array,
        cache: Cache | None = None,
        recent: Recent | None = None,
        offset: Any = 0,
    ) -> tuple[jax.Array, Recent]:
        """Runs some tokens.

        Args:
          ids: int (b, t).
          cache: of the tokens before; None at the beginning of a text.
          recent: keys and values of tokens after the cache, which these tokens are added to; by default room
            for these tokens alone.
          offset: how many tokens `recent` holds already.

        Returns:
          The last layer's output, float32 (b, t, embed_dim), for `logits`; and `recent` with these tokens,
          for the next call or for `cache.extend`.
        """
        batch, length = ids.shape
        if recent is None:
            recent = new_recent(self.config, length, self.dtype, batch)
        spans = self.spans(length, cache, recent, offset)
        x = self.embed_tokens(ids)
        layers = []
        for i, block in enumerate(self.blocks):
            cached = None if cache is None else cache.layers[i]
            x, layer = block(x, spans[block.sliding], cached, recent[i])
            layers.append(layer)
        return x, tuple(layers)

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 logits (…, vocabulary) of the last layer's output (…, embed_dim)."""
        logits = self.output.attend(self.norm(x), preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits
