"""Gemma 3 as Flax nnx modules whose matrices are QTensors.

Shapes: b sequences of t tokens; s slots in a layer's cache; h query heads in groups of g that share one of
the v key and value heads; d elements of a head. The residual stream, the norms, the softmax and the logits
are float32; the inputs and outputs of the matrix products and the cache have the model's `dtype`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import jax_qgemm as qg
from examples.gemma3.config import Config

# Tokens that one call may add to a cache at most. A sliding layer's cache is a ring of the window and one
# chunk, less the token that both count: what a chunk overwrites, its first token no longer sees.
MAX_CHUNK = 256

LAYER_TENSORS = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm", "attn_output"),
    *("post_attention_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_ffw_norm"),
)

Matrix = qg.QTensor | jax.Array
Cache = tuple[tuple[jax.Array, jax.Array], ...]  # keys and values (b, s, v, d) of each layer


def select(tensors: Mapping[str, Matrix], prefix: str, names: Sequence[str]) -> dict[str, Matrix]:
    """The named tensors, without their prefix and `.weight`; ValueError where one is missing."""
    missing = [name for name in names if f"{prefix}{name}.weight" not in tensors]
    if missing:
        raise ValueError(f"the GGUF file has no tensor {prefix}{missing[0]}.weight")
    return {name: tensors[f"{prefix}{name}.weight"] for name in names}


class Span(NamedTuple):
    """Where a chunk of tokens stands, for one kind of layer."""

    cos: jax.Array  # (t, d/2)
    sin: jax.Array  # (t, d/2)
    slots: jax.Array  # (t,): cache slot of each token, out of range for padding
    mask: jax.Array  # (t, s): whether token t sees slot s


class Linear(nnx.Module):
    """x @ w for a QTensor (k, n), or for an unquantized GGUF matrix (n, k)."""

    def __init__(self, w: Matrix):
        self.w = nnx.Variable(w)

    def __call__(self, x: jax.Array, out_dtype: Any = None) -> jax.Array:
        w = self.w.get_value()
        if isinstance(w, qg.QTensor):
            return qg.matmul(x, w, out_dtype=out_dtype)
        return jnp.matmul(x, w.T.astype(x.dtype), preferred_element_type=out_dtype)

    def take(self, ids: jax.Array) -> jax.Array:
        w = self.w.get_value()
        return qg.take(w, ids) if isinstance(w, qg.QTensor) else w[ids]


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
    def __init__(self, config: Config, weights: Mapping[str, Matrix], dtype: Any):
        self.config, self.dtype = config, dtype
        self.q = Linear(weights["attn_q"])
        self.k = Linear(weights["attn_k"])
        self.v = Linear(weights["attn_v"])
        self.out = Linear(weights["attn_output"])
        # Rotated in float32, rounded after.
        self.q_norm = RMSNorm(weights["attn_q_norm"], config.norm_eps, jnp.float32)
        self.k_norm = RMSNorm(weights["attn_k_norm"], config.norm_eps, jnp.float32)

    def __call__(self, x: jax.Array, span: Span, cache: tuple[jax.Array, jax.Array]):
        c = self.config
        b, t, _ = x.shape
        heads, kv_heads = c.num_heads, c.num_kv_heads
        q = self.q_norm(self.q(x).reshape(b, t, heads, c.key_dim))
        k = self.k_norm(self.k(x).reshape(b, t, kv_heads, c.key_dim))
        v = self.v(x).reshape(b, t, kv_heads, c.value_dim)
        q = rotate(q, span.cos, span.sin) * c.query_scale
        k = rotate(k, span.cos, span.sin)

        keys = cache[0].at[:, span.slots].set(k.astype(self.dtype), mode="drop")
        values = cache[1].at[:, span.slots].set(v.astype(self.dtype), mode="drop")
        q = q.astype(self.dtype).reshape(b, t, kv_heads, heads // kv_heads, c.key_dim)
        scores = jnp.einsum("btvgd,bsvd->bvgts", q, keys, preferred_element_type=jnp.float32)
        # Finite, because the rows of padding may see nothing.
        scores = jnp.where(span.mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        out = jnp.einsum("bvgts,bsvd->btvgd", weights, values)
        return self.out(out.reshape(b, t, heads * c.value_dim)), (keys, values)


class FeedForward(nnx.Module):
    def __init__(self, weights: Mapping[str, Matrix]):
        self.gate = Linear(weights["ffn_gate"])
        self.up = Linear(weights["ffn_up"])
        self.down = Linear(weights["ffn_down"])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class Block(nnx.Module):
    """A layer: attention and feed-forward, each with a norm before and one after, on the residual."""

    def __init__(self, config: Config, weights: Mapping[str, Matrix], sliding: bool, dtype: Any):
        eps = config.norm_eps
        self.sliding = sliding
        self.attention_norm = RMSNorm(weights["attn_norm"], eps, dtype)
        self.attention = Attention(config, weights, dtype)
        self.attention_post_norm = RMSNorm(weights["post_attention_norm"], eps, jnp.float32)
        self.ffn_norm = RMSNorm(weights["ffn_norm"], eps, dtype)
        self.ffn = FeedForward(weights)
        self.ffn_post_norm = RMSNorm(weights["post_ffw_norm"], eps, jnp.float32)

    def __call__(self, x: jax.Array, span: Span, cache: tuple[jax.Array, jax.Array]):
        attended, cache = self.attention(self.attention_norm(x), span, cache)
        x = x + self.attention_post_norm(attended)
        return x + self.ffn_post_norm(self.ffn(self.ffn_norm(x))), cache


class Gemma3(nnx.Module):
    """A Gemma 3 text model.

    Args:
      config: its hyperparameters.
      tensors: the tensors of the GGUF file by name, matrices as QTensors (k, n) or, where the file does not
        quantize them, arrays (n, k).
      dtype: of the activations and of the cache.

    Raises:
      ValueError: a tensor that the configuration asks for is missing.
    """

    def __init__(self, config: Config, tensors: Mapping[str, Matrix], dtype: Any = jnp.float32):
        self.config, self.dtype = config, jnp.dtype(dtype)
        top = select(tensors, "", ("token_embd", "output_norm"))
        self.embed = Linear(top["token_embd"])
        # Without a matrix of its own the output is tied to the embedding: one module, one QTensor.
        tied = "output.weight" not in tensors
        self.output = self.embed if tied else Linear(tensors["output.weight"])
        self.blocks = nnx.List(
            [
                Block(config, select(tensors, f"blk.{i}.", LAYER_TENSORS), sliding, self.dtype)
                for i, sliding in enumerate(config.sliding)
            ]
        )
        self.norm = RMSNorm(top["output_norm"], config.norm_eps, self.dtype)

    def new_cache(self, capacity: int, batch: int = 1) -> Cache:
        """An empty cache for `capacity` tokens; sliding layers keep no more than they can see."""
        c = self.config
        ring = min(capacity, c.sliding_window + MAX_CHUNK - 1)

        def zeros(sliding: bool, dim: int) -> jax.Array:
            return jnp.zeros((batch, ring if sliding else capacity, c.num_kv_heads, dim), self.dtype)

        return tuple((zeros(s, c.key_dim), zeros(s, c.value_dim)) for s in c.sliding)

    def spans(self, start: Any, count: Any, length: int, cache: Cache) -> dict[bool, Span]:
        """The spans of a chunk of `length` tokens from position `start`, of which `count` are no padding."""
        c = self.config
        index = jnp.arange(length)
        positions = start + index
        spans = {}
        for sliding in set(c.sliding):
            size = cache[c.sliding.index(sliding)][0].shape[1]
            base, scale = (c.rope_base_local, 1.0) if sliding else (c.rope_base, c.rope_scale)
            frequency = base ** (-jnp.arange(0, c.key_dim, 2, dtype=jnp.float32) / c.key_dim)
            angles = positions[:, None] * scale * frequency
            # A slot holds the last position that falls on it, if that is not negative.
            last = start + count - 1
            stored = last - (last - jnp.arange(size)) % size
            distance = positions[:, None] - stored
            mask = (stored >= 0) & (distance >= 0)
            if sliding:
                mask &= distance < c.sliding_window
            slots = jnp.where(index < count, positions % size, size)
            spans[sliding] = Span(jnp.cos(angles), jnp.sin(angles), slots, mask)
        return spans

    def embed_tokens(self, ids: jax.Array) -> jax.Array:
        """Rows of the embedding times the square root of its width: (b, t) to float32 (b, t, embed_dim)."""
        return self.embed.take(ids).astype(jnp.float32) * self.config.embed_dim**0.5

    def __call__(
        self, ids: jax.Array, start: Any, count: Any, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Runs a chunk of tokens and adds them to the cache.

        Args:
          ids: int (b, t); t at most MAX_CHUNK.
          start: position of the first token, the number of tokens in the cache.
          count: how many of the t tokens count; those after are padding and leave no trace.
          cache: from `new_cache` or from the call before.

        Returns:
          The last layer's output, float32 (b, t, embed_dim), for `logits`; and the cache with the chunk.

        Raises:
          ValueError: t exceeds MAX_CHUNK.
        """
        length = ids.shape[1]
        if length > MAX_CHUNK:
            raise ValueError(f"ids must have at most {MAX_CHUNK} tokens a call, got shape {ids.shape}")
        spans = self.spans(start, count, length, cache)
        x = self.embed_tokens(ids)
        layers = []
        for block, layer in zip(self.blocks, cache, strict=True):
            x, layer = block(x, spans[block.sliding], layer)
            layers.append(layer)
        return x, tuple(layers)

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 logits (…, vocabulary) of the last layer's output (…, embed_dim)."""
        logits = self.output(self.norm(x), out_dtype=jnp.float32)
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits
