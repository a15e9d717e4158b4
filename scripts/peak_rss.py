"""Run a command and report its peak resident memory.

usage: peak_rss.py [--limit-mb N] COMMAND...

The figure is the largest of the command and the processes it waited for, in MB (10^6 bytes). The exit
status is the command's, or 1 where it succeeded with more than the limit.
"""

import argparse
import resource
import subprocess
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a command and report its peak resident memory.")
    parser.add_argument("--limit-mb", type=float, default=float("inf"))
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if not args.command:
        parser.error("no command given")

    status = subprocess.run(args.command, check=False).returncode
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6  # Linux counts in KiB
    print(f"peak RSS {peak_mb:.0f} MB (limit {args.limit_mb:g} MB)", flush=True)
    return status or int(not peak_mb <= args.limit_mb)


if __name__ == "__main__":
    sys.exit(main())
