"""Whether a product gives the same bits every time.

python -m benchmarks.bitwise [--runs 100]

Runs each case many times over and counts the runs whose result differs in any bit from the first. Prints JSON; fails
if one does. Shapes are large enough for k to be split over CTAs, whose sums meet in an order that must not change.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jax_qgemm as qg
from benchmarks import harness

FORMATS = "int4,int4:32,int4:-1,int8:-1,q4_0,q4_k,q6_k,q8_0,mxfp4"
SHAPES = "4096x4096,4096x14336,1000x4096"
M = "1,8,16,33,64"


@jax.jit
def _differs(a: jax.Array, b: jax.Array) -> jax.Array:
    width = {2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
    bits_a, bits_b = (lax.bitcast_convert_type(out, width) for out in (a, b))
    return jnp.any(bits_a != bits_b).astype(jnp.int32)


def differing_runs(x: jax.Array, w: qg.QTensor, runs: int) -> int:
    """How many of `runs` products differ from the first in any bit; NaN equals the same NaN."""
    product = jax.jit(qg.matmul)
    first = product(x, w)
    if not bool(jnp.all(jnp.isfinite(first.astype(jnp.float32)))):
        raise ValueError("the product is not finite, so that equal bits would say nothing")
    found = jnp.int32(0)
    for _ in range(runs - 1):
        found += _differs(product(x, w), first)
    return int(found)


def check(formats: str, shapes: str, m_values: str, dtype: str, runs: int) -> dict[str, Any]:
    cases, different = 0, []
    for n, k in harness.parse_shapes(shapes, {}):
        for text in formats.split(","):
            w = harness.random_weight(harness.parse_format(text), k, n, cases)
            for m in map(int, m_values.split(",")):
                count = differing_runs(harness.random_x(m, k, dtype, seed=cases), w, runs)
                cases += 1
                if count:
                    different.append({"format": text, "m": m, "n": n, "k": k, "differing_runs": count})
                    print(different[-1], file=sys.stderr, flush=True)
    return {"cases": cases, "runs": runs, "different": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--m", default=M)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--runs", type=int, default=100)
    args = parser.parse_args()
    found = check(args.formats, args.shapes, args.m, args.dtype, args.runs)
    print(json.dumps(found))
    sys.exit(bool(found["different"]))


if __name__ == "__main__":
    main()
