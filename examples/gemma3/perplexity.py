"""Perplexity of a text, by the convention of llama.cpp's `llama-perplexity`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from examples.gemma3.model import MAX_CHUNK, Cache, Gemma3
from examples.gemma3.tokenizer import Tokenizer

# Positions whose logits exist at one time: at 262,144 tokens a row of them is 1 MB.
_LOGIT_ROWS = 16


@functools.partial(jax.jit, static_argnames=("graph",), donate_argnames=("cache",))
def _negative_log_likelihood(
    graph: Any, state: Any, cache: Cache, ids: jax.Array, targets: jax.Array, start: jax.Array
):
    """-log p of `targets` (t,), each after the token of `ids` (t,) at its place, in nats."""
    model = nnx.merge(graph, state)
    x, cache = model(ids[None], start, ids.shape[0], cache)

    def rows(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, target = args
        logits = model.logits(x)
        return jax.nn.logsumexp(logits) - logits[target]

    return jax.lax.map(rows, (x[0], targets), batch_size=_LOGIT_ROWS), cache


def perplexity(
    model: Gemma3, tokenizer: Tokenizer, text: str, context: int = 2 * MAX_CHUNK
) -> tuple[float, int]:
    """Returns exp of the mean -log p of the scored tokens, and their number.

    The text's tokens are cut into windows of `context`, a rest is dropped, and the first token of each window
    is replaced by the begin token. Of each window the tokens of the second half are scored, so that each has
    at least half a window before it. A text shorter than one window is a window of its own, scored whole.

    Raises:
      ValueError: context is not a positive multiple of MAX_CHUNK, or the text has fewer than two tokens.
    """
    if context <= 0 or context % MAX_CHUNK:
        raise ValueError(f"context must be a positive multiple of {MAX_CHUNK}, got {context}")
    ids = np.asarray(tokenizer.encode(text), np.int32)
    if len(ids) < 2:
        raise ValueError(f"text must have at least two tokens, got {len(ids)}")
    graph, state = nnx.split(model)
    windows = len(ids) // context
    first_scored = context // 2 if windows else 1
    total, count = 0.0, 0
    for w in tqdm(range(max(windows, 1)), desc="perplexity", unit="window", leave=False):
        window = ids[w * context : (w + 1) * context].copy()
        if tokenizer.add_bos:
            window[0] = tokenizer.bos_id
        targets = np.append(window[1:], 0)
        cache = model.new_cache(context)
        losses = []
        for start in range(0, len(window), MAX_CHUNK):
            chunk = slice(start, start + MAX_CHUNK)
            loss, cache = _negative_log_likelihood(
                graph, state, cache, window[chunk], targets[chunk], jnp.int32(start)
            )
            losses.append(np.asarray(loss, np.float64))
        # losses[i] is that of token i + 1; the last one has no target.
        scored = np.concatenate(losses)[first_scored - 1 : len(window) - 1]
        total, count = total + scored.sum(), count + len(scored)
    return math.exp(total / count), count
