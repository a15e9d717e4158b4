"""Pictures of a result file of benchmarks.matmul: time against m, a panel a shape.

Needs the bench extra (matplotlib), but for telling whether a picture is up to date: a picture carries the digest of
the results that it was drawn from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BASELINES = {"xla_bf16": ("XLA bf16", "0.25"), "xla_f32": ("XLA f32", "0.25"), "xla_int4": ("XLA int4", "0.55")}
_PANEL_INCHES = (4.0, 3.2)
_COLUMNS = 3


def digest(results: Path) -> str:
    return f"sha256:{hashlib.sha256(results.read_bytes()).hexdigest()}"


def is_current(picture: Path, results: Path) -> bool:
    return picture.exists() and digest(results) in picture.read_text(encoding="utf-8")


def draw_file(results: Path, picture: Path) -> None:
    """Draws a result file of benchmarks.matmul as an SVG or a PNG, by the picture's suffix."""
    import matplotlib

    # Text stays text, and the same results give the same picture.
    style: Any = {"svg.hashsalt": "jax_qgemm", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = draw(json.loads(results.read_text()))
        picture.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Description": digest(results)} | ({"Date": None} if picture.suffix == ".svg" else {})
        figure.savefig(picture, metadata=metadata)


def draw(results: Mapping[str, Any]) -> Any:
    """The figure: a line a kind, and dashed the plain read of the bytes that the first format reads."""
    import matplotlib.ticker
    from matplotlib.figure import Figure

    rows = results["rows"]
    shapes = list(dict.fromkeys((r["n"], r["k"]) for r in rows))
    kinds = list(dict.fromkeys(r["kind"] for r in rows if not r["kind"].startswith("xla_")))
    columns = min(_COLUMNS, len(shapes))
    lines = -(-len(shapes) // columns)
    size = (columns * _PANEL_INCHES[0], lines * _PANEL_INCHES[1] + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for (n, k), axes in zip(shapes, panels, strict=False):
        of_shape = [r for r in rows if (r["n"], r["k"]) == (n, k)]
        for index, kind in enumerate(kinds):
            _line(axes, of_shape, kind, kind, marker="o", markersize=3, color=f"C{index}")
        for kind, (label, color) in _BASELINES.items():
            _line(axes, of_shape, kind, label, marker="s", markersize=3, color=color, linestyle=":")
        floors = {r["read_us"] for r in of_shape if r["kind"] == kinds[0] and "read_us" in r}
        for floor in floors:
            axes.axhline(floor, color="black", linestyle="--", linewidth=1, label=f"plain read of {kinds[0]}'s bytes")
        axes.set_title(f"{n} x {k}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({r["m"] for r in of_shape if r["m"] & (r["m"] - 1) == 0}))
        axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 5)))
        axes.set_xlabel("m")
        axes.set_ylabel("µs")
        axes.grid(alpha=0.3, which="both")
    for axes in panels[len(shapes) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    environment = results["environment"]
    figure.suptitle(f"x @ w, x {results['dtype']}; {environment['device']}, jax {environment['jax']}", fontsize=9)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))
    return figure


def _line(axes: Any, rows: Sequence[Mapping[str, Any]], kind: str, label: str, **style: Any) -> None:
    points = sorted((r["m"], r["us"]) for r in rows if r["kind"] == kind)
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)
