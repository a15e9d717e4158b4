"""Every op in plain jnp: what the kernels are compared with, and what runs where there is no kernel."""

from jax_qgemm.reference.epilogue import ACTIVATIONS, epilogue
from jax_qgemm.reference.matmul import matmul

__all__ = ["ACTIVATIONS", "epilogue", "matmul"]
