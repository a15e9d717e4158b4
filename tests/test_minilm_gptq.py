"""The MiniLM example's GPTQ of one weight, against the paper's updates with an explicit inverse for every row."""

from typing import Any

import numpy as np
import pytest

import jax_qgemm as qg
from examples.minilm import gptq
from jax_qgemm.io import load_gptq, save_gptq

FORMATS = {2: qg.int2, 3: qg.int3, 4: qg.int4, 8: qg.int8}
DAMPING = 0.01


def asymmetric(bits, group_size, scale_dtype: Any = "float16"):
    return FORMATS[bits](group_size, symmetric=False, scale_dtype=scale_dtype)


def problem(k, n, tokens=None, seed=0):
    """A weight, and inputs of which each element has much to do with its neighbours."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens or 3 * k, k)) * rng.uniform(0.3, 3, k)
    x[:, 1:] += 0.8 * x[:, :-1]
    return rng.standard_normal((k, n)).astype(np.float32), x


def direct_gptq(w, hessian, bits, group_size, order):
    """The decoded weight by equation 2 of the paper, w_F -= (w_q - quant(w_q)) / [H_F⁻¹]_qq * [H_F⁻¹]_:,q, in float64.

    F are the rows of `order` that are not yet quantized. Scales are float16, chosen when a group begins.
    """
    levels = 2**bits - 1
    w = w.astype(np.float64)[order]
    h = hessian + DAMPING * np.mean(np.diag(hessian)) * np.eye(len(w))
    h = h[np.ix_(order, order)]
    decoded = np.empty_like(w)
    for i in range(len(w)):
        if i % group_size == 0:
            group = w[i : i + group_size]
            low, high = np.minimum(group.min(axis=0), 0), np.maximum(group.max(axis=0), 0)
            scale = ((high - low) / levels).astype(np.float16).astype(np.float64)
            zero_point = np.clip(np.rint(-low / scale), 0, levels)
        qvalue = np.clip(np.rint(w[i] / scale) + zero_point, 0, levels)
        decoded[i] = scale * (qvalue - zero_point)
        inverse = np.linalg.inv(h[i:, i:])
        w[i:] -= np.outer(inverse[:, 0] / inverse[0, 0], w[i] - decoded[i])
    logical = np.empty_like(decoded)
    logical[order] = decoded
    return logical


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "k", "n"),
    [
        *((bits, 16, 16, 8) for bits in FORMATS),
        *((bits, 16, 48, 8) for bits in FORMATS),
        pytest.param(4, 32, 160, 8, id="many groups"),
        pytest.param(3, -1, 144, 8, id="one scale per channel"),
    ],
)
def test_updates_are_the_papers(bits, group_size, k, n, act_order):
    w, x = problem(k, n)
    h = gptq.hessian_of(x)
    q = gptq.quantize(w, h, asymmetric(bits, group_size), act_order=act_order)
    order = np.argsort(-np.sum(x * x, axis=0)) if act_order else np.arange(k)
    expected = direct_gptq(w, h, bits, k if group_size == -1 else group_size, order)
    # An element that were rounded the other way would be off by a whole step.
    np.testing.assert_allclose(np.asarray(q.dequantize()), expected, rtol=1e-6, atol=1e-7)
    assert q.shape == (k, n)
    assert (q.permutation is not None) == (act_order and 0 < group_size < k)


@pytest.mark.parametrize(
    ("bits", "group_size", "scale_dtype"),
    [*((bits, 16, "float16") for bits in FORMATS), (4, -1, "float16"), (4, 32, "bfloat16"), (8, -1, "float32")],
)
def test_without_correlations_it_is_rounding_to_nearest(bits, group_size, scale_dtype):
    """To the byte, whatever the inputs' sizes."""
    w, _ = problem(160, 8)
    format = asymmetric(bits, group_size, scale_dtype)
    expected = qg.quantize(w, format)
    for hessian in (np.eye(160), np.diag(np.random.default_rng(1).uniform(0.1, 10, 160)), np.zeros((160, 160))):
        q = gptq.quantize(w, hessian, format)
        assert (q.format, q.padding, q.permutation) == (expected.format, expected.padding, None)
        for plane, other in zip(q.planes, expected.planes, strict=True):
            np.testing.assert_array_equal(plane, other)


@pytest.mark.parametrize(("bits", "act_order"), [*((bits, False) for bits in FORMATS), (4, True)])
def test_error_of_the_product_is_below_roundings(bits, act_order):
    w, x = problem(256, 8, tokens=1000)
    format = asymmetric(bits, 16)

    def error(q):
        return np.sum((x @ (w - np.asarray(q.dequantize(), np.float64))) ** 2)

    assert error(gptq.quantize(w, gptq.hessian_of(x), format, act_order=act_order)) < error(qg.quantize(w, format))


def test_inputs_that_are_always_zero_are_rounded_to_nearest():
    w, x = problem(64, 8)
    x[:, [3, 40]] = 0
    q = np.asarray(gptq.quantize(w, gptq.hessian_of(x), asymmetric(8, 64)).dequantize())
    # In one group, whose scales no update has changed yet when they are chosen.
    rounded = np.asarray(qg.quantize(w, asymmetric(8, 64)).dequantize())
    np.testing.assert_array_equal(q[[3, 40]], rounded[[3, 40]])
    assert not np.array_equal(q, rounded)


def test_fewer_inputs_than_rows():
    w, x = problem(128, 8, tokens=20)
    q = gptq.quantize(w, gptq.hessian_of(x), asymmetric(4, 32))
    expected = direct_gptq(w, gptq.hessian_of(x), 4, 32, np.arange(128))
    np.testing.assert_allclose(np.asarray(q.dequantize()), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(np.linalg.LinAlgError):
        gptq.quantize(w, np.zeros((128, 128)) + 1, asymmetric(4, 32), damping=0)


def test_hessian_is_that_of_all_leading_axes():
    x = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    expected = np.einsum("abi,abj->ij", x.astype(np.float64), x.astype(np.float64))
    np.testing.assert_allclose(gptq.hessian_of(x), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("bits", [4, 8])
def test_act_order_survives_a_checkpoint(bits, tmp_path):
    w, x = problem(96, 8)
    q = gptq.quantize(w, gptq.hessian_of(x), asymmetric(bits, 16), act_order=True)
    save_gptq(tmp_path, {"a.weight": q})
    loaded: Any = load_gptq(tmp_path)[0]["a.weight"]
    np.testing.assert_array_equal(loaded.permutation, q.permutation)
    for plane, other in zip(loaded.planes, q.planes, strict=True):
        np.testing.assert_array_equal(plane, other)


def test_errors():
    w, x = problem(96, 4)
    h = gptq.hessian_of(x)
    with pytest.raises(ValueError, match=r"format must be asymmetric, got int4\(group_size=32, symmetric"):
        gptq.quantize(w, h, qg.int4(32))
    with pytest.raises(ValueError, match=r"w has shape \(96, 4\), .* needs k to be a multiple of 64"):
        gptq.quantize(w, h, asymmetric(4, 64))
    with pytest.raises(ValueError, match=r"hessian has shape \(95, 95\), expected \(96, 96\)"):
        gptq.quantize(w, h[1:, 1:], asymmetric(4, 32))
