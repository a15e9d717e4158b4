"""Products of quantized activations: with what NumPy quantizes, multiplied in float64 with independently decoded
weights; against x itself; and exact integers."""

import dataclasses
import functools
from typing import Any

import epilogue_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DATA, Case, random_weight, random_x
from pairwise import cover
from quantized_x import F32, LIMITS, quantized

import jax_qgemm as qg
from jax_qgemm.ops import integer_dense
from jax_qgemm.testing import check_product, nmse, product_limit

pytestmark = pytest.mark.usefixtures("backend")

UNQUANTIZED_LIMITS = {"int8": 2e-4, "fp8": 1.5e-3}  # NMSE against x itself, normal data


@dataclasses.dataclass(frozen=True)
class QuantizedCase(Case):
    x_format: str = "int8"
    kernel: str = "auto"

    def __str__(self) -> str:
        return f"{self.x_format}-{self.kernel}-{super().__str__()}"


def quantized_cases() -> list[QuantizedCase]:
    """80 cases, among them every pair of values but for fp8 with 8-bit weights."""
    factors = {
        "make": (qg.int4, qg.int8),
        "group_size": (64, 128, 256, -1),
        "symmetric": (True, False),
        "scale_dtype": ("float16", "bfloat16", "float32"),
        "m": (0, 1, 7, 33, 129),
        "n": (1, 3, 16, 45, 127),
        "k_kind": ("one block", "three blocks", "1024", "tail"),
        "x_type": ("float16", "bfloat16", "float32"),
        "data": DATA,
        "x_format": ("int8", "fp8"),
        "kernel": ("auto", "dense", "reference"),
    }
    cases = []
    for row in cover(factors, seed=5, count=80):
        make = row.pop("make")
        parameters = {name: row.pop(name) for name in ("group_size", "symmetric", "scale_dtype")}
        if make is qg.int8:
            row["x_format"] = "int8"
        cases.append(QuantizedCase(format=make(**parameters), **row))
    return cases


@pytest.mark.parametrize("case", quantized_cases(), ids=str)
def test_cover(case):
    rng = case.rng()
    w, dense = random_weight(case.format, case.n, case.k, rng)
    x = random_x(case, (case.m, case.k), rng)
    function = functools.partial(qg.matmul, x_format=case.x_format, kernel=case.kernel, out_dtype="float32")
    check_product(jax.jit(function)(x, w), quantized(x, case.x_format), dense, LIMITS[case.x_format])


@pytest.mark.parametrize(
    ("x_format", "format"),
    [("int8", qg.int4(128)), ("int8", qg.int8(-1)), ("int8", qg.int8(64, symmetric=False)), ("fp8", qg.int4(128))],
    ids=str,
)
def test_normal_data_loses_what_eight_bits_cost(x_format, format):
    rng = np.random.default_rng(0)
    w, dense = random_weight(format, 127, 1024, rng)
    x = rng.standard_normal((33, 1024)).astype(F32)
    check_product(qg.matmul(jnp.asarray(x), w, x_format=x_format), x, dense, UNQUANTIZED_LIMITS[x_format])


@pytest.fixture(params=[None, 1 << 14], ids=["one slab", "several slabs"])
def slabs(request, monkeypatch):
    if request.param is not None:
        jax.clear_caches()  # of products in one slab
        monkeypatch.setattr(integer_dense, "SCRATCH_BYTES", request.param)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("make", [qg.int4, qg.int8])
@pytest.mark.parametrize("group", [64, -1])
def test_integers_are_exact(slabs, make, group, symmetric):
    """Codes that are x itself and scales of 1 give the product of the integers, to the last bit of float32."""
    rng = np.random.default_rng(1)
    k, n = 320 if group > 0 else 333, 77
    format = make(group, symmetric=symmetric, scale_dtype="float32")
    w, _ = random_weight(format, n, k, rng)
    fields = {name: np.array(value) for name, value in w.fields().items()}
    fields["scales"][:] = np.float32(1).view(np.uint32)
    w = qg.QTensor.from_fields(jax.tree.map(jnp.asarray, fields), format)
    integers = np.asarray(w.dequantize()).astype(np.int64)
    x = rng.integers(-127, 128, (2, 9, k))
    x[..., 0] = 127
    out = qg.matmul(jnp.asarray(x, jnp.float32), w, x_format="int8", kernel="dense")
    np.testing.assert_array_equal(np.asarray(out).astype(np.int64), x @ integers)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 0, 3)], ids=str)
def test_leading_axes(shape):
    rng = np.random.default_rng(3)
    w, dense = random_weight(qg.int4(64), 48, 192, rng)
    x = rng.standard_normal((*shape, 192)).astype(F32)
    out = jax.jit(functools.partial(qg.matmul, x_format="int8"))(x, w)
    assert out.shape == (*shape, 48)
    check_product(np.reshape(out, (-1, 48)), quantized(x, "int8").reshape(-1, 192), dense, LIMITS["int8"])


@pytest.mark.parametrize("kernel", ["auto", "dense", "reference"])
@pytest.mark.parametrize("x_format", ["int8", "fp8"])
def test_rows_that_are_not_finite_are_nan_and_no_others(x_format, kernel):
    rng = np.random.default_rng(4)
    w, dense = random_weight(qg.int4(64), 35, 128, rng)
    x = rng.standard_normal((6, 128)).astype(F32)
    x[1, 7], x[3, 0], x[4, 100] = np.nan, np.inf, -np.inf
    x[5] = 0
    out = np.asarray(qg.matmul(jnp.asarray(x), w, x_format=x_format, kernel=kernel))
    assert np.isnan(out[[1, 3, 4]]).all()
    check_product(out[[0, 2]], quantized(x[[0, 2]], x_format), dense, LIMITS[x_format])
    np.testing.assert_array_equal(out[5], 0)


