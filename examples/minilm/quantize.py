"""The dense layers of an encoder as QTensors: by GPTQ over calibration sentences, or rounded to nearest."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jax_qgemm as qg
from examples.minilm import gptq
from examples.minilm.model import (
    DENSE_STAGES,
    Config,
    Encoder,
    Tensors,
    dense,
    embed_tokens,
    encoder_layer,
    layer_tensors,
    prefix,
)
from jax_qgemm.formats import IntFormat


def by_rounding(encoder: Encoder, format: IntFormat) -> Encoder:
    """The encoder with its dense layers rounded to nearest, as `jax_qgemm.quantize` does."""
    names = [f"{name}.weight" for name in encoder.config.dense_layers]
    quantized = {name: qg.quantize(encoder.tensors[name].T, format) for name in names}
    return dataclasses.replace(encoder, tensors={**encoder.tensors, **quantized})


def by_gptq(encoder: Encoder, sentences: Sequence[str], format: IntFormat, *, act_order: bool = False) -> Encoder:
    """The encoder with its dense layers quantized by GPTQ, one after another.

    The calibration inputs of a dense layer are those that reach it in the sentences' tokens once all dense layers
    before it are quantized.

    Args:
      encoder: with float tensors.
      sentences: calibration sentences, which run as one batch.
      format, act_order: see `gptq.quantize`.
    """
    config = encoder.config
    tensors = dict(encoder.tensors)
    ids, mask = encoder.tokenize(sentences)
    x = embed_tokens(tensors, jnp.asarray(ids), config)
    with tqdm(total=len(config.dense_layers), desc="GPTQ", unit="layer") as bar:
        for i in range(config.num_layers):
            layer = layer_tensors(tensors, i)
            for stage in DENSE_STAGES:
                _, inputs = _run_layer(layer, x, jnp.asarray(mask), config)
                hessian = gptq.hessian_of(np.asarray(inputs[stage[0]])[mask])
                for name in stage:
                    w = np.asarray(layer[f"{name}.weight"]).T
                    layer[f"{name}.weight"] = gptq.quantize(w, hessian, format, act_order=act_order)
                    bar.update()
            x, _ = _run_layer(layer, x, jnp.asarray(mask), config)
            tensors |= {prefix(i) + name: tensor for name, tensor in layer.items()}
    return dataclasses.replace(encoder, tensors=tensors)


@functools.partial(jax.jit, static_argnames="config")
def _run_layer(
    tensors: Tensors, x: jax.Array, mask: jax.Array, config: Config
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A layer's output, and the input of each of its dense layers."""
    inputs = {}

    def record(tensors: Tensors, name: str, x: jax.Array, **epilogue) -> jax.Array:
        inputs[name] = x
        return dense(tensors, name, x, **epilogue)

    return encoder_layer(tensors, x, mask, config, record), inputs
