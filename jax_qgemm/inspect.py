"""`python -m jax_qgemm.inspect PATH`: what a checkpoint contains, and which known traps are in it."""

from __future__ import annotations

import argparse
import sys

from jax_qgemm import io
from jax_qgemm.io.errors import shorten

_DESCRIPTION = "What a checkpoint contains, and which known traps are in it. Exits with 1 where it can't be loaded."


def main(arguments: list[str] | None = None) -> int:
    """Prints a report; returns 1 where the checkpoint can't be loaded as it is, 2 where it can't be read, else 0."""
    parser = argparse.ArgumentParser(prog="python -m jax_qgemm.inspect", description=_DESCRIPTION)
    parser.add_argument("path", help="a GGUF file, or a directory with config.json and safetensors")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    options = parser.parse_args(arguments)
    try:
        report = io.inspect(options.path)
    except (io.FormatError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.tensors:
        for tensor in report.tensors:
            name = tensor.name if tensor.name.isprintable() else shorten(tensor.name)
            print(f"{name}  {tensor.format}  {tensor.shape}  {tensor.nbytes:,} bytes")
        print()
    print(report)
    return 0 if report.loadable else 1


if __name__ == "__main__":
    sys.exit(main())
