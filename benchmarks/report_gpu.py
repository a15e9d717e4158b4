"""The tables of figures that only a GPU gives: products, chains, decoding, checks and hardware counters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.markdown import markdown, source

Results = dict[str, Any]
Cells = dict[tuple[int, int, int], dict[str, dict[str, Any]]]


def _cells(results: Mapping[str, Any]) -> Cells:
    """(n, k, m) -> kind -> row, in the order of the file."""
    cells: Cells = {}
    for row in results["rows"]:
        cells.setdefault((row["n"], row["k"], row["m"]), {})[row["kind"]] = row
    return cells


def _note(results: Mapping[str, Any]) -> str:
    """What a reader has to know of the rows, after the source."""
    note = (
        f"\nx {results['dtype']}; a read of 1 GiB reached {results['read_bandwidth'] / 1e12:.2f} TB/s in the same run."
    )
    bound = [f"{r['kind']} {r['n']} x {r['k']} m = {r['m']}" for r in results["rows"] if r.get("host_bound")]
    return note + (f" Bound by the host, and so an upper limit: {', '.join(bound)}." if bound else "") + "\n"


def int4(results: Results) -> str:
    """int4 against a plain read of its bytes and XLA's two products; microseconds."""
    rows = []
    for (n, k, m), kinds in _cells(results).items():
        if "int4" not in kinds:
            continue
        ours = kinds["int4"]
        cells = [f"{ours['read_us']:.1f}", f"{ours['us']:.1f}", f"{ours['us'] / ours['read_us']:.2f}"]
        for baseline in ("xla_bf16", "xla_int4"):
            us = kinds[baseline]["us"] if baseline in kinds else None
            cells += ["", ""] if us is None else [f"{us:.1f}", f"{us / ours['us']:.1f}"]
        rows.append((f"{n} x {k}", str(m), *cells))
    header = ("n x k", "m", "plain read", "int4", "int4 / read", "XLA bf16", "/ int4", "XLA int4", "/ int4")
    return markdown(header, rows) + source(results) + _note(results)


def formats(results: Results) -> str:
    """Time over a plain read of the bytes that the weight has in its file, by format."""
    names = [k for k in dict.fromkeys(r["kind"] for r in results["rows"]) if not k.startswith("xla_")]
    rows = []
    for (n, k, m), kinds in _cells(results).items():
        ours = [kinds.get(name) for name in names]
        if any(ours):
            cells = (f"{row['us']:.1f} ({row['us'] / row['floor_us']:.2f})" if row else "" for row in ours)
            rows.append((f"{n} x {k}", str(m), *cells))
    return markdown(("n x k", "m", *names), rows) + source(results) + _note(results)


def _against_dense(results: Results, time: str) -> str:
    """Each kind against XLA's product of the dense weight, microseconds; `time` is the field that is compared."""
    kinds = list(dict.fromkeys(r["kind"] for r in results["rows"]))
    names = [k for k in kinds if not k.startswith("xla_")]
    rows = []
    for (n, k, m), of in _cells(results).items():
        us = {kind: row[time] for kind, row in of.items() if time in row}
        dense = us.get("xla_bf16")
        cells = ["" if dense is None else f"{dense:.1f}"]
        for name in names:
            ratio = f" ({dense / us[name]:.2f})" if dense is not None and name in us else ""
            cells.append(f"{us[name]:.1f}{ratio}" if name in us else "")
        rows.append((f"{n} x {k}", str(m), *cells))
    return markdown(("n x k", "m", "XLA bf16", *names), rows) + source(results) + _note(results)


def prefill(results: Results) -> str:
    """Many rows, one run after the other."""
    return _against_dense(results, "us")


def prefill_cool(results: Results) -> str:
    """Many rows, the GPU at rest before each sample."""
    if not results.get("idle"):
        return "Not measured: the results are of a run without `--idle`.\n"
    rest = f"\nThe GPU rested for {results['idle']:g} s before each sample.\n"
    return _against_dense(results, "cool_us") + rest


def quantize(results: Results) -> str:
    """Each format against XLA's operations and a copy of as many bytes."""
    cells: dict[tuple[int, int], dict[str, Results]] = {}
    for row in results["rows"]:
        cells.setdefault((row["m"], row["k"]), {})[row["kind"]] = row
    names = [kind for kind in dict.fromkeys(r["kind"] for r in results["rows"]) if not kind.startswith("xla_")]
    rows = []
    for (m, k), of in cells.items():
        ours = (f"{of[name]['us']:.1f} ({of[name]['copy_us'] / of[name]['us']:.0%})" for name in names)
        xla = (f"{of[f'xla_{name}']['us']:.1f}" for name in names)
        rows.append((f"{m} x {k}", *ours, *xla))
    header = ("m x k", *names, *(f"XLA {name}" for name in names))
    bandwidth = f"\nx {results['dtype']}; a copy reached {results['copy_bandwidth'] / 1e12:.2f} TB/s in the same run.\n"
    return markdown(header, rows) + source(results) + bandwidth


