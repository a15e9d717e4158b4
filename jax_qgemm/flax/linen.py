"""A quantized layer for Linen, and the conversion of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from jax_qgemm.flax.layers import product
from jax_qgemm.formats import QTensor, quantize
from jax_qgemm.formats.format import Format

COLLECTION = "quantized"


class QDense(nn.Module):
    """`flax.linen.Dense` with a quantized kernel: the same arguments, types and names.

    The kernel is a QTensor (k, features) in the collection "quantized", the bias stays in "params":
    optimizers and gradients of the parameters see only the bias. `init` quantizes the kernel that Dense would
    have; `quantize_dense` brings over trained parameters.

    Attributes:
      features: n.
      format: of the kernel that `init` makes: a name such as "q4_0", or a `Format`.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init: as of `flax.linen.Dense`.
      x_format: see `QLinear`.
    """

    features: int
    format: str | Format
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    x_format: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., k) -> (..., features). Raises as `jax_qgemm.matmul` does, `init` as `jax_qgemm.quantize`."""

        def init() -> QTensor:
            shape = (x.shape[-1], self.features)
            return quantize(self.kernel_init(self.make_rng("params"), shape, self.param_dtype), self.format)

        w = self.variable(COLLECTION, "kernel", init).value
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return product(
            x, w, bias, dtype=self.dtype, param_dtype=self.param_dtype, precision=self.precision, x_format=self.x_format
        )


def quantize_dense(params: Any, format: str | Format, where: Callable[[tuple[str, ...]], bool]) -> dict[str, Any]:
    """Variables for a model whose Dense layers became `QDense`, from the parameters it had before.

    Args:
      params: the "params" collection, nested dicts of arrays.
      format: of the quantized kernels.
      where: a function of the path of a layer, ("block_0", "mlp", "up") for instance, true for the layers
        that are now QDense. It is asked about every entry named "kernel".

    Returns:
      {"params": ..., "quantized": ...}, the chosen kernels (*batch, k, n) moved from the one to the other.

    Raises:
      TypeError, ValueError: a kernel that cannot be quantized, see `jax_qgemm.quantize`; or, ValueError, none
        chosen. Both name the path.
    """
    flat = traverse_util.flatten_dict(params)
    chosen = [path for path in flat if path[-1] == "kernel" and where(path[:-1])]
    if not chosen:
        raise ValueError("where accepted no layer of params that has a kernel")
    kernels = {}
    for path in chosen:
        try:
            kernels[path] = quantize(flat.pop(path), format)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{'/'.join(path[:-1])}: {error}") from error
    return {"params": traverse_util.unflatten_dict(flat), COLLECTION: traverse_util.unflatten_dict(kernels)}
