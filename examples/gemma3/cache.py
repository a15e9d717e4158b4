"""The key-value cache.

A layer's cache is a ring: position p stands in slot p mod size. Global layers have a slot for every token,
sliding layers no more than they can see. Within a call of the model the cache is only read: the keys and
values of the call's own tokens stand apart, in `Recent`, until `extend` files them. So a loop over tokens
carries a few recent ones and not the whole cache, of which XLA would make copies.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from examples.gemma3.config import Config

Layer = tuple[jax.Array, jax.Array]  # keys and values, each (b, v, slots, d)
Recent = tuple[Layer, ...]  # slot i holds the i-th token after the cache


class Cache(NamedTuple):
    length: jax.Array  # int32: how many tokens it has seen
    layers: tuple[Layer, ...]


def new_recent(config: Config, length: int, dtype: Any, batch: int = 1) -> Recent:
    """Room for `length` tokens."""
    return tuple(_zeros(config, length, dtype, batch) for _ in config.sliding)


def new_cache(config: Config, capacity: int, dtype: Any, batch: int = 1) -> Cache:
    """An empty cache for texts of up to `capacity` tokens; of a longer one the first tokens are lost."""
    window = min(capacity, config.sliding_window)
    sizes = [window if sliding else capacity for sliding in config.sliding]
    return Cache(jnp.int32(0), tuple(_zeros(config, size, dtype, batch) for size in sizes))


def _zeros(config: Config, slots: int, dtype: Any, batch: int) -> Layer:
    keys, values = (
        jnp.zeros((batch, config.num_kv_heads, slots, dim), dtype) for dim in (config.key_dim, config.value_dim)
    )
    return keys, values


def stored_positions(length: Any, size: int) -> jax.Array:
    """The position that each slot of a ring holds after `length` tokens, negative for none: (size,)."""
    last = length - 1
    return last - (last - jnp.arange(size)) % size


def extend(cache: Cache, recent: Recent, count: Any) -> Cache:
    """The cache with the first `count` of the recent tokens; those after, padding, leave no trace."""
    length = cache.length + count

    def file(old: jax.Array, new: jax.Array) -> jax.Array:
        index = stored_positions(length, old.shape[2]) - cache.length
        return jnp.where((index >= 0)[:, None], jnp.take(new, index, axis=2, mode="clip"), old)

    return Cache(length, jax.tree.map(file, cache.layers, recent))
