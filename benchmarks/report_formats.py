"""The tables of docs/formats.md, from the formats themselves and benchmarks/results/quantization_error.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

import jax_qgemm as qg
from benchmarks.harness import ROOT, plane_bits
from benchmarks.markdown import markdown
from jax_qgemm.formats import GGUF_FORMATS, Format, GGUFFormat, GroupPlane, IntFormat

INT_FORMATS: tuple[IntFormat, ...] = tuple(
    make(group_size, symmetric=symmetric)
    for make in (qg.int2, qg.int3, qg.int4, qg.int8)
    for group_size in (32, 128, -1)
    for symmetric in (True, False)
)
_EQUATION = re.compile(r"^// w = (.*)$", re.MULTILINE)


def layout_bits(format: Format) -> str:
    """Bits of one weight in the kernel layout, padding aside."""
    per_channel = [p for p in format.planes if isinstance(p, GroupPlane) and not p.group]
    rest = sum(8 * np.dtype(p.dtype).itemsize for p in per_channel)
    return f"{plane_bits(format):.6g}" + (f" + {rest}/k" if rest else "")


def equation(format: GGUFFormat) -> str:
    """As the format's C++ header states it, above its struct."""
    header = ROOT / "cuda" / "formats" / f"{format.name}.cuh"
    found = _EQUATION.search(header.read_text())
    if found is None:
        raise ValueError(f"{header.relative_to(ROOT)} has no line that starts with '// w = '")
    return found[1].split(",")[0]


def _row(results: Mapping[str, Any], format: Format) -> dict[str, Any]:
    for row in results["rows"]:
        if row["format"] == str(format):
            return row
    raise ValueError(f"no result for {format}: run python -m benchmarks.quantization_error")


def gguf_table(results: Mapping[str, Any]) -> str:
    rows = []
    for format in GGUF_FORMATS.values():
        measured = _row(results, format)
        same = measured["equals_gguf_py"]
        quantizer = {True: "gguf-py's, to the byte", False: "differs from gguf-py", None: "own search"}[same]
        rows.append((
            f"`{format.name}`",
            f"{format.block_bytes} / {format.block}",
            f"{8 * format.block_bytes / format.block:.6g}",
            layout_bits(format),
            str(format.group),
            f"`{equation(format)}`",
            quantizer,
            f"{measured['nmse']:.3g}",
        ))  # fmt: skip
    head = ("format", "bytes / block", "bits, file", "bits, kernel", "group", "weight", "quantizer", "NMSE")
    return markdown(head, rows)


def int_table(results: Mapping[str, Any]) -> str:
    rows = []
    for format in INT_FORMATS:
        arguments = f"group_size={format.group_size}, symmetric={format.symmetric}"
        error = f"{_row(results, format)['nmse']:.3g}"
        rows.append((f"`{format.name}({arguments})`", layout_bits(format), error))
    return markdown(("format", "bits, kernel", "NMSE"), rows)


def provenance(results: Mapping[str, Any]) -> str:
    """Where the figures come from, in one sentence."""
    environment = results["environment"]
    return (
        f"NMSE of `quantize` on k = {results['k']}, n = {results['n']} weights from N(0, 1), seed {results['seed']}, "
        f"by `python -m benchmarks.quantization_error` with jax {environment['jax']} on a CPU.\n"
    )


# Table name -> writer, of the results in quantization_error.json.
TABLES = {"gguf-formats": gguf_table, "int-formats": int_table, "provenance": provenance}
