"""Everything that has to be shown on a GPU, by one command, step by step.

python -m benchmarks.verify [--steps tests,memcheck,racecheck,initcheck,bitwise,ncu,demo] [--limit-s 300]

tests      the tests marked gpu
memcheck   compute-sanitizer over benchmarks/sanitizer_sample.py: accesses out of bounds or misaligned
racecheck  the same for hazards in shared memory
initcheck  the same for reads of device memory that nothing wrote
bitwise    100 runs of each of many products, equal to the bit (benchmarks/bitwise.py)
ncu        hardware counters of three products (benchmarks/ncu.py)
demo       the Gemma 3 example (benchmarks/demo.py), which needs the demo extra

Writes benchmarks/results/<device>-verify.json after each step; steps of earlier runs at the same commit stay in it. A
step that takes longer than its limit is stopped and counts as failed. Fails if a step fails; where ncu may not read the
counters, the reason is its result, and no failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness

Result = dict[str, Any]
TIMED_OUT = "timed out"
_SANITIZER_SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "initcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazard"),
}


def run(command: list[str], limit_s: float, **environment: str) -> tuple[int | str, str, float]:
    """Exit status (or TIMED_OUT), output and seconds; the output is shown as it comes."""
    print("$", " ".join(command), flush=True)
    start = time.perf_counter()
    lines: list[str] = []
    timed_out = threading.Event()
    with subprocess.Popen(
        command,
        cwd=harness.ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        start_new_session=True,  # so that what it started is stopped with it
    ) as process:

        def stop() -> None:
            timed_out.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit_s, stop)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        status = process.wait()
        timer.cancel()
    return TIMED_OUT if timed_out.is_set() else status, "".join(lines), round(time.perf_counter() - start, 1)


def gpu_tests(limit_s: float) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}"]
        # Most of the time goes into compiling small functions: several processes share the GPU.
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        status, _, seconds = run(command, limit_s)
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    names = ("tests", "failures", "errors", "skipped")
    counts = {} if suite is None else {name: int(suite.get(name, 0)) for name in names}
    return {"exit_status": status, "seconds": seconds, **counts}


def parse_sanitizer(tool: str, output: str) -> Result:
    """Cases that ran and errors that were found, each None where the output does not say."""
    errors = _SANITIZER_SUMMARY[tool].search(output)
    cases = re.search(r"^(\d+) cases$", output, re.MULTILINE)
    return {"cases": int(cases[1]) if cases else None, "errors": int(errors[1]) if errors else None}


def sanitizer(tool: str) -> Callable[[float], Result]:
    def step(limit_s: float) -> Result:
        if shutil.which("compute-sanitizer") is None:
            return {"exit_status": "compute-sanitizer is not on the PATH"}
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        command += [sys.executable, "-u", "-m", "benchmarks.sanitizer_sample"]
        # An array is an allocation of its own, so that the tool knows where it ends.
        status, output, seconds = run(command, limit_s, XLA_PYTHON_CLIENT_ALLOCATOR="platform")
        found = parse_sanitizer(tool, output)
        if status == 0 and (found["errors"] != 0 or not found["cases"]):
            status = "no summary without errors"
        return {"exit_status": status, "seconds": seconds} | found

    return step


def json_step(module: str) -> Callable[[float], Result]:
    """A script that prints its results as JSON in its last line."""

    def step(limit_s: float) -> Result:
        status, output, seconds = run([sys.executable, "-m", module], limit_s)
        found = {}
        for line in output.splitlines()[-1:]:
            if line.startswith("{"):
                found = json.loads(line)
        return {"exit_status": status, "seconds": seconds} | found

    return step


def demo(limit_s: float) -> Result:
    status, _, seconds = run([sys.executable, "-m", "benchmarks.demo"], limit_s)
    return {"exit_status": status, "seconds": seconds}


# Step -> (function, limit in seconds).
STEPS: dict[str, tuple[Callable[[float], Result], float]] = {
    "tests": (gpu_tests, 480),
    "memcheck": (sanitizer("memcheck"), 400),
    "racecheck": (sanitizer("racecheck"), 540),
    "initcheck": (sanitizer("initcheck"), 400),
    "bitwise": (json_step("benchmarks.bitwise"), 180),
    "ncu": (json_step("benchmarks.ncu"), 240),
    "demo": (demo, 300),
}


def earlier() -> dict[str, Result]:
    """Steps in the result file, if it was written at this commit."""
    path = harness.results_path("verify")
    if not path.exists():
        return {}
    results = json.loads(path.read_text())
    return results["steps"] if results["environment"]["commit"] == harness.commit() and "steps" in results else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--limit-s", type=float, help="of each step, instead of its own")
    args = parser.parse_args()
    names = args.steps.split(",")
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        parser.error(f"unknown step {unknown[0]}; steps are {', '.join(STEPS)}")
    # This process asks the GPU for its name only, and leaves its memory to the steps.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    results = earlier()
    for name in names:
        function, limit_s = STEPS[name]
        print(f"=== {name}", flush=True)
        results[name] = function(args.limit_s or limit_s)
        path = harness.write_results("verify", {"steps": results})
        print(f"=== {name}: {json.dumps(results[name])[:2000]}\nwrote {path}", flush=True)
    sys.exit(any(results[name]["exit_status"] != 0 for name in names))


if __name__ == "__main__":
    main()
