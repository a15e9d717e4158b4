"""all-MiniLM-L6-v2, a BERT encoder of sentences, as functions of the tensors of its checkpoint.

Shapes: b sentences of t tokens; d elements of the residual stream, in h heads. A dense layer's weight is an array
(n, k), as the checkpoint has it, or a QTensor (k, n). Everything is float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import jax_qgemm as qg

# The dense layers of a layer in the order in which they run, those with the same input together.
DENSE_STAGES = (
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("attention.output.dense",),
    ("intermediate.dense",),
    ("output.dense",),
)

Tensors = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters; norm_eps is added to the variance in every LayerNorm."""

    num_layers: int
    num_heads: int
    norm_eps: float

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Config":
        """Reads a model's config.json; ValueError for another architecture."""
        for name, expected in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if values.get(name) != expected:
                raise ValueError(f"{name} must be {expected!r}, got {values.get(name)!r}")
        return cls(values["num_hidden_layers"], values["num_attention_heads"], values["layer_norm_eps"])

    @property
    def dense_layers(self) -> list[str]:
        """The names of all dense layers, in the order in which they run."""
        return [f"{prefix(i)}{name}" for i in range(self.num_layers) for stage in DENSE_STAGES for name in stage]


def prefix(layer: int) -> str:
    """What the names of a layer's tensors start with."""
    return f"encoder.layer.{layer}."


def layer_tensors(tensors: Tensors, layer: int) -> dict[str, Any]:
    """The tensors of one layer, without the prefix."""
    start = prefix(layer)
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def dense(tensors: Tensors, name: str, x: jax.Array, *, activation: str | None = None, residual: Any = None):
    """activation(x @ w + bias) + residual, which for a QTensor is one kernel."""
    w, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    if isinstance(w, qg.QTensor):
        return qg.matmul(x, w, bias=bias, activation=activation, residual=residual)
    out = x @ w.T + bias
    if activation == "gelu":
        out = jax.nn.gelu(out, approximate=False)
    return out if residual is None else out + residual


def layer_norm(tensors: Tensors, name: str, x: jax.Array, eps: float) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return centred * inverse * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def encoder_layer(
    tensors: Tensors,
    x: jax.Array,
    mask: jax.Array,
    config: Config,
    dense: Callable[..., jax.Array] = dense,
) -> jax.Array:
    """(b, t, d) to the same; mask (b, t) is True for tokens, False for padding."""
    heads = (*x.shape[:-1], config.num_heads, -1)
    q, k, v = (dense(tensors, name, x).reshape(heads) for name in DENSE_STAGES[0])
    attended = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :]).reshape(x.shape)
    x = dense(tensors, "attention.output.dense", attended, residual=x)
    x = layer_norm(tensors, "attention.output.LayerNorm", x, config.norm_eps)
    hidden = dense(tensors, "intermediate.dense", x, activation="gelu")
    x = dense(tensors, "output.dense", hidden, residual=x)
    return layer_norm(tensors, "output.LayerNorm", x, config.norm_eps)


@functools.partial(jax.jit, static_argnames="config")
def embed_tokens(tensors: Tensors, ids: jax.Array, config: Config) -> jax.Array:
    """The input of the first layer, (b, t) to (b, t, d): words, positions and token type 0."""
    words, positions, types = (tensors[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type"))
    return layer_norm(
        tensors, "embeddings.LayerNorm", words[ids] + positions[: ids.shape[1]] + types[0], config.norm_eps
    )


@functools.partial(jax.jit, static_argnames="config")
def embed(tensors: Tensors, ids: jax.Array, mask: jax.Array, config: Config) -> jax.Array:
    """Sentence embeddings of length 1, (b, d): the mean over the tokens of the last layer's output.

    Args:
      tensors: of the checkpoint, by name.
      ids: int (b, t), padded at the end.
      mask: bool (b, t), False for padding.
    """
    x = embed_tokens(tensors, ids, config)
    for i in range(config.num_layers):
        x = encoder_layer(layer_tensors(tensors, i), x, mask, config)
    mean = jnp.mean(x, axis=1, where=mask[..., None])
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Calling it with sentences gives their embeddings, of length 1: float32 (b, d), in one batch."""

    tensors: Tensors
    tokenizer: Tokenizer
    config: Config

    def tokenize(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ids and mask, as `embed` takes them."""
        encodings = self.tokenizer.encode_batch(list(sentences))
        ids, mask = (np.array([getattr(e, name) for e in encodings]) for name in ("ids", "attention_mask"))
        return ids.astype(np.int32), mask.astype(bool)

    def __call__(self, sentences: Sequence[str]) -> np.ndarray:
        return np.asarray(embed(self.tensors, *self.tokenize(sentences), self.config))
