"""Hardware counters of three representative products, by Nsight Compute.

python -m benchmarks.ncu

Runs each case under `ncu` and prints JSON: for every kernel of jax_qgemm the duration, the throughput of memory and
of the multiprocessors in percent of their peaks, the achieved occupancy, registers, and the reasons why warps waited.
The card's clocks are left alone and its caches flushed before each kernel.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import ROOT

# Format, m, n, k.
CASES = (("int4", 1, 28672, 4096), ("q4_k", 8, 4096, 14336), ("int4", 32, 28672, 4096))
# ncu's name -> ours. A metric that a version of ncu does not report is left out.
METRICS = {
    "gpu__time_duration.sum": "duration",
    "dram__bytes_read.sum": "dram_read",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "ctas",
    "launch__block_size": "threads",
    "launch__shared_mem_per_block_dynamic": "shared_memory",
}
_SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats")
_STALL = re.compile(r"^smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active)?\.ratio$")
_TOP_STALLS = 5
LIMIT_S = 120


def command(text: str, m: int, n: int, k: int) -> list[str]:
    options = ["--clock-control", "none", "--kernel-name-base", "demangled", "--kernel-name", "regex:jax_qgemm"]
    sections = [word for section in _SECTIONS for word in ("--section", section)]
    program = [sys.executable, "-m", "benchmarks.ncu", "--product", text, str(m), str(n), str(k)]
    metrics = ["--metrics", ",".join(METRICS)]
    return ["ncu", "--csv", "--page", "raw", "--print-units", "base", *options, *sections, *metrics, *program]


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def parse(output: str) -> list[dict[str, Any]]:
    """Kernels of ncu's raw CSV page: a line of names, one of units, then one for each kernel."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    table = [row for row in csv.reader(io.StringIO("\n".join(lines[start:]))) if row]
    header, units, *rows = (row for row in table if len(row) == len(table[0]))
    kernels = []
    for row in rows:
        kernel: dict[str, Any] = {"kernel": row[header.index("Kernel Name")]}
        stalls: dict[str, float] = {}
        for name, unit, text in zip(header, units, row, strict=True):
            value = _number(text)
            if value is None:
                continue
            if name in METRICS:
                kernel[METRICS[name]] = value
                if unit and unit != "%":
                    kernel[f"{METRICS[name]}_unit"] = unit
            elif (match := _STALL.match(name)) and not match[1].endswith("not_issued") and match[1] != "selected":
                stalls[match[1]] = value
        kernel["stalls"] = dict(sorted(stalls.items(), key=lambda item: -item[1])[:_TOP_STALLS])
        kernels.append(kernel)
    return kernels


def why_not(output: str) -> str:
    """What ncu says where it measured nothing."""
    if "ERR_NVGPUCTRPERM" in output:
        return "ERR_NVGPUCTRPERM: this user may not read the GPU's performance counters"
    errors = [line.strip() for line in output.splitlines() if "==ERROR==" in line or "Failed to" in line]
    return errors[0] if errors else "ncu found no kernel of jax_qgemm"


def profile(cases: Sequence[tuple[str, int, int, int]] = CASES) -> dict[str, Any]:
    """`cases`, each with its kernels; or `unavailable`, with the reason, where ncu can measure nothing."""
    if shutil.which("ncu") is None:
        return {"unavailable": "ncu is not on the PATH"}
    results = []
    for text, m, n, k in cases:
        try:
            done = subprocess.run(
                command(text, m, n, k),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"unavailable": f"ncu took more than {LIMIT_S} s", "cases": results}
        kernels = parse(done.stdout)
        if not kernels:
            print(done.stdout[-2000:], file=sys.stderr)
            return {"unavailable": why_not(done.stdout), "cases": results}
        results.append({"format": text, "m": m, "n": n, "k": k, "kernels": kernels})
    return {"cases": results}


def run_product(text: str, m: int, n: int, k: int) -> None:
    """What ncu looks at: one product, the second with its weight, so that the first has loaded the code."""
    import jax

    import jax_qgemm as qg
    from benchmarks import harness

    w = harness.random_weight(harness.parse_format(text), k, n, 0)
    product = jax.jit(qg.matmul)
    for seed in range(2):
        jax.block_until_ready(product(harness.random_x(m, k, "float16", seed), w))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--product", nargs=4, metavar=("FORMAT", "M", "N", "K"), help="run this product and no ncu")
    args = parser.parse_args()
    if args.product:
        run_product(args.product[0], *map(int, args.product[1:]))
        return
    print(json.dumps(profile()))


if __name__ == "__main__":
    main()
