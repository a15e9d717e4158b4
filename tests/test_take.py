"""Rows of a quantized table, against gguf-py and the formulas of the integer formats, to the bit."""

import math
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, random_weight

import jax_qgemm as qg

take = jax.jit(qg.take, static_argnames="dtype")


@pytest.mark.parametrize("kind", ["one block", "tail"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rows_are_exact(format, kind):
    rng = np.random.default_rng(0)
    w, dense = random_weight(format, 39, cases.k_of(kind, format), rng)
    indices = np.array([[0, 38, 7], [-1, -39, 16]])
    out = np.asarray(take(w, indices))
    expected = dense.T.astype(np.float32)[indices]
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gpu_rows_are_exact(format):
    test_rows_are_exact(format, "tail")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_result_is_rounded_once(dtype):
    w, dense = random_weight(qg.formats.get_format("q4_k"), 20, 256, np.random.default_rng(1))
    out = take(w, np.arange(20), dtype=dtype)
    assert out.dtype == jnp.dtype(dtype)
    expected = dense.T.astype(np.float32).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(out), expected)


@pytest.mark.parametrize(
    "indices", [3, np.zeros((0,), np.int32), np.zeros((2, 0, 3), np.int64), np.array([5, 0], np.uint8)]
)
def test_shapes_of_indices(indices):
    w, dense = random_weight(qg.formats.get_format("q8_0"), 20, 64, np.random.default_rng(2))
    out = np.asarray(take(w, indices))
    assert out.shape == (*np.shape(indices), 64)
    np.testing.assert_array_equal(out, dense.T.astype(np.float32)[indices])


def test_index_out_of_range_gives_nan():
    w, _ = random_weight(qg.formats.get_format("q4_0"), 20, 64, np.random.default_rng(3))
    out = np.asarray(take(w, np.array([20, -21, 2**31 - 1, 19, -20])))
    assert np.isnan(out[:3]).all()
    assert np.isfinite(out[3:]).all()


def test_vmap_over_indices_and_tables():
    rng = np.random.default_rng(4)
    w, dense = random_weight(qg.int4(32), 20, 64, rng, batch=3)
    indices = rng.integers(0, 20, (3, 5))
    out = jax.jit(jax.vmap(qg.take))(w, indices)
    rows = dense.swapaxes(1, 2).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(out), np.stack([r[i] for r, i in zip(rows, indices, strict=True)]))
    out = jax.jit(jax.vmap(lambda i: qg.take(w[1], i)))(indices)
    np.testing.assert_array_equal(np.asarray(out), rows[1][indices])


def test_only_the_rows_asked_for_are_decoded():
    """No float array as large as the table, nor the codes as a whole, in the compiled program."""
    w, _ = random_weight(qg.formats.get_format("q6_k"), 1056, 1024, np.random.default_rng(5))
    text = take.lower(w, np.arange(3)).compile().as_text() or ""
    arrays = re.findall(r"\b([fsu]\d+|bf16)\[([\d,]+)\]", text)
    assert arrays
    for dtype, dims in arrays:
        assert math.prod(map(int, dims.split(","))) < 1056 * 1024, f"{dtype}[{dims}] in\n{text}"
