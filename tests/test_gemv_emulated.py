"""gemv's ways through a product: rings of x that fit or do not, clusters, epilogues; on the CPU, against float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from emulated import ACTIVATIONS, HOPPER, random_weight, random_x

import jax_qgemm as qg
from jax_qgemm.testing import nmse

FORMATS = ["q4_0", "q5_1", "q8_0", "q2_k", "q4_k", "q6_k", "iq4_nl", "nvfp4"]
FORMATS += [qg.int4(128), qg.int8(64, symmetric=False)]
DEVICES = {
    "hopper": HOPPER,
    "one multiprocessor": (9, 1, 227 << 10),
    "many multiprocessors": (9, 64, 227 << 10),
    "little shared memory": (9, 4, 110 << 10),
    "no clusters": (8, 3, 110 << 10),
    "code for an older GPU": (9, 3, 227 << 10, 80),
}
SHAPES = [(1, 48, 1024), (2, 80, 256), (8, 33, 768), (16, 100, 512), (32, 16, 1024), (40, 48, 256), (64, 20, 1024)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_way_through(emulated, format, device):
    clusters = set()
    with emulated.device(*DEVICES[device]):
        for case, (m, n, k) in enumerate(SHAPES):
            w, dense = random_weight(format, k, n, case)
            for dtype in ("float16", "bfloat16"):
                x, exact = random_x((m, k), dtype, case + 10)
                error = nmse(emulated.matmul(x, w, kernel="gemv"), exact @ dense)
                # Levels of 2 bits as subnormal float16 are at the lower end of what tensor cores add up.
                assert error <= (1e-10 if dtype == "float16" else 1e-11), (m, n, k, dtype, error)
                clusters.add(emulated.last_launch()["cluster"])
    if device != "one multiprocessor":
        assert clusters == ({1} if device in ("no clusters", "code for an older GPU") else {1, 2})


@pytest.mark.parametrize("offset", range(3))
def test_x_of_any_alignment(emulated, offset):
    """Rows of whole 16-byte pieces are copied as they are, others element by element."""
    for k in (64, 60, 77):
        w, dense = random_weight(qg.int4(-1), k, 32, 0)
        x = np.random.default_rng(1).standard_normal(3 * k + offset).astype(np.float16)
        x = x[offset:].reshape(3, k)
        got = emulated.matmul(x, w, kernel="gemv")
        assert nmse(got, x.astype(np.float64) @ dense) <= 1e-11


def test_tiny_scales(emulated):
    """What the A operand leaves to the end must not underflow before."""
    w, _ = random_weight("mxfp4", 256, 32, 0)
    for exponent in (0, 1, 2, 30, 200):
        scales = np.full_like(w.planes[1], exponent)
        decoded = qg.QTensor((w.planes[0], jnp.asarray(scales)), w.format)
        exact = np.asarray(decoded.dequantize(), np.float64)
        for m in (1, 9):
            x, values = random_x((m, 256), "float16", 1)
            assert nmse(emulated.matmul(x, decoded, kernel="gemv"), values @ exact) <= 5e-7, (exponent, m)


def test_x_with_a_mean(emulated):
    """Sums of levels are larger than those of differences: float32 must hold both."""
    w, dense = random_weight("q4_0", 1024, 64, 0)
    for dtype, limit in (("float16", 1e-10), ("bfloat16", 1e-8)):
        x = random_x((4, 1024), dtype, 1)[0] + 8
        assert nmse(emulated.matmul(x, w, kernel="gemv"), np.asarray(x, np.float64) @ dense) <= limit


def activate(name: str | None, v: np.ndarray) -> np.ndarray:
    erf = np.vectorize(math.erf)
    return {
        None: lambda: v,
        "relu": lambda: np.maximum(v, 0),
        "silu": lambda: v / (1 + np.exp(-v)),
        "gelu": lambda: v / 2 * (1 + erf(v / math.sqrt(2))),
        "gelu_tanh": lambda: v / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    }[name]()


@pytest.mark.parametrize("kernel", ["gemv", "gemm_sm80"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_epilogue(emulated, kernel, activation, gated):
    """Two weights in one launch, with and without each part of the epilogue."""
    rng = np.random.default_rng(0)
    for case, (m, n, k) in enumerate([(1, 64, 512), (5, 96, 256), (40, 64, 256)]):
        w, dense = random_weight("q4_0", k, n, case, batch=2)
        x, exact = random_x((2, m, k), "float16", case)
        columns = n // 2 if gated else n
        bias = np.asarray(jnp.asarray(rng.standard_normal((2, n) if case else n), "bfloat16"))
        residual = rng.standard_normal((2, m, columns)).astype(np.float16)
        scale = np.asarray([0.25, 0.5] if case else 0.5, np.float32)
        for used in range(8):
            parts = {"bias": used & 1, "residual": used & 2, "scale": used & 4}
            given = {"bias": bias, "residual": residual, "scale": scale}
            given = {name: given[name] if used else None for name, used in parts.items()}
            expected = exact @ dense
            if parts["scale"]:
                expected = expected * scale.reshape(-1, 1, 1)
            if parts["bias"]:
                expected = expected + np.atleast_2d(bias.astype(np.float64))[:, None]
            if gated:
                tiles = expected.reshape(2, m, n // 32, 2, 16)
                expected = (activate(activation, tiles[..., 0, :]) * tiles[..., 1, :]).reshape(2, m, columns)
            else:
                expected = activate(activation, expected)
            if parts["residual"]:
                expected = expected + residual
            for device in (HOPPER, DEVICES["no clusters"]):
                with emulated.device(*device):
                    got = emulated.matmul(x, w, kernel=kernel, activation=activation, gated=gated, **given)
                assert nmse(got, expected) <= 1e-10, (m, n, k, parts)


def test_results_do_not_depend_on_the_turn(emulated):
    """Bitwise the same from a grid of any size that splits k alike."""
    w, _ = random_weight("q4_k", 1024, 160, 0)
    x, _ = random_x((3, 1024), "float16", 0)
    assert np.array_equal(emulated.matmul(x, w), emulated.matmul(x, w))