def neighbours(results: Results) -> str:
    """The steepest step between neighbouring m, for each shape and format."""
    times: dict[tuple[int, int, str], dict[int, float]] = {}
    for row in results["rows"]:
        if not row["kind"].startswith("xla_"):
            times.setdefault((row["n"], row["k"], row["kind"]), {})[row["m"]] = row["us"]
    rows = []
    for (n, k, kind), by_m in times.items():
        steps = [(by_m[b] / by_m[a], a, b) for a, b in itertools.pairwise(sorted(by_m)) if b == a + 1]
        if steps:
            ratio, a, b = max(steps)
            rows.append((f"{n} x {k}", kind, f"{min(by_m)} to {max(by_m)}", f"{ratio:.2f}", f"{a} to {b}"))
    return markdown(("n x k", "format", "m", "largest time(m + 1) / time(m)", "at"), rows) + source(results)


def chain(results: Results) -> str:
    by_m: dict[int, dict[str, float]] = {}
    for row in results["rows"]:
        by_m.setdefault(row["m"], {})[row["kind"]] = row["us"]
    kinds = list(dict.fromkeys(row["kind"] for row in results["rows"]))
    rows = ((str(m), *(f"{times[kind]:.2f}" for kind in kinds)) for m, times in by_m.items())
    size = results["size"]
    what = f"\nMicroseconds a product: {results['length']} of {size} x {size}, each of the result before it.\n"
    return markdown(("m", *(kind.replace("xla_", "XLA ") for kind in kinds)), rows) + what + source(results)


def gemma_decode(results: Results) -> str:
    """Where a token's time goes."""
    row, trace = results["row"], results["trace"]
    text = f"{row['decode_tokens_per_s']:.0f} tokens/s with {row['dtype']} activations, {results['model']}.\n"
    if trace is None:
        return text + source(results)
    tokens = trace["tokens"]
    groups = (
        (name, f"{group['share']:.1%}", f"{group['us'] / tokens:.1f}", f"{group['events'] / tokens:.1f}")
        for name, group in trace["groups"].items()
    )
    kernels = (
        (f"`{kernel['name']}`", kernel["group"], f"{kernel['us'] / tokens:.2f}", f"{kernel['events'] / tokens:.1f}")
        for kernel in trace["kernels"][:10]
    )
    graphs = "in CUDA graphs" if trace["in_cuda_graphs"] else "outside CUDA graphs, so with longer gaps than otherwise"
    return (
        f"{text}Traced {graphs}: {trace['span_us'] / tokens:.0f} µs a token, {trace['not_products']:.0%} of it not "
        "matrix products.\n\n"
        + markdown(("what", "share", "µs a token", "launches a token"), groups)
        + "\n"
        + markdown(("kernel", "what", "µs a token", "launches a token"), kernels)
        + source(results)
    )


def _verdict(name: str, step: Mapping[str, Any]) -> str:
    if name == "tests" and "tests" in step:
        return f"{step['tests']} tests, {step['failures'] + step['errors']} failed, {step['skipped']} skipped"
    if "different" in step:
        return f"{step['cases']} products, {step['runs']} runs each, {len(step['different'])} not equal to the bit"
    if step.get("cases") is not None and "errors" in step:
        return f"{step['cases']} cases, {step['errors']} errors"
    return "passed" if step["exit_status"] == 0 else f"failed: {step['exit_status']}"


def verify(results: Results) -> str:
    steps: Iterable[tuple[str, Mapping[str, Any]]] = results["steps"].items()
    rows = [(name, _verdict(name, step), f"{step.get('seconds', 0):.0f}") for name, step in steps if name != "ncu"]
    return markdown(("step", "result", "seconds"), rows) + source(results)


def ncu(results: Results) -> str:
    """Hardware counters of the kernels that `verify` looked at."""
    step = results["steps"].get("ncu", {"unavailable": "this step has not been run"})
    if "unavailable" in step:
        return f"Not measured: {step['unavailable']}.\n" + source(results)

    def cell(kernel: Mapping[str, Any], name: str, pattern: str) -> str:
        return pattern.format(kernel[name]) if name in kernel else ""

    rows = []
    for case in step["cases"]:
        # The last launch: the first also loads the code.
        for kernel in {k["kernel"]: k for k in case["kernels"]}.values():
            stalls = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in kernel["stalls"].items())
            rows.append((
                f"{case['format']}, {case['n']} x {case['k']}, m = {case['m']}",
                f"`{kernel['kernel'].split('<')[0].split('(')[0].removeprefix('void ')}`",
                cell(kernel, "duration", "{:,.0f}"),
                cell(kernel, "dram_percent", "{:.0f}"),
                cell(kernel, "sm_percent", "{:.0f}"),
                cell(kernel, "occupancy_percent", "{:.0f}"),
                cell(kernel, "registers", "{:.0f}"),
                stalls,
            ))  # fmt: skip
    header = ("product", "kernel", "ns", "DRAM %", "SM %", "occupancy %", "registers", "warps stalled per issue")
    return markdown(header, rows) + source(results)


_FILES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "int4": ("matmul", int4),
    "formats": ("matmul", formats),
    "untuned": ("matmul-untuned", formats),
    "prefill": ("matmul-prefill", prefill),
    "activations": ("activations", prefill),
    "activations-cool": ("activations", prefill_cool),
    "quantize": ("quantize", quantize),
    "bf16": ("matmul-bf16", formats),
    "groups": ("matmul-groups", formats),
    "neighbours": ("matmul-all-m", neighbours),
    "chain": ("chain", chain),
    "gemma-decode": ("gemma-decode", gemma_decode),
    "verify": ("verify", verify),
    "ncu": ("verify", ncu),
}
# Table name -> (result file, writer).
TABLES = {f"h200-{name}": (f"nvidia_h200-{file}.json", writer) for name, (file, writer) in _FILES.items()}
