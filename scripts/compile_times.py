"""Report how long the CUDA sources took to compile, from the log that Ninja keeps.

usage: compile_times.py BUILD_DIR [--limit-s N]

The time is wall clock: the union of the intervals in which at least one .cu file was being compiled.
Exits with 1 where it exceeds the limit, and where no .cu file was compiled.
"""

import argparse
import sys
from pathlib import Path


def cuda_intervals(log: str) -> dict[str, tuple[int, int]]:
    """(start, end) in ms of the last compilation of each .cu object in a .ninja_log."""
    intervals = {}
    for line in log.splitlines()[1:]:
        start, end, _, output, _ = line.split("\t")
        if output.endswith(".cu.o"):
            intervals[output] = int(start), int(end)
    return intervals


def union_length(intervals: list[tuple[int, int]]) -> int:
    total = reached = 0
    for start, end in sorted(intervals):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description="Report how long the CUDA sources took to compile.")
    parser.add_argument("build_dir", type=Path)
    parser.add_argument("--limit-s", type=float, default=float("inf"))
    args = parser.parse_args()

    intervals = cuda_intervals((args.build_dir / ".ninja_log").read_text())
    if not intervals:
        print(f"no CUDA source was compiled in {args.build_dir}")
        return 1
    slowest = sorted(intervals.items(), key=lambda item: item[1][0] - item[1][1])
    for output, (start, end) in slowest[:5]:
        print(f"{(end - start) / 1e3:7.1f} s  {output}")
    seconds = union_length(list(intervals.values())) / 1e3
    print(f"{seconds:7.1f} s  CUDA part, {len(intervals)} files (limit {args.limit_s:g} s)", flush=True)
    return int(seconds > args.limit_s)


if __name__ == "__main__":
    sys.exit(main())
