"""Every CUDA kernel with weights chosen by index, on the CPU by tests/emulation, against float64."""

import numpy as np
import pytest
from emulated import HOPPER, random_weight, random_x
from pairwise import cover

import jax_qgemm as qg
from jax_qgemm.formats import get_format
from jax_qgemm.testing import check_product, product_limit

AMPERE = (8, 3, 160 << 10)
COUNT = 3
EXPERTS = np.array([2, 0, -7, 2, 1, 3, 2**31 - 1, -(2**31)], np.int32)
CHOSEN = np.clip(EXPERTS, 0, COUNT - 1)
# kernel, rows of x, device: each kernel's way to its weights. "auto" of few rows is gemv, or gemv_tiles for float32.
KERNELS = [
    ("auto", 1, HOPPER),
    ("auto", 8, AMPERE),
    ("gemv", 20, AMPERE),
    ("gemv_sm90", 12, HOPPER),
    ("gemv_sm90", 64, HOPPER),
    ("gemm_sm80", 3, HOPPER),
    ("gemm_sm80", 40, AMPERE),
    ("gemm_sm90", 40, (9, 4, 227 << 10)),
    ("gemm_sm90", 140, (9, 2, 227 << 10)),
]
FORMATS = [
    *map(get_format, ("q4_0", "q6_k", "q4_k", "iq4_nl")),
    qg.int4(128),
    qg.int4(32, symmetric=False),
    qg.int4(-1, symmetric=False),
    qg.int8(-1),
    qg.int3(256),
]
CASES = cover({"kernel": KERNELS, "format": FORMATS, "n": (16, 50, 330), "dtype": ("float16", "bfloat16")}, seed=5)


def cut_out(w, dense):
    """Weights 1 to COUNT of a longer stack: what lies before and behind them is another weight."""
    return qg.QTensor(tuple(p[1 : COUNT + 1] for p in w.planes), w.format, w.padding), dense[1 : COUNT + 1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())).replace(" ", ""))
def test_product(emulated, case):
    kernel, m, device = case["kernel"]
    format, n, dtype = case["format"], case["n"], case["dtype"]
    w, dense = cut_out(*random_weight(format, 512, n, 0, batch=COUNT + 2))
    x, exact = random_x((len(EXPERTS), m, 512), dtype, 1)
    with emulated.device(*device):
        out = emulated.matmul(x, w, experts=EXPERTS, kernel=kernel)
    minimums = any(p.name == "minimums" for p in format.planes)
    check_product(out, exact, dense[CHOSEN], product_limit(dtype, minimums=minimums))


@pytest.mark.parametrize("m", [5, 20])
@pytest.mark.parametrize("device", [HOPPER, AMPERE], ids=["hopper", "ampere"])
def test_float32(emulated, device, m):
    w, dense = cut_out(*random_weight("q5_1", 256, 70, 0, batch=COUNT + 2))
    x, exact = random_x((len(EXPERTS), m, 256), "float32", 1)
    with emulated.device(*device):
        out = emulated.matmul(x, w, experts=EXPERTS, highest=True)
    check_product(out, exact, dense[CHOSEN], product_limit("float32", highest=True))


@pytest.mark.parametrize("format", FORMATS[::2], ids=str)
def test_transposed(emulated, format):
    w, dense = cut_out(*random_weight(format, 512, 40, 0, batch=COUNT + 2))
    x, exact = random_x((len(EXPERTS), 5, 40), "float32", 1)
    out = emulated.matmul(x, w, experts=EXPERTS, transpose=True)
    check_product(out, exact, dense[CHOSEN].swapaxes(1, 2), product_limit("float32", highest=True))


@pytest.mark.parametrize("format", FORMATS[::2], ids=str)
def test_dequantized_rows(emulated, format):
    w, dense = cut_out(*random_weight(format, 512, 40, 0, batch=COUNT + 2))
    out = emulated.dequantize(w, first=16, rows=24, experts=EXPERTS)
    assert np.array_equal(out, dense[CHOSEN].swapaxes(1, 2)[:, 16:].astype(np.float32))


@pytest.mark.parametrize(("kernel", "m"), [("gemv", 4), ("gemv", 20), ("gemv_sm90", 20), ("gemm_sm90", 40)])
def test_gated_with_a_bias_of_each_entry(emulated, kernel, m):
    """The epilogue's operands belong to the entries of the batch, not to the weights."""
    w, dense = cut_out(*random_weight("q8_0", 256, 64, 0, batch=COUNT + 2))
    x, exact = random_x((len(EXPERTS), m, 256), "bfloat16", 1)
    rng = np.random.default_rng(2)
    scale = rng.uniform(0.5, 2, len(EXPERTS)).astype(np.float32)
    bias = rng.standard_normal((len(EXPERTS), 64)).astype(np.float32)
    options = {"scale": scale, "bias": bias, "activation": "relu", "gated": True}
    with emulated.device(*(HOPPER if "sm90" in kernel else AMPERE)):
        out = emulated.matmul(x, w, experts=EXPERTS, kernel=kernel, **options)
    sums = exact @ dense[CHOSEN] * scale[:, None, None] + bias[:, None]
    gate, up = np.moveaxis(sums.reshape(len(EXPERTS), m, 2, 2, 16), 3, 0).reshape(2, len(EXPERTS), m, 32)
    expected = np.maximum(gate, 0) * up
    assert np.sum((out - expected) ** 2) <= product_limit("bfloat16") * np.sum(expected**2)
