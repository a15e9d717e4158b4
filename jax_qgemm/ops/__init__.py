"""The ops: their primitives with abstract evaluation, batching, derivatives and lowerings, and their wrappers."""

from jax_qgemm.ops.matmul import ACTIVATIONS, matmul
from jax_qgemm.ops.take import take

__all__ = ["ACTIVATIONS", "matmul", "take"]
