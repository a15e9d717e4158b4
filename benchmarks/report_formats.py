"""The tables of docs/formats.md, from the formats themselves and benchmarks/results/quantization_error.json.

python -m benchmarks.report_formats [--check]

Replaces what stands between `<!-- table:NAME -->` and `<!-- end -->`; with --check it changes nothing and fails
if something would change.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.quantization_error import INT_FORMATS, RESULTS
from benchmarks.report import ROOT, markdown
from jax_qgemm.formats import GGUF_FORMATS, CodePlane, Format, GGUFFormat, IntFormat

PAGE = ROOT / "docs" / "formats.md"
_MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_EQUATION = re.compile(r"^// w = (.*)$", re.MULTILINE)


def layout_bits(format: Format) -> str:
    """Bits of one weight in the kernel layout, padding aside."""
    bits, per_channel = 0.0, 0
    for plane in format.planes:
        if isinstance(plane, CodePlane):
            bits += plane.bits
        elif plane.group:
            bits += 8 * np.dtype(plane.dtype).itemsize / plane.group
        else:
            per_channel += 8 * np.dtype(plane.dtype).itemsize
    return f"{bits:.6g}" + (f" + {per_channel}/k" if per_channel else "")


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
    raise ValueError(f"{RESULTS.name} has no row for {format}: run python -m benchmarks.quantization_error")


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
        assert isinstance(format, IntFormat)
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


def filled(page: str) -> str:
    """The page with its tables as they should be."""
    results = json.loads(RESULTS.read_text())
    tables = {"gguf-formats": gguf_table, "int-formats": int_table, "provenance": provenance}
    return _MARKED.sub(lambda m: f"{m[1]}\n{tables[m[2]](results)}\n{m[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the page is not up to date")
    args = parser.parse_args()
    page = PAGE.read_text()
    new = filled(page)
    if args.check and new != page:
        sys.exit(f"{PAGE.relative_to(ROOT)} is not up to date: run python -m benchmarks.report_formats")
    if not args.check:
        PAGE.write_text(new)


if __name__ == "__main__":
    main()
