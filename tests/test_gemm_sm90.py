"""gemm_sm90 on a Hopper GPU, against float64. On the CPU its code is emulated: tests/test_gemm_sm90_emulated.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, random_weight

import jax_qgemm as qg
from jax_qgemm.formats import IntFormat
from jax_qgemm.testing import check_product, product_limit

SERVED = [f for f in FORMATS if not (isinstance(f, IntFormat) and (f.group == 16 or f.scale_dtype == "float32"))]
# m, n, k (or the next multiple of a block), no larger than the pool of cases.random_weight(): every tile of the kernel.
SHAPES = (
    (33, 48, 512),
    (65, 200, 1024),
    (129, 1056, 1280),
    (700, 333, 768),
    (2100, 1056, 512),
    (2600, 1056, 512),
    (4200, 1024, 512),
)
matmul = jax.jit(functools.partial(qg.matmul, kernel="gemm_sm90"), static_argnames=("activation", "out_dtype"))


def needs_hopper() -> None:
    device = jax.devices()[0]
    if getattr(device, "compute_capability", "") != "9.0":
        pytest.skip(f"needs a GPU of compute capability 9.0, found {device.device_kind}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mean", [0, 4])
@pytest.mark.parametrize("format", SERVED, ids=str)
def test_gpu_every_format(format, mean, dtype):
    """The mean of x shows what moves all weights of a group together."""
    needs_hopper()
    if dtype == "float16" and not format.scales_fit_float16:
        pytest.skip("float16 does not hold the scales of these random weights")
    for m, n, k in SHAPES:
        rng = np.random.default_rng(m)
        k = -(-k // format.k_block) * format.k_block
        w, exact = random_weight(format, n, k, rng)
        x = jnp.asarray(rng.standard_normal((m, k)) + mean, dtype)
        minimums = format.name in ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k")
        if mean and getattr(format, "group", 1) > 0:
            # The weight is rounded once, and roundings of a column add up. Integers per channel are exact.
            exact = exact.astype(np.float32).astype(jnp.dtype(dtype))
        check_product(matmul(x, w, out_dtype="float32"), x, exact, product_limit(dtype, minimums=minimums))


@pytest.mark.gpu
def test_gpu_epilogue_and_batch():
    needs_hopper()
    rng = np.random.default_rng(0)
    w, exact = random_weight(qg.int4(128), 96, 512, rng, batch=3)
    x = jnp.asarray(rng.standard_normal((100, 512)), jnp.bfloat16)
    out = jax.jit(jax.vmap(lambda w: matmul(x, w, activation="relu", out_dtype="float32")))(w)
    for i in range(3):
        expected = np.maximum(np.asarray(x, np.float64) @ exact[i], 0)
        assert np.sum((out[i] - expected) ** 2) <= product_limit("bfloat16") * np.sum(expected**2)
