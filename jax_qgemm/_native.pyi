from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


def registrations() -> dict:
    """XLA FFI handlers by platform and target name."""

def build_info() -> dict:
    """How this module was built."""

def plane_tables() -> dict:
    """
    For every format, its planes as (name, is_code, bits, shift, group), for comparison with the Python tables.
    """

def dequantize(format: str, planes: Sequence[Annotated[NDArray, dict(order='C', device='cpu', writable=False)]], n: int, k: int, group_size: int = 0, scale_type: int = 0) -> object:
    """
    The C++ decoder, element by element: float32 (n, k) of the planes of one weight.
    """

def dequantize_q8_1(raw: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> object:
    """The same of q8_1 blocks: float32 of uint8 (blocks * 36,)."""

def set_host_instruction_set(name: str) -> None:
    """
    For tests: makes later products on the CPU use it; "" is the best that this CPU has.
    """
