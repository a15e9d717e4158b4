"""Readers and writers of checkpoints whose weights are already quantized."""

from jax_qgemm.io._gguf_reader import GGUFHeader, GGUFTensorInfo
from jax_qgemm.io._gguf_types import GGUFInt, GGUFValueType
from jax_qgemm.io.awq import load_awq, save_awq
from jax_qgemm.io.compressed_tensors import load_compressed_tensors, save_compressed_tensors
from jax_qgemm.io.errors import FormatError
from jax_qgemm.io.gguf import load_gguf, read_gguf_header, save_gguf
from jax_qgemm.io.gptq import load_gptq, save_gptq
from jax_qgemm.io.inspection import CheckpointReport, Finding, TensorSummary, inspect

__all__ = [
    "CheckpointReport",
    "Finding",
    "FormatError",
    "GGUFHeader",
    "GGUFInt",
    "GGUFTensorInfo",
    "GGUFValueType",
    "TensorSummary",
    "inspect",
    "load_awq",
    "load_compressed_tensors",
    "load_gguf",
    "load_gptq",
    "read_gguf_header",
    "save_awq",
    "save_compressed_tensors",
    "save_gguf",
    "save_gptq",
]
