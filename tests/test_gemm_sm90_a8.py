"""gemm_sm90_a8 on a Hopper GPU through JAX, against float64 with the same codes of x. On the CPU its code is emulated:
tests/test_gemm_sm90_a8_emulated.py."""

import functools
from typing import Any

import epilogue_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_weight
from pairwise import cover
from quantized_x import F32, LIMITS, quantized
from test_gemm_sm90 import needs_hopper
from test_lowering import outermost_thunks

import jax_qgemm as qg
from jax_qgemm._registration import INTEGER_MATMUL_TARGET
from jax_qgemm.testing import check_product, nmse, product_limit

KERNEL = "gemm_sm90_a8"
FEW_OPERANDS = [
    ("int8", qg.int4(-1)),
    ("int8", qg.int4(128, symmetric=False)),
    ("int8", qg.int8(-1)),
    ("fp8", qg.int4(64)),
]  # fmt: skip

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _hopper():
    needs_hopper()


def limit(x_format: str, *dtypes: Any) -> float:
    """Of results rounded to these types."""
    return max(LIMITS[x_format], *(product_limit(t) for t in dtypes if t != "float32"), 0)


def operands_of(x_format: str, format: Any, m: int, n: int, k: int, batch: int | None = None, dtype: Any = "float32"):
    """A weight and its values, x and the values of its codes."""
    rng = np.random.default_rng(m + n + k)
    w, dense = random_weight(format, n, k, rng, batch=batch)
    rows = (m, k) if batch is None else (batch, m, k)
    x = jnp.asarray(rng.standard_normal(rows), dtype)
    return jax.tree.map(jnp.asarray, w), dense, x, quantized(np.asarray(x), x_format)


def case_id(case: Any) -> str:
    parts = case.values() if isinstance(case, dict) else case if isinstance(case, tuple) else (case,)
    return "-".join(case_id(part) if isinstance(part, tuple) else str(part) for part in parts).replace(" ", "")


