"""Products of every format in three shapes, the last with its derivative and a lookup, and of quantized x: what
compute-sanitizer runs on.

XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool memcheck --error-exitcode 1 \\
    python -m benchmarks.sanitizer_sample

With the platform's allocator every array is an allocation of its own, so that an access beyond one is seen; JAX's
own allocator would put them all into one.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

import jax_qgemm as qg
from benchmarks.harness import parse_format, parse_kind, random_weight, random_x
from jax_qgemm.formats import FORMAT_NAMES

# m, n, blocks of k, type of x: tails in every direction, all three operand types.
CASES = ((1, 33, 3, "float16"), (9, 16, 1, "bfloat16"), (65, 127, 5, "float32"))
INTEGERS = "int4:32,int4:-1,int4:128:asymmetric,int8:-1,int8:32"
# Enough of k to be split, and m at the edges of what the decode kernels take.
LONG_K = ((1, 64, 4096), (8, 48, 4096), (16, 64, 4096), (33, 128, 2048), (64, 64, 4096))
LONG_K_FORMATS = "int4,q4_k"
# Rows of x for the kernels of large products.
MANY_ROWS = ((70, 512, 1024), (300, 1056, 1024))
MANY_ROWS_FORMATS = "int4,int8:-1,q4_k,q6_k,q8_0,iq4_xs"
# Quantized x: any number of rows, and tails of n and k.
CODES = ((1, 64, 1024), (65, 200, 1088), (300, 1056, 1024))
CODES_KINDS = "int4:64:asymmetric/int8,int4:-1/int8,int8:64/int8,int8:-1/int8,int4:64/fp8,int4:-1:asymmetric/fp8"


def products(limit: int | None) -> int:
    """Runs the first `limit` cases; returns how many ran."""
    count = 0
    cases = [
        (text, m, n, blocks * format.block, dtype)
        for text in (*FORMAT_NAMES, *INTEGERS.split(","))
        for format in [parse_format(text)]
        for m, n, blocks, dtype in CASES
    ]
    cases += [(text, m, n, k, "float16") for text in LONG_K_FORMATS.split(",") for m, n, k in LONG_K]
    cases += [(text, m, n, k, "bfloat16") for text in MANY_ROWS_FORMATS.split(",") for m, n, k in MANY_ROWS]
    cases += [(text, m, n, k, "bfloat16") for text in CODES_KINDS.split(",") for m, n, k in CODES]
    for text, m, n, k, dtype in cases[:limit]:
        format, product = parse_kind(text)
        with jax.default_device(jax.devices("cpu")[0]):  # compiling under the sanitizer takes seconds
            operands = random_x(m, k, dtype, seed=count), random_weight(format, k, n, count)
        x, w = jax.device_put(operands, jax.devices()[0])
        if (m, n) == CASES[-1][:2]:
            y, pull = jax.vjp(lambda x, w=w: qg.matmul(x, w), x)
            jax.block_until_ready((y, pull(y), qg.take(w, jnp.arange(n))))
        else:
            jax.block_until_ready(product(x, w))
        count += 1
        print(f"{count} {text} m={m} n={n} k={k} {dtype}", flush=True)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="run the first so many cases only")
    print(f"{products(parser.parse_args().limit)} cases")


if __name__ == "__main__":
    main()
