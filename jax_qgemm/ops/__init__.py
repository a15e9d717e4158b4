"""The ops: their primitives with abstract evaluation, batching, derivatives and lowerings, and their wrappers."""

from jax_qgemm.ops.experts import expert_matmul
from jax_qgemm.ops.gated import gated_matmul, interleave_gate_up
from jax_qgemm.ops.matmul import matmul
from jax_qgemm.ops.quantize import quantize_activations
from jax_qgemm.ops.take import take

__all__ = ["expert_matmul", "gated_matmul", "interleave_gate_up", "matmul", "quantize_activations", "take"]
