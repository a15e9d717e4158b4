"""What the tests of gemv_sm90 and of gemm_sm90 check alike. product(x, w, **options) is the kernel's, emulated."""

import epilogue_oracle
import jax.numpy as jnp
import numpy as np
from emulated import random_weight, random_x

from jax_qgemm.testing import check_product, nmse, product_limit

BFLOAT16_LIMIT = product_limit("bfloat16")


def memory_at(offset, shape, dtype):
    """An array whose address is that many elements behind a multiple of 16 bytes."""
    memory = np.zeros(int(np.prod(shape)) + 16, dtype)
    first = -memory.ctypes.data % 16 // dtype.itemsize + offset
    return memory[first : first + int(np.prod(shape))].reshape(shape)


def random_bfloat16(shape):
    return random_x(shape, "bfloat16", 1)


def check_epilogue(
    product, m, n, aligned, gated, activation, *, make_x=random_bfloat16, format="q8_0", limit=BFLOAT16_LIMIT
):
    """Four results at a time, or one where n or an address is no multiple of that. make_x: x of a shape, as `product`
    takes it, and its values."""
    rng = np.random.default_rng(0)
    k = 256
    w, dense = random_weight(format, k, n, 0, batch=2)
    x, exact = make_x((2, m, k))
    columns = n // 2 if gated else n
    bias, scale = rng.standard_normal((2, n)).astype(np.float16), np.asarray([0.25, 0.5], np.float32)
    parts = {"activation": activation, "scale": scale[:, None, None]}
    if gated:
        tiles, biases = dense.reshape(2, k, n // 32, 2, 16), bias.astype(np.float64).reshape(2, 1, n // 32, 2, 16)
        expected = epilogue_oracle.gated(
            exact,
            [tiles[..., i, :].reshape(2, k, columns) for i in range(2)],
            bias=[biases[..., i, :].reshape(2, 1, columns) for i in range(2)],
            **parts,
        )
    else:
        expected = epilogue_oracle.fused(exact, dense, bias=bias.astype(np.float64)[:, None], **parts)
    for dtype in ("float16", "bfloat16", "float32"):
        residual = memory_at(0 if aligned else 2, (2, m, columns), jnp.dtype(dtype))
        residual[...] = rng.standard_normal(residual.shape)
        got = product(x, w, bias=bias, scale=scale, residual=residual, activation=activation, gated=gated)
        assert nmse(got, expected + residual.astype(np.float64)) <= limit


def check_rows_stay_alone(product, m, dtype):
    """Rows of x with an infinity or a NaN, the second and the last but one."""
    w, dense = random_weight("q4_1", 96, 20, 3)
    x, exact = random_x((m, 96), dtype, 4)
    x = x.at[1, 7].set(np.inf).at[m - 2, 9].set(np.nan)
    got = product(x, w)
    assert not np.isfinite(got[[1, m - 2]]).any()
    kept = np.delete(np.arange(m), [1, m - 2])
    check_product(got[kept], exact[kept], dense, product_limit(dtype))
