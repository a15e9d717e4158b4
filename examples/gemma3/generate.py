"""Text generation: prefill in chunks of a few fixed sizes, then decoding in jitted runs of several tokens."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.gemma3.model import MAX_CHUNK, Cache, Gemma3

# A prompt is cut into chunks of the largest size, its rest padded to the smallest that holds it: few
# compilations, whatever the prompts' lengths.
_CHUNKS = (16, 64, MAX_CHUNK)
_CAPACITY_STEP = 256
# Tokens decoded in one call: enough to hide the call, few enough for text to stream.
DECODE_STEPS = 8


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: the likeliest at temperature 0, else at random among the top_k likeliest.

    A top_k of 0 draws among all tokens.
    """

    temperature: float = 0.0
    top_k: int = 0

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """Token ids (b,) of float32 logits (b, vocabulary)."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1)
        logits = logits / self.temperature
        if not self.top_k:
            return jax.random.categorical(key, logits)
        top, ids = jax.lax.top_k(logits, self.top_k)
        choice = jax.random.categorical(key, top)
        return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnames=("graph",), donate_argnames=("cache",))
def _prefill(graph: Any, state: Any, cache: Cache, ids: jax.Array, start: jax.Array, count: jax.Array):
    """Adds a chunk to the cache; returns the logits that follow its last token, (b, vocabulary)."""
    model = nnx.merge(graph, state)
    x, cache = model(ids, start, count, cache)
    last = jax.lax.dynamic_index_in_dim(x, count - 1, axis=1, keepdims=False)
    return model.logits(last), cache


@functools.partial(jax.jit, static_argnames=("graph", "sampling", "steps"), donate_argnames=("cache",))
def _decode(
    graph: Any,
    state: Any,
    cache: Cache,
    token: jax.Array,
    position: jax.Array,
    key: jax.Array,
    *,
    sampling: Sampling,
    steps: int,
):
    """Decodes `steps` tokens after `token` (b,), which stands at `position`; returns them as (steps, b)."""
    model = nnx.merge(graph, state)

    def step(carry, key):
        cache, token, position = carry
        x, cache = model(token[:, None], position, 1, cache)
        token = sampling(model.logits(x[:, 0]), key)
        return (cache, token, position + 1), token

    (cache, _, _), tokens = jax.lax.scan(step, (cache, token, position), jax.random.split(key, steps))
    return tokens, cache


@dataclasses.dataclass
class Timing:
    """Seconds and tokens of a generation; compilation is counted apart."""

    compile_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0  # from the call to the first token, compilation included
    prefill_tokens: int = 0
    decode_tokens: int = 0


class Generator:
    """Generates from a model; holds what has been compiled for it.

    Args:
      model: the model.
      stop_ids: tokens that end a generation and are not part of it.
      sampling: how tokens are drawn.
      steps: tokens decoded per call.
    """

    def __init__(
        self,
        model: Gemma3,
        stop_ids: Sequence[int] = (),
        sampling: Sampling = Sampling(),
        steps: int = DECODE_STEPS,
    ):
        self.model, self.sampling, self.steps = model, sampling, steps
        self.stop_ids = frozenset(stop_ids)
        self.timing = Timing()
        self._graph, self._state = nnx.split(model)
        self._compiled: dict[Any, Any] = {}

    def _call(self, function: Any, cache: Cache, *args: jax.Array, **static: Any) -> Any:
        """Calls a jitted function, compiled ahead of time so that its compilation can be told apart."""
        signature = (function, tuple(a.shape for a in args), cache[0][0].shape, cache[-1][0].shape)
        if signature not in self._compiled:
            began = time.perf_counter()
            lowered = function.lower(self._graph, self._state, cache, *args, **static)
            self._compiled[signature] = lowered.compile()
            self.timing.compile_s += time.perf_counter() - began
        return self._compiled[signature](self._state, cache, *args)

    def __call__(self, prompt_ids: Sequence[int], max_tokens: int, seed: int = 0) -> Iterator[list[int]]:
        """Yields the ids of the tokens that follow a prompt, a few at a time.

        Args:
          prompt_ids: at least one token.
          max_tokens: the number of tokens after which to stop, if no stop token comes first.
          seed: of the random draws.

        Raises:
          ValueError: an empty prompt, or a prompt that leaves no room for max_tokens in the model's context.
        """
        total, limit = len(prompt_ids) + max_tokens, self.model.config.context_length
        if not prompt_ids or total > limit:
            raise ValueError(
                f"prompt_ids must hold between 1 and {limit - max_tokens} tokens (context {limit}, max_tokens "
                f"{max_tokens}), got {len(prompt_ids)}"
            )
        self.timing = timing = Timing(prefill_tokens=len(prompt_ids))
        began = time.perf_counter()
        # The last run of decoding may go past max_tokens.
        capacity = -(-(total + self.steps) // _CAPACITY_STEP) * _CAPACITY_STEP
        logits, cache = self._prefill(prompt_ids, self.model.new_cache(capacity))
        key, first_key = jax.random.split(jax.random.key(seed))
        token = self.sampling(logits, first_key)
        ids = [int(token[0])]
        timing.first_token_s = time.perf_counter() - began

        position, left = len(prompt_ids), max_tokens
        while True:
            kept = self._until_stop(ids[:left])
            if kept:
                yield kept
            left -= len(ids)
            if left <= 0 or len(kept) < len(ids):
                return
            key, run_key = jax.random.split(key)
            compiled_before, began = timing.compile_s, time.perf_counter()
            tokens, cache = self._call(
                *(_decode, cache, token, jnp.int32(position), run_key),
                sampling=self.sampling,
                steps=self.steps,
            )
            ids, token = np.asarray(tokens)[:, 0].tolist(), tokens[-1]
            timing.decode_s += time.perf_counter() - began - (timing.compile_s - compiled_before)
            timing.decode_tokens += self.steps
            position += self.steps

    def _prefill(self, prompt_ids: Sequence[int], cache: Cache) -> tuple[jax.Array, Cache]:
        timing, began = self.timing, time.perf_counter()
        logits = None
        for start in range(0, len(prompt_ids), MAX_CHUNK):
            chunk = prompt_ids[start : start + MAX_CHUNK]
            size = next(c for c in _CHUNKS if c >= len(chunk))
            ids = jnp.asarray([[*chunk, *[0] * (size - len(chunk))]], jnp.int32)
            logits, cache = self._call(_prefill, cache, ids, jnp.int32(start), jnp.int32(len(chunk)))
        jax.block_until_ready(logits)
        timing.prefill_s = time.perf_counter() - began - timing.compile_s
        return logits, cache

    def _until_stop(self, ids: list[int]) -> list[int]:
        stops = [i for i, token in enumerate(ids) if token in self.stop_ids]
        return ids[: stops[0]] if stops else ids