def products() -> list[dict[str, Any]]:
    """130 cases, among them every pair of values but for those that the kernel does not serve."""
    factors = {
        "make": (qg.int4, qg.int8),
        "group_size": (64, 128, 256, -1),
        "symmetric": (True, False),
        "scale_dtype": ("float16", "bfloat16", "float32"),
        "x_format": ("int8", "fp8"),
        "m": (1, 17, 64, 100, 128, 129, 300, 512, 1111, 2048),
        "n": (640, 1000, 2048, 3584, 4096),
        "k": (640, 1008, 2048, 3584, 4096),
        "x_dtype": ("bfloat16", "float16", "float32"),
        "out_dtype": ("float32", "bfloat16", "float16"),
        "kernel": ("auto", KERNEL),
    }
    cases = []
    for row in cover(factors, seed=8, count=130):
        make = row.pop("make")
        parameters = {name: row.pop(name) for name in ("group_size", "symmetric", "scale_dtype")}
        if parameters["scale_dtype"] == "float32":
            parameters["group_size"] = -1
        if make is qg.int8:
            parameters["symmetric"], row["x_format"] = True, "int8"
        format = make(**parameters)
        cases.append({"format": format, **row, "k": -(-row["k"] // format.block) * format.block})
    return cases


@pytest.mark.parametrize("case", products(), ids=case_id)
def test_product(case):
    x_format, out_dtype = case["x_format"], case["out_dtype"]
    sizes = (case[name] for name in ("m", "n", "k"))
    w, dense, x, exact = operands_of(x_format, case["format"], *sizes, dtype=case["x_dtype"])
    product = functools.partial(qg.matmul, x_format=x_format, kernel=case["kernel"], out_dtype=out_dtype)
    check_product(jax.jit(product)(x, w), exact, dense, limit(x_format, out_dtype))


@pytest.mark.parametrize("m", [5, 300])
@pytest.mark.parametrize(("k", "format"), [(1000, qg.int4(-1)), (1024, qg.int8(128, symmetric=False))], ids=str)
def test_auto_leaves_the_rest_to_dense(k, format, m):
    w, dense, x, exact = operands_of("int8", format, m, 640, k)
    product = jax.jit(functools.partial(qg.matmul, x_format="int8"))
    assert INTEGER_MATMUL_TARGET not in product.lower(x, w).as_text()
    check_product(product(x, w), exact, dense, LIMITS["int8"])


@pytest.mark.parametrize("m", [1, 64, 129, 700])
@pytest.mark.parametrize("format", [qg.int4(128, symmetric=False), qg.int4(-1), qg.int8(64), qg.int8(-1)], ids=str)
def test_integers_are_exact(format, m):
    """Codes that are x itself and scales of 1 give the product of the integers, to the last bit of float32."""
    rng = np.random.default_rng(1)
    n, k = 200, 768
    w, _ = random_weight(format, n, k, rng)
    fields = {name: np.array(value) for name, value in w.fields().items()}
    fields["scales"][:] = np.float16(1).view(np.uint16)
    w = qg.QTensor.from_fields(jax.tree.map(jnp.asarray, fields), format)
    integers = np.asarray(w.dequantize(), np.float64)
    x = rng.integers(-127, 128, (m, k))
    x[:, 0] = 127
    expected = x @ integers
    assert np.abs(expected).max() < 2**24
    out = qg.matmul(jnp.asarray(x, jnp.float32), w, x_format="int8", kernel=KERNEL)
    np.testing.assert_array_equal(np.asarray(out, np.float64), expected)


EPILOGUES = (
    ("bias",), ("activation",), ("residual",), ("scale",), ("scale", "bias", "activation", "residual"),
)  # fmt: skip


@pytest.mark.parametrize("m", [17, 300])
@pytest.mark.parametrize("names", EPILOGUES, ids="+".join)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("x_format", "format"), FEW_OPERANDS[1:], ids=case_id)
def test_epilogue(x_format, format, gated, names, m):
    rng = np.random.default_rng(6)
    n, k = 208, 512
    (gate, gate_dense), (up, up_dense) = (random_weight(format, n, k, rng) for _ in range(2))
    biases = rng.standard_normal((2, n)).astype(F32)
    x, residual = (rng.standard_normal((m, size)).astype(F32) / 20 for size in (k, n))
    dense = (gate_dense, up_dense) if gated else gate_dense
    w = qg.interleave_gate_up(gate, up) if gated else gate
    bias = qg.interleave_gate_up(*biases) if gated else biases[0]
    parts: dict[str, Any] = {"scale": F32(0.37), "bias": bias, "activation": "silu", "residual": residual}
    parts = {name: parts[name] for name in names}
    exact: dict[str, Any] = parts | ({"bias": biases} if gated and "bias" in names else {})
    expected = (oracle.gated if gated else oracle.fused)(quantized(x, x_format), dense, **exact)
    w = qg.QTensor(w.planes, w.format, w.padding, global_scale=parts.pop("scale", None))
    parts.setdefault("activation", None)
    product = functools.partial(qg.gated_matmul if gated else qg.matmul, x_format=x_format, kernel=KERNEL, **parts)
    for out_dtype in ("float32", "bfloat16"):
        out = jax.jit(functools.partial(product, out_dtype=out_dtype))(x, w)
        assert nmse(out, expected) <= limit(x_format, out_dtype)


@pytest.mark.parametrize(("x_format", "format"), FEW_OPERANDS, ids=case_id)
def test_vmap(x_format, format):
    w, dense, x, exact = operands_of(x_format, format, 150, 200, 512, batch=3)
    matmul = functools.partial(qg.matmul, x_format=x_format, kernel=KERNEL)
    by_rows = jax.jit(jax.vmap(matmul, (1, None), 1))(x.swapaxes(0, 1), w[0])
    check_product(jnp.swapaxes(by_rows, 0, 1), exact, dense[0], LIMITS[x_format])
    by_weights = jax.jit(jax.vmap(matmul, (None, 0)))(x[0], w)
    check_product(by_weights, np.broadcast_to(exact[0], x.shape), dense, LIMITS[x_format])
    check_product(jax.jit(jax.vmap(matmul))(x, w), exact, dense, LIMITS[x_format])
    gated = jax.jit(jax.vmap(functools.partial(qg.gated_matmul, x_format=x_format, kernel=KERNEL), (0, 0)))
    w, dense, x, exact = operands_of(x_format, format, 40, 192, 512, batch=2)
    halves = dense.reshape(2, 512, 6, 2, 16)
    expected = [oracle.gated(exact[i], tuple(halves[i, :, :, j].reshape(512, 96) for j in (0, 1)), activation="silu")
                for i in range(2)]  # fmt: skip
    assert nmse(gated(x, w), np.stack(expected)) <= LIMITS[x_format]


@pytest.mark.parametrize(("x_format", "format"), FEW_OPERANDS, ids=case_id)
def test_scan_over_layers_and_over_activations(x_format, format):
    """Slices reach the kernel as base and offset."""
    w, dense, x, exact = operands_of(x_format, format, 70, 200, 512, batch=4)
    step = functools.partial(qg.matmul, x_format=x_format, kernel=KERNEL)
    layers = jax.jit(lambda x, w: jax.lax.scan(lambda carry, w: (carry, step(x, w)), None, w)[1])
    check_product(layers(x[0], w), np.broadcast_to(exact[0], x.shape), dense, LIMITS[x_format])
    step = functools.partial(qg.matmul, kernel=KERNEL)
    tokens = jax.jit(lambda shared, w: jax.lax.scan(lambda carry, x: (carry, step(x, w)), None, shared)[1])
    check_product(tokens(qg.quantize_activations(x, x_format), w[1]), exact, dense[1], LIMITS[x_format])


@pytest.mark.parametrize(("x_format", "format"), FEW_OPERANDS, ids=case_id)
def test_query_key_and_value_share_quantized_activations(x_format, format):
    w, dense, x, exact = operands_of(x_format, format, 130, 320, 1024, batch=3, dtype="bfloat16")

    @jax.jit
    def project(x, w):
        shared = qg.quantize_activations(x, x_format)
        return [qg.matmul(shared, w[i], kernel=KERNEL) for i in range(3)]

    for out, weight in zip(project(x[0], w), dense, strict=True):
        assert out.dtype == jnp.bfloat16
        check_product(out, exact[0], weight, limit(x_format, "bfloat16"))


@pytest.mark.parametrize("m", [8, 150])
@pytest.mark.parametrize(("x_format", "format"), FEW_OPERANDS, ids=case_id)
def test_straight_through_gradient(x_format, format, m):
    w, dense, x, exact = operands_of(x_format, format, m, 200, 512)
    g = np.random.default_rng(2).standard_normal((m, 200)).astype(F32)
    function = functools.partial(qg.matmul, w=w, x_format=x_format, straight_through=True, kernel=KERNEL)
    out, pull = jax.vjp(jax.jit(function), x)
    check_product(out, exact, dense, LIMITS[x_format])
    check_product(pull(g)[0], g, dense.T, product_limit("float32"))


@pytest.mark.parametrize("m", [6, 150])
@pytest.mark.parametrize(("x_format", "format"), FEW_OPERANDS, ids=case_id)
def test_rows_that_are_not_finite_are_nan_and_no_others(x_format, format, m):
    w, dense, x, _ = operands_of(x_format, format, m, 200, 512)
    rows = np.array(x)
    rows[1, 7], rows[3, 0], rows[m - 2, 100], rows[2] = np.nan, np.inf, -np.inf, 0
    out = np.asarray(qg.matmul(jnp.asarray(rows), w, x_format=x_format, kernel=KERNEL))
    assert np.isnan(out[[1, 3, m - 2]]).all()
    np.testing.assert_array_equal(out[2], 0)
    kept = np.delete(np.arange(m), [1, 2, 3, m - 2])
    check_product(out[kept], quantized(rows[kept], x_format), dense, LIMITS[x_format])


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 0, 3)], ids=str)
def test_leading_axes(shape):
    w, dense, x, exact = operands_of("int8", qg.int4(64), 6, 48, 192)
    count = int(np.prod(shape))
    out = jax.jit(functools.partial(qg.matmul, x_format="int8", kernel=KERNEL))(x[:count].reshape(*shape, 192), w)
    assert out.shape == (*shape, 48)
    check_product(np.reshape(out, (-1, 48)), exact[:count], dense, LIMITS["int8"])


