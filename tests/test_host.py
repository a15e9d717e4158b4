"""What only the CPU kernels promise: exact values, results that do not depend on how the work is divided, rounding."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import FORMATS, k_of, pack, random_weight

import jax_qgemm as qg
from jax_qgemm import _native


def product(x, w, **options):
    return np.asarray(qg.matmul(jnp.asarray(x), w, precision="highest", **options))


def transposed(x, w):
    primal = jax.ShapeDtypeStruct((len(x), w.shape[0]), np.float32)
    return np.asarray(jax.linear_transpose(lambda a: qg.matmul(a, w, precision="highest"), primal)(jnp.asarray(x))[0])


def columns(w, count):
    """The first columns of w, a multiple of 16."""
    return qg.QTensor(tuple(p[: count // 16] for p in w.planes), w.format, (w.padding[0], 0))


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="avx1024"):
        _native.set_host_instruction_set("avx1024")


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_product_with_the_identity_is_the_weight(instruction_set, format):
    """Zeros add nothing, so every value must come out as the format defines it, to the bit, one token or many."""
    k = k_of("tail", format)
    w, dense = random_weight(format, 37, k, np.random.default_rng(0))
    expected = dense.astype(np.float32)
    np.testing.assert_array_equal(product(np.eye(k, dtype=np.float32), w), expected)
    for row in (0, k // 2, k - 1):
        np.testing.assert_array_equal(product(np.eye(k, dtype=np.float32)[row], w), expected[row])
    np.testing.assert_array_equal(transposed(np.eye(37, dtype=np.float32), w), expected.T)


@pytest.mark.parametrize("format", FORMATS[::3], ids=str)
def test_elements_depend_on_their_row_and_column_alone(instruction_set, format):
    """Whatever else is in the batch, and so however the work is divided."""
    rng = np.random.default_rng(1)
    k = k_of("1024", format)
    w, _ = random_weight(format, 80, k, rng)
    x = rng.standard_normal((259, k)).astype(np.float32)
    full = product(x, w)
    for m in (1, 2, 3, 5, 8, 131):
        np.testing.assert_array_equal(product(x[:m], w), full[:m])
    np.testing.assert_array_equal(product(x[:7], columns(w, 48)), full[:7, :48])
    g = rng.standard_normal((259, 80)).astype(np.float32)
    full = transposed(g, w)
    for m in (1, 4, 131):
        np.testing.assert_array_equal(transposed(g[:m], w), full[:m])


_SCRIPT = """
import hashlib, json, os, sys
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:int(sys.argv[1])]))
import jax, numpy as np
import jax_qgemm as qg
from test_host import product, transposed
from cases import random_weight
rng = np.random.default_rng(2)
digests = []
for name, n in (("q4_k", 1056), ("q8_0", 509)):
    w, _ = random_weight(qg.formats.get_format(name), n, 1024, rng)
    for m in (1, 200):
        x, g = (rng.standard_normal((m, size)).astype(np.float32) for size in w.shape)
        digests += [hashlib.sha256(f(a, w).tobytes()).hexdigest() for f, a in ((product, x), (transposed, g))]
print(json.dumps(digests))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs an OS that pins processes to cores")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_number_of_threads_changes_nothing():
    def digests(threads):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", _SCRIPT, str(threads)]
        return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)

    assert digests(1) == digests(2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_results_are_rounded_to_nearest_even(instruction_set, dtype):
    """Against NumPy's conversions: ties, the largest values, overflow, float16's subnormals, both zeros."""
    rng = np.random.default_rng(3)
    identity = np.full((16, 1), 1, np.float32).view(np.uint32)
    w = pack({"codes": np.eye(16, dtype=np.uint8), "scales": identity}, qg.int8(-1, scale_dtype="float32"), 16, 16)
    bits = rng.integers(0, 1 << 32, (4096, 16), np.uint32)
    bits[1024:2048] = (bits[1024:2048] & 0x87FFFFFF) | 0x38000000  # about 2^-15 to 2^0
    bits[2048:3072] &= 0xFFFFF000  # ties of float16, and of bfloat16 below
    bits[3072:3584] = (bits[3072:3584] & 0xFFFF0000) | 0x8000
    bits[3584:] = (bits[3584:] & 0x80003FFF) | 0x477FC000  # about 65504
    x = bits.view(np.float32)
    finite = np.isfinite(x) & (np.abs(x) >= np.finfo(np.float32).tiny)
    x = np.where(finite, x, np.float32(0))
    target = np.dtype(getattr(ml_dtypes, dtype, dtype))
    with np.errstate(over="ignore"):
        expected = (x + np.float32(0)).astype(target)  # a sum that starts at 0 is never -0
    np.testing.assert_array_equal(product(x, w, out_dtype=dtype).view(np.uint16), expected.view(np.uint16))


def test_nan_in_the_result(instruction_set):
    w, _ = random_weight(qg.int8(-1), 16, 16, np.random.default_rng(4))
    x = np.full((2, 16), np.nan, np.float32)
    for dtype in ("float16", "bfloat16", "float32"):
        assert np.isnan(product(x, w, out_dtype=dtype).astype(np.float32)).all()
