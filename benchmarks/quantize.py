"""Times of quantize_activations by format and shape, beside XLA's own operations and a plain copy of as many bytes.

python -m benchmarks.quantize [--formats int8,fp8,q8_1] [--m 1,128,512,2048,4096] [--k 4096,14336] [--dtype bfloat16]
                              [--name quantize]

Prints a line a measurement and writes benchmarks/results/<device>-quantize.json after every shape: microseconds, the
bytes that are read and written, and `copy_us`, what an elementwise operation of XLA's takes in this run that reads and
writes as many, half of them each (benchmarks/timing.py says how). `xla_int8` and so on are the jnp code, compiled by
XLA. Inputs are distinct, more than the L2 cache holds unless 320 of them are less.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jax_qgemm as qg
from benchmarks import harness, timing
from jax_qgemm.formats import activations

_LARGE = 1 << 30  # bytes that the copy of `copy_bandwidth` reads and writes


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _random(shape: tuple[int, ...], dtype: str, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, dtype)


def _lower(function: Callable[[jax.Array], Any], xs: Sequence[jax.Array]) -> timing.Run:
    return timing.lower_products(lambda _, x: function(x), jnp.zeros(()), xs)


def copy(x: jax.Array) -> jax.Array:
    """A real copy would be XLA's to place: it may leave out the order in which the others run."""
    return x + 1


def time_copies(sizes: Iterable[int]) -> dict[int, float]:
    """Seconds of a copy that reads and writes so many bytes, half of them each."""
    times = {}
    for size in set(sizes):
        xs = timing.rotate(functools.partial(_random, (size // 8,), "float32"))
        times[size] = timing.measure(_lower(copy, xs).compile()).seconds
    return times


def copy_bandwidth(size: int = _LARGE) -> float:
    """Bytes per second, read and written, of a copy."""
    return size / time_copies([size])[size]


def measure_shape(m: int, k: int, formats: Sequence[str], dtype: str) -> list[dict[str, Any]]:
    """Rows of one shape: kind, m, k, us, spread, bytes, copy_us."""
    xs = timing.rotate(functools.partial(_random, (m, k), dtype))
    functions: dict[str, Callable[[jax.Array], Any]] = {}
    sizes = {}
    for format in formats:
        functions[format] = functools.partial(qg.quantize_activations, format=format)
        functions[f"xla_{format}"] = functools.partial(activations.quantize, format=format)
        parts = jax.tree.leaves(jax.eval_shape(functions[format], xs[0]))
        size = xs[0].nbytes + sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)
        sizes[format] = sizes[f"xla_{format}"] = size
    runs = timing.compile_all(_lower(function, xs) for function in functions.values())
    times = {kind: timing.measure(run) for kind, run in zip(functions, runs, strict=True)}
    copies = time_copies(sizes.values())
    return [
        {"kind": kind, "m": m, "k": k} | times[kind].row() | {"bytes": size, "copy_us": copies[size] * 1e6}
        for kind, size in sizes.items()
    ]


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['m']:6} x {row['k']:<6} {row['kind']:9} {row['us']:9.2f} us +-{row['spread']:4.0%}"
        f"  {row['bytes'] / row['us'] / 1e6:5.2f} TB/s  {row['copy_us'] / row['us']:4.0%} of a copy"
        f"{harness.remarks(row)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="int8,fp8,q8_1")
    parser.add_argument("--m", default="1,128,512,2048,4096")
    parser.add_argument("--k", default="4096,14336")
    parser.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--name", default="quantize", help="of the result file")
    args = parser.parse_args()

    start = time.perf_counter()
    results: dict[str, Any] = {"dtype": args.dtype, "copy_bandwidth": copy_bandwidth(), "rows": []}
    print(f"a copy that reads and writes 1 GiB: {results['copy_bandwidth'] / 1e12:.2f} TB/s", flush=True)
    path = harness.results_path(args.name)
    for k in map(int, args.k.split(",")):
        for m in map(int, args.m.split(",")):
            rows = measure_shape(m, k, args.formats.split(","), args.dtype)
            print("\n".join(map(line, rows)))
            print(f"{m} x {k} done at {time.perf_counter() - start:.0f} s", flush=True)
            results["rows"] += rows
            path = harness.write_results(args.name, results)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
