"""Flax layers over QTensors, and the conversion of existing models.

`QLinear`, `QLinearGeneral` and `QEmbed` stand in for the nnx layers of those names; `quantize` puts them into
an nnx model. `QDense` and `quantize_dense` do so for Linen.

The packed weights are `QWeight` variables, not `nnx.Param`: `nnx.grad` and `nnx.Optimizer(...,
wrt=nnx.Param)` leave them alone, while `nnx.state`, `nnx.jit`, `nnx.scan`, checkpoints and sharding see them
like any other variable. A checkpoint is restored into the abstract model that `nnx.eval_shape` gives:

    model = qg.flax.quantize(Model(rngs=nnx.Rngs(0)), "q4_0")
    checkpointer.save(path, nnx.state(model))

    abstract = nnx.eval_shape(lambda: qg.flax.quantize(Model(rngs=nnx.Rngs(0)), "q4_0"))
    graphdef, state = nnx.split(abstract)
    model = nnx.merge(graphdef, checkpointer.restore(path, state))
"""

try:
    import flax as _flax  # noqa: F401
except ImportError as error:
    raise ImportError("jax_qgemm.flax needs Flax: pip install 'jax_qgemm[flax]'") from error

from jax_qgemm.flax.convert import quantize
from jax_qgemm.flax.layers import QEmbed, QLinear, QLinearGeneral
from jax_qgemm.flax.linen import QDense, quantize_dense
from jax_qgemm.flax.variables import QWeight

__all__ = ["QDense", "QEmbed", "QLinear", "QLinearGeneral", "QWeight", "quantize", "quantize_dense"]
