"""Products of every format in three shapes, with their derivatives: what compute-sanitizer is run on.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.memcheck_sample
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import jax_qgemm as qg
from benchmarks.harness import random_weight
from jax_qgemm.formats import FORMAT_NAMES, get_format

# m, n, blocks of k, type of x: tails in every direction, both kernel shapes, all three operand types.
CASES = ((1, 33, 3, "float16"), (9, 16, 1, "bfloat16"), (65, 127, 5, "float32"))


def main() -> None:
    count = 0
    for name in FORMAT_NAMES:
        format = get_format(name)
        for m, n, blocks, dtype in CASES:
            w = random_weight(format, blocks * format.block, n, seed=count)
            x = jax.random.normal(jax.random.key(count), (m, blocks * format.block), dtype)
            y, pull = jax.vjp(lambda x, w=w: qg.matmul(x, w), x)
            (dx,) = pull(y)
            rows = qg.take(w, jnp.arange(n))
            jax.block_until_ready((y, dx, rows))
            count += 1
    print(f"{count} cases")


if __name__ == "__main__":
    main()
