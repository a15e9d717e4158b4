"""Times of matmul by format, shape and m, beside XLA's dense dot, XLA's int4 and a plain read of the same bytes.

python -m benchmarks.matmul [--formats int4,q4_0,int4:-1/int8] [--shapes 4096x4096|decode|untuned] [--m 1,8,64|all]
                            [--baseline-m 1,8,64|none] [--baselines dense,int4] [--dtype float16] [--idle SECONDS]
                            [--name matmul] [--plot PICTURE]

Prints a line a measurement and writes benchmarks/results/<device>-<name>.json after every shape. Shapes are n x k,
times microseconds. `floor` is a plain read of the bytes that the weight has in a checkpoint, `read` one of the bytes
that the kernel reads, both measured in this run (benchmarks/timing.py says how). Behind the slash of a format stands
how x is quantized, which is timed too. --idle adds the time after a rest of the GPU, cool, to that under load.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import harness, timing

FORMATS = "int4,q4_0,q4_k,q6_k,q8_0,mxfp4"
SHAPES = {
    "decode": "4096x4096,6144x4096,12288x4096,4096x14336,28672x4096",
    "untuned": "5120x13824,3584x18944,640x2048,1000x4096,32000x4096,151936x896",
}
BASELINES = ("dense", "int4")
XLA_INT4_GROUP = 128
XLA_INT4_BITS = 4 + 16 / XLA_INT4_GROUP


@functools.partial(jax.jit, static_argnames=("k", "n", "dtype"))
def _dense(k: int, n: int, dtype: str, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed, impl="rbg"), (k, n), dtype)


@functools.partial(jax.jit, static_argnames=("k", "n", "dtype"))
def _grouped(k: int, n: int, dtype: str, seed: int) -> tuple[jax.Array, jax.Array]:
    groups = k // XLA_INT4_GROUP
    codes = jax.random.bits(jax.random.key(seed, impl="rbg"), (groups, XLA_INT4_GROUP, n), jnp.uint8)
    scales = jax.random.uniform(jax.random.key(seed), (groups, 1, n), dtype)
    return ((codes & 15).astype(jnp.int8) - 8).astype(jnp.int4), scales


def _dequantize_and_dot(x: jax.Array, w: tuple[jax.Array, jax.Array]) -> jax.Array:
    codes, scales = w
    return lax.dot(x, (codes.astype(x.dtype) * scales).reshape(-1, codes.shape[-1]))


class Baselines:
    """XLA's own products of one shape that `names` asks for: dense, and int4 in groups of 128, dequantized in the
    graph."""

    def __init__(self, n: int, k: int, x_dtype: str, names: Sequence[str]):
        self.n, self.k, self.names = n, k, names
        # In bfloat16 for x of 16 bits, whichever they are: XLA is as fast with both.
        self.dtype = "float32" if x_dtype == "float32" else "bfloat16"
        self.dense = f"xla_{'f32' if x_dtype == 'float32' else 'bf16'}"

    def bytes(self) -> dict[str, int]:
        elements = self.n * self.k
        sizes = {self.dense: elements * jnp.dtype(self.dtype).itemsize} if "dense" in self.names else {}
        if self.k % XLA_INT4_GROUP == 0 and "int4" in self.names:
            sizes["xla_int4"] = round(elements * XLA_INT4_BITS / 8)
        return sizes

    def times(self, m_values: Sequence[int], idle: float) -> dict[tuple[str, int], dict[str, Any]]:
        makers = {self.dense: (_dense, jnp.matmul), "xla_int4": (_grouped, _dequantize_and_dot)}
        times = {}
        for kind in self.bytes():
            make, product = makers[kind]
            weights = timing.rotate(functools.partial(make, self.k, self.n, self.dtype))
            for m in m_values:
                x = harness.random_x(m, self.k, self.dtype)
                times[kind, m] = _measured(timing.lower_products(product, x, weights).compile(), idle)
        return times


def _measured(run: timing.Run, idle: float) -> dict[str, Any]:
    """What a row says of a time: under load, and if `idle` also cool."""
    row = timing.measure(run).row()
    if idle:
        cool = timing.measure(run, repeats=5, idle=idle)
        row |= {"cool_us": cool.seconds * 1e6, "cool_spread": round(cool.spread, 4)}
    return row


def measure_shape(
    n: int,
    k: int,
    kinds: Sequence[str],
    m_values: Sequence[int],
    baseline_m: Sequence[int],
    dtype: str,
    baselines: Sequence[str] = BASELINES,
    idle: float = 0.0,
) -> list[dict[str, Any]]:
    """Rows of one shape: kind, n, k, m, us, spread, bytes, read_us, floor_us; with `idle` also cool_us, cool_spread."""
    products = {text: harness.parse_kind(text) for text in kinds}
    products = {text: (format, product) for text, (format, product) in products.items() if k % format.block == 0}
    xla = Baselines(n, k, dtype, baselines)
    runs: dict[tuple[str, int], timing.Run] = {}
    read = xla.bytes() if baseline_m else {}
    for text, (format, product) in products.items():
        weights = timing.rotate(functools.partial(harness.random_weight, format, k, n))
        read[text] = weights[0].nbytes
        runs |= {(text, m): timing.lower_products(product, harness.random_x(m, k, dtype), weights) for m in m_values}
    stored = read | {text: round(n * k * harness.bits_per_weight(format) / 8) for text, (format, _) in products.items()}
    compiled = dict(zip(runs, timing.compile_all(runs.values()), strict=True))
    times = {key: _measured(run, idle) for key, run in compiled.items()} | xla.times(baseline_m, idle)
    runs.clear()
    compiled.clear()
    reads = timing.time_reads({*read.values(), *stored.values()})
    return [
        {"kind": kind, "n": n, "k": k, "m": m}
        | times[kind, m]
        | {"bytes": read[kind], "read_us": reads[read[kind]][0] * 1e6, "read_by": reads[read[kind]][1]}
        | {"floor_us": reads[stored[kind]][0] * 1e6}
        for kind, m in sorted(times, key=lambda key: (key[1], list(read).index(key[0])))
    ]


def line(row: dict[str, Any]) -> str:
    text = (
        f"{row['n']:6} x {row['k']:<6} m={row['m']:<4} {row['kind']:10} {row['us']:9.2f} us +-{row['spread']:4.0%}"
        f"  {row['us'] / row['read_us']:6.2f} x read {row['read_us']:8.2f}  {row['us'] / row['floor_us']:6.2f} x floor"
    )
    if "cool_us" in row:
        text += f"  cool {row['cool_us']:9.2f} us +-{row['cool_spread']:4.0%}"
    return text + harness.remarks(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--shapes", default="decode", help=f"n x k, or one of {', '.join(SHAPES)}")
    parser.add_argument("--m", default="1,2,4,8,16,32,64", help="or all: 1 to 64")
    parser.add_argument("--baseline-m", default="1,8,16,64", help="the m of XLA's products, or none")
    parser.add_argument("--baselines", default=",".join(BASELINES), help="which of XLA's products")
    parser.add_argument("--idle", type=float, default=0.0, metavar="SECONDS", help="of rest before each cool sample")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--name", default="matmul", help="of the result file")
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="also draw it, as SVG or PNG")
    args = parser.parse_args()
    m_values = list(range(1, 65)) if args.m == "all" else [int(m) for m in args.m.split(",")]
    baselines = args.baselines.split(",")
    if not set(baselines) <= set(BASELINES):
        parser.error(f"--baselines: expected some of {', '.join(BASELINES)}, got {args.baselines}")
    baseline_m = [] if args.baseline_m == "none" else [int(m) for m in args.baseline_m.split(",")]

    start = time.perf_counter()
    results: dict[str, Any] = {"dtype": args.dtype, "idle": args.idle}
    results |= {"read_bandwidth": timing.read_bandwidth(), "rows": []}
    print(f"a read of 1 GiB: {results['read_bandwidth'] / 1e12:.2f} TB/s", flush=True)
    path = harness.results_path(args.name)
    for n, k in harness.parse_shapes(args.shapes, SHAPES):
        rows = measure_shape(n, k, args.formats.split(","), m_values, baseline_m, args.dtype, baselines, args.idle)
        print("\n".join(map(line, rows)))
        print(f"{n} x {k} done at {time.perf_counter() - start:.0f} s", flush=True)
        results["rows"] += rows
        path = harness.write_results(args.name, results)
    print(f"wrote {path}")
    if args.plot:
        from benchmarks import plot  # needs the bench extra

        plot.draw_file(path, args.plot)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    main()
