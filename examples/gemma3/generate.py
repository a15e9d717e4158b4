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

from examples.gemma3.cache import Cache, extend, new_cache, new_recent
from examples.gemma3.model import Gemma3

# A prompt is cut into chunks of the largest size, its rest padded to the smallest that holds it: few
# compilations, whatever the prompts' lengths.
_CHUNKS = (16, 64, 256)
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


@functools.partial(jax.jit, static_argnames=("graph", "sampling"), donate_argnames=("cache",))
def _prefill(
    graph: Any,
    state: Any,
    cache: Cache,
    key: jax.Array,
    ids: jax.Array,
    count: jax.Array,
    *,
    sampling: Sampling,
):
    """Adds the first `count` of the tokens (b, t) to the cache; returns the token (b,) that follows them."""
    model = nnx.merge(graph, state)
    x, recent = model(ids, cache)
    cache = extend(cache, recent, count)
    last = jax.lax.dynamic_index_in_dim(x, count - 1, axis=1, keepdims=False)
    return sampling(model.logits(last), jax.random.fold_in(key, cache.length)), cache


@functools.partial(jax.jit, static_argnames=("graph", "sampling", "steps"), donate_argnames=("cache",))
def _decode(graph: Any, state: Any, cache: Cache, key: jax.Array, token: jax.Array, *, sampling: Sampling, steps: int):
    """Adds `token` (b,) and the tokens that follow it to the cache: `steps` in all.

    Returns the tokens that follow, (steps, b), the last of them, and the cache.
    """
    model = nnx.merge(graph, state)

    def step(carry, i):
        recent, token = carry
        x, recent = model(token[:, None], cache, recent, i)
        token = sampling(model.logits(x[:, 0]), jax.random.fold_in(key, cache.length + 1 + i))
        return (recent, token), token

    recent = new_recent(model.config, steps, model.dtype, token.shape[0])
    (recent, last), tokens = jax.lax.scan(step, (recent, token), jnp.arange(steps))
    return tokens, last, extend(cache, recent, steps)


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
        signature = (function, *(a.shape for a in jax.tree.leaves((cache, args))))
        if signature not in self._compiled:
            began = time.perf_counter()
            static |= {"sampling": self.sampling}
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
                f"prompt_ids must hold between 1 and {limit - max_tokens} tokens (context {limit}, "
                f"max_tokens {max_tokens}), got {len(prompt_ids)}"
            )
        self.timing = timing = Timing(prefill_tokens=len(prompt_ids))
        began, key = time.perf_counter(), jax.random.key(seed)
        # The last run of decoding may go past max_tokens.
        capacity = -(-(total + self.steps) // _CAPACITY_STEP) * _CAPACITY_STEP
        token, cache = self._prefill(prompt_ids, key, new_cache(self.model.config, capacity, self.model.dtype))
        timing.first_token_s = time.perf_counter() - began
        timing.prefill_s = timing.first_token_s - timing.compile_s

        began, compiled = time.perf_counter(), timing.compile_s
        run, left = token[None], max_tokens
        while True:
            # The next run is under way before this one's tokens are looked at: no device waits for the host.
            following = None
            if left > len(run):
                following, token, cache = self._call(_decode, cache, key, token, steps=self.steps)
            ids = np.asarray(run)[:, 0].tolist()
            if left < max_tokens:
                timing.decode_tokens += len(ids)
                timing.decode_s = time.perf_counter() - began - (timing.compile_s - compiled)
            kept = self._until_stop(ids[:left])
            if kept:
                yield kept
            left -= len(ids)
            if following is None or len(kept) < len(ids):
                return
            run = following

    def _prefill(self, prompt_ids: Sequence[int], key: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        token: Any = None
        for start in range(0, len(prompt_ids), _CHUNKS[-1]):
            chunk = prompt_ids[start : start + _CHUNKS[-1]]
            size = next(c for c in _CHUNKS if c >= len(chunk))
            ids = jnp.asarray([[*chunk, *[0] * (size - len(chunk))]], jnp.int32)
            token, cache = self._call(_prefill, cache, key, ids, jnp.int32(len(chunk)))
        return jax.block_until_ready(token), cache

    def _until_stop(self, ids: list[int]) -> list[int]:
        stops = [i for i, token in enumerate(ids) if token in self.stop_ids]
        return ids[: stops[0]] if stops else ids
