"""Writes the tables and pictures of README.md and docs/ from benchmarks/results/*.json.

python -m benchmarks.report [--check]

A table stands between `<!-- table:NAME -->` and `<!-- end -->`, a picture between `<!-- picture:PATH -->` and
`<!-- end -->`, its path as the page sees it. --check changes nothing and fails where one is not what the results say.
Where there are no results yet, the page says which script makes them. Pictures need the bench extra (matplotlib).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import plot, report_formats, report_gpu
from benchmarks.harness import RESULTS, ROOT
from benchmarks.markdown import markdown, source

_TABLE = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_PICTURE = re.compile(r"(<!-- picture:(?:[\w./-]*/)?([\w-]+)\.svg -->\n).*?(<!-- end -->)", re.DOTALL)


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
    rows = (
        (f"{n} x {k}", str(m), *(f"{times[kind]:,.1f}" if kind in times else "" for kind in kinds))
        for (n, k, m), times in cells.items()
    )
    header = ("n x k", "m", *(kind.replace("xla_", "XLA ") for kind in kinds))
    return markdown(header, rows) + source(results)


def minilm(results: dict[str, Any]) -> str:
    rows = (
        (
            str(r["bits"]),
            r["method"],
            f"{r['mean']:.4f}",
            f"{1 - r['mean']:.2g}",
            f"{r['lowest']:.4f}",
            f"{r['similarity_error']:.2g}",
            f"{r['dense_bytes'] / (1 << 20):.1f} MiB",
        )
        for r in results["rows"]
    )
    header = ("bits", "method", "mean cosine", "1 - mean", "lowest", "error of similarities", "dense weights")
    sizes = (
        f"\nGroups of {results['group_size']}, asymmetric; calibrated on {results['calibration_sentences']} sentences, "
        f"measured on {results['held_out_sentences']} others. As float32 the dense weights take "
        f"{results['float32_bytes'] / (1 << 20):.1f} MiB. By `python -m benchmarks.minilm`.\n"
    )
    return markdown(header, rows) + sizes + source(results)


# Table name -> (result file, writer).
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = (
    {
        f"{device}-{kind}": (f"{file}-{kind}.json", writer)
        for device, file in (("cpu", "cpu"), ("h200", "nvidia_h200"))
        for kind, writer in (("demo", demo), ("matmul", matmul))
    }
    | {name: ("quantization_error.json", writer) for name, writer in report_formats.TABLES.items()}
    | {"minilm": ("cpu-minilm.json", minilm)}
    | report_gpu.TABLES
)
# Picture name -> result file of benchmarks.matmul, and what the picture shows.
PICTURES: dict[str, tuple[str, str]] = {
    "h200-matmul": ("nvidia_h200-matmul.json", "Time against m, by shape, on an H200"),
    "h200-matmul-untuned": ("nvidia_h200-matmul-untuned.json", "Time against m, shapes nobody tuned for, on an H200"),
    "h200-matmul-all-m": ("nvidia_h200-matmul-all-m.json", "Time at every m from 1 to 64, on an H200"),
}
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
PICTURE_FOLDER = ROOT / "docs" / "img"


def _missing(file: str) -> str:
    return f"Not measured yet: there is no `{file}` among the results.\n"


def filled(text: str, results: Path = RESULTS) -> str:
    """A page's text with its tables and pictures."""

    def table(match: re.Match[str]) -> str:
        file, writer = TABLES[match[2]]
        path = results / file
        content = writer(json.loads(path.read_text())) if path.exists() else _missing(file)
        return match[1] + "\n" + content + "\n" + match[3]

    def picture(match: re.Match[str]) -> str:
        file, caption = PICTURES[match[2]]
        link = match[1].removeprefix("<!-- picture:").removesuffix(" -->\n")
        content = f"![{caption}]({link})\n" if (results / file).exists() else _missing(file)
        return match[1] + "\n" + content + "\n" + match[3]

    return _PICTURE.sub(picture, _TABLE.sub(table, text))


def stale_pictures(results: Path = RESULTS, folder: Path = PICTURE_FOLDER) -> list[tuple[Path, Path]]:
    """(result file, picture) of every picture that its results have outgrown."""
    pairs = [(results / file, folder / f"{name}.svg") for name, (file, _) in PICTURES.items()]
    return [(file, picture) for file, picture in pairs if file.exists() and not plot.is_current(picture, file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table or picture is stale")
    args = parser.parse_args()
    stale = []
    for path in PAGES:
        text = path.read_text()
        new = filled(text)
        if new != text:
            stale.append(path.relative_to(ROOT))
            if not args.check:
                path.write_text(new)
    for file, picture in stale_pictures():
        stale.append(picture.relative_to(ROOT))
        if not args.check:
            plot.draw_file(file, picture)
    print("stale:" if args.check else "written:", *stale)
    sys.exit(bool(args.check and stale))


if __name__ == "__main__":
    main()