@pytest.mark.parametrize("out_dtype", [None, "float16", "bfloat16", "float32"])
def test_result_has_the_type_of_x(out_dtype):
    rng = np.random.default_rng(5)
    w, dense = random_weight(qg.int4(128), 64, 256, rng)
    x = jnp.asarray(rng.standard_normal((17, 256)), jnp.bfloat16)
    shared = qg.quantize_activations(x, "int8")
    expected = jnp.dtype(out_dtype or "bfloat16")
    for operand, x_format in ((x, "int8"), (shared, None)):
        out = qg.matmul(operand, w, x_format=x_format, out_dtype=out_dtype)
        assert out.dtype == expected
        limit = LIMITS["int8"] if expected == F32 else product_limit(expected)
        check_product(out, quantized(np.asarray(x), "int8"), dense, limit)


EPILOGUES = (("bias",), ("activation",), ("residual",), ("scale", "bias", "activation", "residual"))


@pytest.mark.parametrize("kernel", ["auto", "dense", "reference"])
@pytest.mark.parametrize("names", EPILOGUES, ids="+".join)
@pytest.mark.parametrize("gated", [False, True])
def test_epilogue(gated, names, kernel):
    rng = np.random.default_rng(6)
    (gate, gate_dense), (up, up_dense) = (random_weight(qg.int4(64), 48, 128, rng) for _ in range(2))
    biases = rng.standard_normal((2, 48)).astype(F32)
    x, residual = (rng.standard_normal((9, size)).astype(F32) / 5 for size in (128, 48))
    dense = (gate_dense, up_dense) if gated else gate_dense
    w = qg.interleave_gate_up(gate, up) if gated else gate
    bias = qg.interleave_gate_up(*biases) if gated else biases[0]
    parts: dict[str, Any] = {"scale": F32(0.37), "bias": bias, "activation": "gelu", "residual": residual}
    parts = {name: parts[name] for name in names}
    exact: dict[str, Any] = parts | ({"bias": biases} if gated and "bias" in names else {})
    expected = (oracle.gated if gated else oracle.fused)(quantized(x, "int8"), dense, **exact)
    w = qg.QTensor(w.planes, w.format, w.padding, global_scale=parts.pop("scale", None))
    function = qg.gated_matmul if gated else qg.matmul
    options: dict[str, Any] = {"activation": None} | parts
    out = function(jnp.asarray(x), w, x_format="int8", kernel=kernel, **options)
    assert nmse(out, expected) <= LIMITS["int8"]


def test_pair_of_gate_and_up():
    rng = np.random.default_rng(7)
    gate, up = random_weight(qg.int4(64), 40, 128, rng), random_weight(qg.int8(-1), 40, 128, rng)
    x = rng.standard_normal((9, 128)).astype(F32) / 5
    expected = oracle.gated(quantized(x, "int8"), (gate[1], up[1]), activation="silu")
    shared = qg.quantize_activations(jnp.asarray(x), "int8")
    assert nmse(qg.gated_matmul(jnp.asarray(x), (gate[0], up[0]), x_format="int8"), expected) <= LIMITS["int8"]
    assert nmse(qg.gated_matmul(shared, (gate[0], up[0])), expected) <= LIMITS["int8"]


def test_query_key_and_value_share_quantized_activations():
    rng = np.random.default_rng(8)
    formats = (qg.int4(64), qg.int8(-1), qg.int4(-1, symmetric=False))
    weights = [random_weight(format, 48, 192, rng) for format in formats]
    x = rng.standard_normal((2, 5, 192)).astype(F32)

    @jax.jit
    def project(x, weights):
        shared = qg.quantize_activations(x, "int8")
        return [qg.matmul(shared, w) for w in weights]

    for out, (_, dense) in zip(project(x, [w for w, _ in weights]), weights, strict=True):
        check_product(out, quantized(x, "int8"), dense, LIMITS["int8"])


def test_metadata_of_checkpoints():
    """The input scale is applied to x before it is quantized, in float32; codes are permuted as x would be."""
    rng = np.random.default_rng(9)
    packed, dense = random_weight(qg.int4(64), 48, 128, rng)
    permutation = jnp.asarray(rng.permutation(128), jnp.int32)
    input_scale = jnp.asarray(rng.uniform(0.01, 2, 128), jnp.float32)
    global_scale = jnp.float32(0.37)
    w = qg.QTensor(packed.planes, packed.format, packed.padding, permutation=permutation, global_scale=global_scale)
    x = rng.standard_normal((20, 128)).astype(jnp.bfloat16)
    for x_format in ("int8", "fp8"):
        expected = quantized(x[:, permutation], x_format)
        shared = qg.quantize_activations(jnp.asarray(x), x_format)
        for out in (
            qg.matmul(jnp.asarray(x), w, x_format=x_format, out_dtype="float32"),
            qg.matmul(shared, w, out_dtype="float32"),
        ):
            check_product(out, expected, dense * np.float64(global_scale), LIMITS[x_format])
    w = qg.QTensor(packed.planes, packed.format, packed.padding, permutation=permutation, input_scale=input_scale)
    smooth = x[:, permutation].astype(F32) / np.asarray(input_scale)
    out = qg.matmul(jnp.asarray(x), w, x_format="int8", out_dtype="float32")
    check_product(out, quantized(smooth, "int8"), dense, LIMITS["int8"])
    with pytest.raises(ValueError, match=r"w has an input_scale.*x_format='int8'"):
        qg.matmul(qg.quantize_activations(jnp.asarray(x), "int8"), w)
