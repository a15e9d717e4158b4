"""What one small product costs in a chain: 64 dependent products of 512 x 512 inside one jitted function.

python -m benchmarks.chain [--formats int4,q4_0] [--m 1,8,16] [--dtype float16] [--length 64] [--size 512]

Prints microseconds a product and writes benchmarks/results/<device>-chain.json. XLA's bfloat16 dot runs in the same
chain. `ordered` are products that do not depend on each other but follow one another as in benchmarks/timing.py: were
they much faster than the chain, XLA would have run several at once, and those times would be no product's.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jax_qgemm as qg
from benchmarks import harness, timing


def lower_chain(product: Callable[[Any, Any], Any], x: Any, weights: Sequence[Any]) -> timing.Run:
    """x @ w[0] @ w[1] @ ... with square weights."""
    product = jax.jit(product)
    return timing.lower(lambda x, weights: functools.reduce(product, weights, x), x, weights, count=len(weights))


def measure(kind: str, m: int, dtype: str, length: int, size: int) -> dict[str, Any]:
    if kind == "xla_bf16":
        dtype, product = "bfloat16", jnp.matmul
        keys = jax.random.split(jax.random.key(0), length)
        weights = [jax.random.normal(key, (size, size), dtype) * size**-0.5 for key in keys]
    else:
        product = qg.matmul
        format = harness.parse_format(kind)
        weights = [harness.random_weight(format, size, size, i) for i in range(length)]
    # Small, for a chain of random weights grows.
    x = harness.random_x(m, size, dtype) * 1e-3
    chain = timing.measure(lower_chain(product, x, weights).compile(), repeats=15)
    ordered = timing.measure(timing.lower_products(product, x, weights).compile(), repeats=15)
    return {"kind": kind, "m": m} | chain.row() | {"ordered_us": ordered.seconds * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="int4,q4_0")
    parser.add_argument("--m", default="1,8,16")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--size", type=int, default=512)
    args = parser.parse_args()
    rows = []
    for m in map(int, args.m.split(",")):
        for kind in (*args.formats.split(","), "xla_bf16"):
            row = measure(kind, m, args.dtype, args.length, args.size)
            rows.append(row)
            text = f"m={m:<3} {kind:9} {row['us']:6.2f} us +-{row['spread']:4.0%}, {row['ordered_us']:6.2f} ordered"
            print(text, row.get("ops", ""), "HOST-BOUND" if row.get("host_bound") else "", flush=True)
    results = {"dtype": args.dtype, "length": args.length, "size": args.size, "rows": rows}
    print(f"wrote {harness.write_results('chain', results)}")


if __name__ == "__main__":
    main()
