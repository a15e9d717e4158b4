"""Readers and writers of checkpoints whose weights are already quantized."""

from jax_qgemm.io._gguf_types import GGUFInt
from jax_qgemm.io.errors import FormatError
from jax_qgemm.io.gguf import GGUFHeader, TensorInfo, load_gguf, read_gguf_header, save_gguf

__all__ = ["FormatError", "GGUFHeader", "GGUFInt", "TensorInfo", "load_gguf", "read_gguf_header", "save_gguf"]