@pytest.mark.parametrize(("x_format", "format"), FEW_OPERANDS, ids=case_id)
def test_runs_agree_to_the_bit(x_format, format):
    w, _, x, _ = operands_of(x_format, format, 700, 1000, 2048, dtype="bfloat16")
    product = jax.jit(functools.partial(qg.matmul, x_format=x_format, kernel=KERNEL))
    first = np.asarray(product(x, w)).view(np.uint16)
    for _ in range(20):
        np.testing.assert_array_equal(np.asarray(product(x, w)).view(np.uint16), first)


def test_custom_calls_run_inside_a_cuda_graph(tmp_path):
    w, _, x, _ = operands_of("int8", qg.int4(128), 70, 200, 512, batch=6)
    shared = qg.quantize_activations(x[0], "int8")
    kinds = outermost_thunks(tmp_path, lambda x, w: [qg.matmul(x, w[i], kernel=KERNEL) for i in range(6)], shared, w)
    assert "kCommandBuffer" in kinds, kinds
    assert not kinds & {"kCustomCall", "kDynamicSlice"}, kinds


def test_a_replayed_graph_follows_its_buffers():
    """A CUDA graph that XLA records once meets new and donated buffers in later runs."""
    w, dense, _, _ = operands_of("int8", qg.int4(128), 70, 512, 512, batch=4)
    step = jax.jit(
        lambda x, w: x + sum(qg.matmul(x, w[i], x_format="int8", kernel=KERNEL) for i in range(4)), donate_argnums=0
    )
    rng = np.random.default_rng(3)
    kept = []
    for i in range(10):
        x = rng.standard_normal((70, 512)).astype(F32)
        kept.append(jnp.full((1000 * (i + 1),), jnp.nan))
        out = np.asarray(step(jnp.asarray(x), jax.tree.map(lambda a: a + 0, w)), np.float64)
        check_product(out - x, quantized(x, "int8"), dense.sum(0), product_limit("float32"))
