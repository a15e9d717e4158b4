"""Models and helpers that the tests of jax_qgemm.flax share."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_qgemm as qg

EXACT = 1e-11  # float32 on the CPU


def float64(array):
    return np.asarray(array).astype(np.float64)


def round_trip(matrix, format="q4_0"):
    """What quantization makes of a dense (*batch, k, n)."""
    return qg.quantize(matrix, format).dequantize()


class MLP(nnx.Module):
    def __init__(self, rngs, **options):
        self.up = nnx.Linear(64, 32, rngs=rngs, **options)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.down = nnx.Linear(32, 64, use_bias=False, rngs=rngs, **options)

    def __call__(self, x):
        return x + self.down(self.norm(jnp.tanh(self.up(x))))


class Model(nnx.Module):
    """Layers in every kind of container, one of them at two places."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(48, 64, rngs=rngs)
        self.blocks = nnx.List([MLP(rngs)])
        self.named = nnx.Dict(mlp=MLP(rngs))
        self.plain = nnx.data({"list": [nnx.Linear(64, 64, rngs=rngs)]})
        self.head = nnx.Sequential(nnx.Linear(64, 64, rngs=rngs), jnp.tanh)
        self.tied = self.head.layers[0]

    def __call__(self, ids):
        x = self.embed(ids)
        for block in (*self.blocks, self.named["mlp"]):
            x = block(x)
        x = self.tied(self.head(self.plain["list"][0](x)))
        return self.embed.attend(x)


def types(model):
    return {"/".join(map(str, path)): type(module) for path, module in nnx.iter_modules(model)}


def converted(model):
    return {path for path, kind in types(model).items() if kind.__module__.startswith("jax_qgemm")}


@nnx.jit
def call(model, *args):
    return model(*args)


def with_round_trips(model):
    """The same model, unconverted, its weights replaced by what quantization makes of them."""
    model = nnx.clone(model)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            module.kernel[...] = round_trip(module.kernel[...])
        elif isinstance(module, nnx.Embed):
            module.embedding[...] = round_trip(module.embedding[...].T).T
    return model
