"""Everything that has to be shown on a GPU, by one command: the GPU tests, compute-sanitizer, and the demo.

python -m benchmarks.verify [--skip-demo]

Writes benchmarks/results/<device>-verify.json. Fails if a test fails or the sanitizer finds an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks import harness

ROOT = Path(__file__).parent.parent


def run(command: list[str], **environment: str) -> tuple[int, str, float]:
    """Exit status, output and seconds; the output is shown as it comes."""
    print("$", " ".join(command), flush=True)
    start = time.perf_counter()
    lines = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines), time.perf_counter() - start


def gpu_tests() -> dict[str, float | int]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}"]
        # Most of the time goes into compiling small functions: several processes share the GPU.
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        status, _, seconds = run(command, XLA_PYTHON_CLIENT_PREALLOCATE="false")
        suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        raise RuntimeError("pytest wrote no report")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {"exit_status": status, "seconds": round(seconds, 1), **counts}


def memcheck() -> dict[str, float | int]:
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1"]
    status, output, seconds = run([*command, sys.executable, "-m", "benchmarks.memcheck_sample"])
    errors = re.search(r"ERROR SUMMARY: (\d+) error", output)
    cases = re.search(r"^(\d+) cases", output, re.MULTILINE)
    if errors is None or cases is None:
        raise RuntimeError("compute-sanitizer did not finish")
    return {
        "exit_status": status,
        "seconds": round(seconds, 1),
        "cases": int(cases[1]),
        "errors": int(errors[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-demo", action="store_true", help="the demo's model is not installed")
    args = parser.parse_args()
    results = {"gpu_tests": gpu_tests(), "memcheck": memcheck()}
    print(f"wrote {harness.write_results('verify', results)}")
    failed = any(r["exit_status"] for r in results.values())
    if not args.skip_demo:
        failed |= run([sys.executable, "-m", "benchmarks.demo"])[0] != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
