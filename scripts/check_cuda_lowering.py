"""Check on a machine without a GPU that every op lowers for CUDA.

usage: check_cuda_lowering.py

Imports the CUDA build and exports every op over every weight format for CUDA (`jax.export`). The products
must call the native handlers, and every CUDA handler of the native module must be called by some op.
"""

import functools
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import export
from tqdm import tqdm

import jax_qgemm as qg
from jax_qgemm import _native

K, N = 512, 32  # a multiple of every format's block
M, MANY = 3, 256  # MANY rows go by way of a decoded weight


def loss(x: jax.Array, w: qg.QTensor) -> jax.Array:
    return qg.matmul(x, w).astype(jnp.float32).sum()


def ops() -> Iterator[tuple[str, Callable, tuple]]:
    """(name, function, arguments): each op of the library over each format."""
    kernel = jnp.cos(jnp.arange(K * N, dtype=jnp.float32)).reshape(K, N)
    x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
    for format in qg.formats.FORMAT_NAMES:
        w = qg.quantize(kernel, format)
        yield f"matmul {format}", qg.matmul, (x, w)
        yield f"matmul of many rows {format}", qg.matmul, (jax.ShapeDtypeStruct((MANY, K), jnp.bfloat16), w)
        yield f"gradient of matmul {format}", jax.grad(loss), (x, w)
        yield f"gated_matmul {format}", qg.gated_matmul, (x, w)
        yield f"take {format}", qg.take, (w, jax.ShapeDtypeStruct((M,), jnp.int32))
    for x_format, format in (("int8", "int4"), ("int8", "int8"), ("fp8", "int4")):
        product = functools.partial(qg.matmul, x_format=x_format, kernel="gemm_sm90_a8")
        yield f"matmul of {x_format} with {format}", product, (x, qg.quantize(kernel, format))
    for x_format in ("int8", "fp8", "q8_1"):
        yield f"quantize_activations {x_format}", functools.partial(qg.quantize_activations, format=x_format), (x,)


def main() -> None:
    print(qg.build_info())
    targets = set(_native.registrations()["CUDA"])
    if not targets:
        sys.exit("this build has no CUDA handlers")
    checks = qg.export_safety_checks()

    called = set()
    for name, function, arguments in tqdm(list(ops()), unit="op", disable=not sys.stderr.isatty()):
        exporter = export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)
        module = exporter(*arguments).mlir_module()
        found = {target for target in targets if f"@{target}(" in module}
        if "matmul" in name and not found:
            sys.exit(f"{name}: the module exported for CUDA calls no native handler:\n{module}")
        called |= found
    if missed := sorted(targets - called):
        sys.exit(f"no op lowers to the CUDA handlers {', '.join(missed)}")
    print(f"every op lowers for CUDA; handlers called: {', '.join(sorted(called))}")


if __name__ == "__main__":
    main()
