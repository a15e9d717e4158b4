"""Every weight format by name. Adding one: its module, a line here, its C++ header and a row in
tests/cases.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_qgemm.formats import fp4, ggml_legacy, iq4, k_quants
from jax_qgemm.formats.format import Format, GGUFFormat
from jax_qgemm.formats.integer import IntFormat, int2, int3, int4, int8

GGUF_FORMATS: dict[str, GGUFFormat] = {
    f.name: f for f in (*ggml_legacy.FORMATS, *k_quants.FORMATS, *iq4.FORMATS, *fp4.FORMATS)
}
_INT_FAMILY = {"int2": int2, "int3": int3, "int4": int4, "int8": int8}
FORMAT_NAMES: tuple[str, ...] = (*GGUF_FORMATS, *_INT_FAMILY)


def get_format(format: str | Format) -> Format:
    """The format of that name; a `Format` is returned as it is. "int4" and its kin mean group_size=128,
    symmetric, float16 scales.

    Raises:
      TypeError: neither a string nor a Format.
      ValueError: an unknown name.
    """
    if isinstance(format, Format):
        return format
    if not isinstance(format, str):
        raise TypeError(f"format must be a name or a Format (such as int4(group_size=64)), got {type(format).__name__}")
    if format in GGUF_FORMATS:
        return GGUF_FORMATS[format]
    if format in _INT_FAMILY:
        return _INT_FAMILY[format]()
    raise ValueError(f"unknown format {format!r}; known formats: {', '.join(FORMAT_NAMES)}")


def format_to_json(format: Format) -> dict[str, Any]:
    """What `format_from_json` needs to give an equal format."""
    if isinstance(format, IntFormat):
        parameters = {"group_size": format.group_size, "symmetric": format.symmetric, "scale_dtype": format.scale_dtype}
        return {"name": format.name, **parameters}
    return {"name": format.name}


def format_from_json(description: Mapping[str, Any]) -> Format:
    """The format that `format_to_json` described."""
    parameters = dict(description)
    name = parameters.pop("name")
    return _INT_FAMILY[name](**parameters) if parameters else get_format(name)


def gguf_format(format: str | Format) -> GGUFFormat:
    """Like `get_format`, for a format that has a GGUF block."""
    found = get_format(format)
    if not isinstance(found, GGUFFormat):
        raise ValueError(f"format {found} has no GGUF block; those that have: {', '.join(GGUF_FORMATS)}")
    return found
