"""Readers and writers of checkpoints whose weights are already quantized."""

from jax_qgemm.io._gguf_reader import GGUFHeader, GGUFTensorInfo
from jax_qgemm.io._gguf_types import GGUFInt, GGUFValueType
from jax_qgemm.io.errors import FormatError
from jax_qgemm.io.gguf import load_gguf, read_gguf_header, save_gguf

__all__ = [
    "FormatError",
    "GGUFHeader",
    "GGUFInt",
    "GGUFTensorInfo",
    "GGUFValueType",
    "load_gguf",
    "read_gguf_header",
    "save_gguf",
]
