"""Weight formats and the QTensor that holds weights in them."""

from jax_qgemm.formats.activations import QActivations
from jax_qgemm.formats.format import CodePlane, Format, GGUFFormat, GroupPlane, Plane
from jax_qgemm.formats.integer import IntFormat, int2, int3, int4, int8
from jax_qgemm.formats.qtensor import QTensor, quantize
from jax_qgemm.formats.registry import FORMAT_NAMES, GGUF_FORMATS, get_format, gguf_format

__all__ = [
    "FORMAT_NAMES",
    "GGUF_FORMATS",
    "CodePlane",
    "Format",
    "GGUFFormat",
    "GroupPlane",
    "IntFormat",
    "Plane",
    "QActivations",
    "QTensor",
    "get_format",
    "gguf_format",
    "int2",
    "int3",
    "int4",
    "int8",
    "quantize",
]
