"""Writes the tables of README.md and docs/ from benchmarks/results/*.json.

python -m benchmarks.report [--check]

A table stands between `<!-- table:NAME -->` and `<!-- end -->`; --check fails where one is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import report_formats
from benchmarks.harness import RESULTS
from benchmarks.markdown import markdown
from benchmarks.report_formats import ROOT

_BLOCK = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def source(results: dict[str, Any]) -> str:
    env = results["environment"]
    return f"\n{env['device']}; jax {env['jax']}, commit {env['commit'][:9]}.\n"


def demo(results: dict[str, Any]) -> str:
    rows = (
        (
            r["dtype"],
            f"{r['decode_tokens_per_s']:.0f}",
            f"{r['prefill_tokens_per_s']:.0f}",
            f"{r['weights_mib']:.0f} MiB",
            f"{r['weights_f16_mib']:.0f} MiB",
            f"{r['peak_host_mib']:.0f} MiB",
            f"{r['peak_device_mib']:.0f} MiB" if r["peak_device_mib"] else "-",
        )
        for r in results["rows"]
    )
    header = (
        "activations",
        "decode, tokens/s",
        "prefill, tokens/s",
        "weights",
        "in f16",
        "peak host memory",
        "peak device memory",
    )
    return markdown(header, rows) + source(results)


def matmul(results: dict[str, Any]) -> str:
    """One row a shape and m, one column a kind; microseconds."""
    kinds: list[str] = list(dict.fromkeys(r["kind"] for r in results["rows"]))
    cells: dict[tuple[int, int, int], dict[str, float]] = {}
    for r in results["rows"]:
        cells.setdefault((r["n"], r["k"], r["m"]), {})[r["kind"]] = r["us"]
    rows = ((f"{n} x {k}", str(m), *(f"{times[kind]:,.1f}" for kind in kinds)) for (n, k, m), times in cells.items())
    header = ("n x k", "m", *(kind.replace("xla_", "XLA ") for kind in kinds))
    return markdown(header, rows) + source(results)


# Table name -> (result file, writer).
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    f"{device}-{kind}": (f"{file}-{kind}.json", writer)
    for device, file in (("cpu", "cpu"), ("h200", "nvidia_h200"))
    for kind, writer in (("demo", demo), ("matmul", matmul))
} | {name: ("quantization_error.json", writer) for name, writer in report_formats.TABLES.items()}
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))


def filled(text: str) -> str:
    def table(match: re.Match[str]) -> str:
        file, writer = TABLES[match[2]]
        return match[1] + "\n" + writer(json.loads((RESULTS / file).read_text())) + "\n" + match[3]

    return _BLOCK.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table is stale")
    args = parser.parse_args()
    stale = []
    for path in PAGES:
        text = path.read_text()
        new = filled(text)
        if new != text:
            stale.append(path.relative_to(ROOT))
            if not args.check:
                path.write_text(new)
    print("stale:" if args.check else "written:", *stale)
    sys.exit(bool(args.check and stale))


if __name__ == "__main__":
    main()
