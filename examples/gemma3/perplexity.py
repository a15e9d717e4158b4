"""Perplexity of a text, by the convention of llama.cpp's `llama-perplexity`."""

import functools
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from examples.gemma3.model import Gemma3
from examples.gemma3.tokenizer import Tokenizer

# Positions whose logits exist at one time: at 262,144 tokens a row of them is 1 MB.
_LOGIT_ROWS = 16


@functools.partial(jax.jit, static_argnames=("graph",))
def _negative_log_likelihood(graph: Any, state: Any, ids: jax.Array) -> jax.Array:
    """-log p of each token of a text (t,) but the first, in nats: (t - 1,)."""
    model = nnx.merge(graph, state)
    x, _ = model(ids[None, :-1])

    def of_token(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, target = args
        logits = model.logits(x)
        return jax.nn.logsumexp(logits) - logits[target]

    return jax.lax.map(of_token, (x[0], ids[1:]), batch_size=_LOGIT_ROWS)


def perplexity(model: Gemma3, tokenizer: Tokenizer, text: str, context: int = 512) -> tuple[float, int]:
    """Returns exp of the mean -log p of the scored tokens, and their number.

    The text's tokens are cut into windows of `context`, a rest is dropped, and the first token of each window
    is replaced by the begin token. Of each window the tokens of the second half are scored, so that each has
    at least half a window before it. A text shorter than one window is a window of its own, scored whole.

    Raises:
      ValueError: context is below 2, or the text has fewer than two tokens.
    """
    if context < 2:
        raise ValueError(f"context must be at least 2, got {context}")
    ids = np.asarray(tokenizer.encode(text), np.int32)
    if len(ids) < 2:
        raise ValueError(f"text must have at least two tokens, got {len(ids)}")
    graph, state = nnx.split(model)
    windows = len(ids) // context
    first_scored = context // 2 if windows else 1
    total, count = 0.0, 0
    for w in tqdm(range(max(windows, 1)), desc="perplexity", unit="window", leave=False):
        window = ids[w * context : (w + 1) * context].copy()
        window[: len(tokenizer.begin_ids)] = tokenizer.begin_ids
        losses = np.asarray(_negative_log_likelihood(graph, state, window), np.float64)
        scored = losses[first_scored - 1 :]
        total, count = total + scored.sum(), count + len(scored)
    return math.exp(total / count), count
