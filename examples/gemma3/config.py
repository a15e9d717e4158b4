"""The shape of a Gemma 3 text model, read from the metadata of its GGUF file."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# What llama.cpp assumes for gemma3 where the file says nothing.
_SLIDING_PERIOD = 6
_ROPE_BASE = 10_000.0
_ROPE_BASE_LOCAL = 10_000.0
# The 27B model is the one whose query scale follows the width of the model; its number of layers tells it.
_LAYERS_27B = 62


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters; lengths in tokens, the others in elements.

    Attributes:
      key_dim, value_dim: size of one head's keys and queries, and of its values.
      norm_eps: added to the mean square in every RMSNorm.
      query_scale: factor on the queries.
      sliding: for each layer, whether it sees only the last `sliding_window` tokens, its own included.
      rope_base, rope_scale: of the global layers; positions are multiplied by rope_scale.
      rope_base_local: of the sliding layers, whose positions are not scaled.
      logit_softcap: c in logits = c * tanh(logits / c); 0 for none.
    """

    num_layers: int
    embed_dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    context_length: int
    norm_eps: float
    query_scale: float
    sliding: tuple[bool, ...]
    sliding_window: int
    rope_base: float
    rope_scale: float
    rope_base_local: float
    logit_softcap: float

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Config":
        """Reads the configuration from GGUF metadata.

        Raises:
          ValueError: another architecture, a missing key that has no default, or a kind of RoPE scaling that
            Gemma 3 does not use.
        """
        architecture = metadata.get("general.architecture")
        if architecture != "gemma3":
            raise ValueError(f"general.architecture must be 'gemma3', got {architecture!r}")

        def get(name: str, default: Any = None) -> Any:
            value = metadata.get(f"gemma3.{name}", default)
            if value is None:
                raise ValueError(f"the GGUF metadata has no gemma3.{name}")
            return value

        num_layers = int(get("block_count"))
        embed_dim = int(get("embedding_length"))
        num_heads = int(get("attention.head_count"))
        key_dim = int(get("attention.key_length", embed_dim // num_heads))
        window = int(get("attention.sliding_window", 0))
        query_dim = embed_dim // num_heads if num_layers == _LAYERS_27B else key_dim
        return cls(
            num_layers=num_layers,
            embed_dim=embed_dim,
            ffn_dim=int(get("feed_forward_length")),
            num_heads=num_heads,
            num_kv_heads=int(get("attention.head_count_kv", num_heads)),
            key_dim=key_dim,
            value_dim=int(get("attention.value_length", key_dim)),
            context_length=int(get("context_length")),
            norm_eps=float(get("attention.layer_norm_rms_epsilon")),
            query_scale=1 / math.sqrt(query_dim),
            sliding=_sliding_layers(get("attention.sliding_window_pattern", _SLIDING_PERIOD), num_layers, window),
            sliding_window=window,
            rope_base=float(get("rope.freq_base", _ROPE_BASE)),
            rope_scale=_rope_scale(get("rope.scaling.type", "linear"), float(get("rope.scaling.factor", 1.0))),
            rope_base_local=float(get("rope.freq_base_swa", _ROPE_BASE_LOCAL)),
            logit_softcap=float(get("final_logit_softcapping", 0.0)),
        )


def _sliding_layers(pattern: Any, num_layers: int, window: int) -> tuple[bool, ...]:
    """A period p (every p-th layer is global; 0: none is), or one flag for each layer."""
    if window == 0:
        return (False,) * num_layers
    if np.ndim(pattern) == 0:
        return tuple(pattern == 0 or i % pattern < pattern - 1 for i in range(num_layers))
    if len(pattern) != num_layers:
        raise ValueError(f"gemma3.attention.sliding_window_pattern must have {num_layers} entries, got {len(pattern)}")
    return tuple(bool(p) for p in pattern)


def _rope_scale(kind: str, factor: float) -> float:
    if kind == "none" or factor == 0:
        return 1.0
    if kind != "linear":
        raise ValueError(f"gemma3.rope.scaling.type must be 'linear' or 'none', got {kind!r}")
    return 1 / factor
