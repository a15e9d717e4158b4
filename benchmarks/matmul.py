"""Times of matmul by format, shape and m, with XLA's dense dot and int4 dequantize-and-dot in the same run.

python -m benchmarks.matmul [--formats q4_0,int4] [--shapes 4096x4096] [--m 1,8,64] [--dtype bfloat16]

Prints a table and writes benchmarks/results/<device>-matmul.json. Shapes are n x k, times microseconds.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
from jax import lax

import jax_qgemm as qg
from benchmarks import harness
from jax_qgemm.formats import FORMAT_NAMES, get_format

SHAPES = "4096x4096,28672x4096,4096x14336"


# Kinds of baselines, by the type of x.
DENSE = {"bfloat16": "xla_bf16", "float16": "xla_f16", "float32": "xla_f32"}


def xla_dense(n: int, k: int, x: jax.Array) -> float:
    key = jax.random.key(0)
    weights = harness.rotate(lambda i: jax.random.normal(jax.random.fold_in(key, i), (k, n), x.dtype))
    return harness.time_products(jnp.matmul, x, weights)


def xla_int4(n: int, k: int, x: jax.Array) -> float:
    """Groups of 128, dequantized in the graph."""
    key = jax.random.key(1)

    def make(i):
        codes = jax.random.randint(jax.random.fold_in(key, i), (k // 128, 128, n), -8, 8, jnp.int8)
        scales = jax.random.uniform(jax.random.fold_in(key, i), (k // 128, 1, n), x.dtype)
        return codes.astype(jnp.int4), scales

    def product(x, w):
        codes, scales = w
        dense = (codes.astype(x.dtype) * scales).reshape(k, n)
        return lax.dot(x, dense)

    return harness.time_products(product, x, harness.rotate(make))


def rotated_weights(name: str, k: int, n: int) -> list[qg.QTensor]:
    format = get_format(name)
    return harness.rotate(lambda i: harness.random_weight(format, k, n, i))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMAT_NAMES))
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--m", default="1,8,64,512")
    parser.add_argument("--dtype", default="bfloat16", choices=DENSE)
    args = parser.parse_args()

    dense = DENSE[args.dtype]
    bandwidth = harness.read_bandwidth()
    rows = []
    for shape in args.shapes.split(","):
        n, k = map(int, shape.split("x"))
        # One set of weights a format serves every m.
        kinds = {name: rotated_weights(name, k, n) for name in args.formats.split(",")}
        for m in map(int, args.m.split(",")):
            x = jax.random.normal(jax.random.key(2), (m, k), args.dtype)
            times = {dense: xla_dense(n, k, x), "xla_int4": xla_int4(n, k, x)}
            times |= {name: harness.time_products(qg.matmul, x, weights) for name, weights in kinds.items()}
            for name, seconds in times.items():
                if name == dense:
                    stored = float(x.dtype.itemsize) * n * k
                else:
                    bits = 4.125 if name == "xla_int4" else harness.bits_per_weight(get_format(name))
                    stored = bits / 8 * n * k
                floor = stored / bandwidth
                row = {"kind": name, "n": n, "k": k, "m": m, "us": seconds * 1e6, "floor_us": floor * 1e6}
                rows.append(row)
                print(
                    f"{n:6} x {k:<6} m={m:<5} {name:9} {seconds * 1e6:9.1f} us  floor {floor * 1e6:7.1f}",
                    flush=True,
                )
    path = harness.write_results("matmul", {"dtype": args.dtype, "read_bandwidth": bandwidth, "rows": rows})
    print(f"read bandwidth {bandwidth / 1e12:.2f} TB/s; wrote {path}")


if __name__ == "__main__":
    main()
