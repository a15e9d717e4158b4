"""Products with an epilogue and gated ones against float64, their edge values, and the interleaved weight."""

import functools

import cases
import epilogue_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, FusedCase, pack, random_weight

import jax_qgemm as qg
from jax_qgemm.testing import nmse, product_limit

ACTIVATIONS = tuple(oracle.ACTIVATIONS)
Q4_0 = qg.formats.get_format("q4_0")


@functools.partial(jax.jit, static_argnames=("gated", "activation", "out_dtype", "precision", "kernel"))
def run(x, w, bias=None, residual=None, *, gated=False, **options):
    return (qg.gated_matmul if gated else qg.matmul)(x, w, bias=bias, residual=residual, **options)


def with_scale(w, scale):
    return qg.QTensor(w.planes, w.format, w.padding, global_scale=scale)


def float64(array):
    return np.asarray(array).astype(np.float64)


def check_errors(out, expected, energy, limit, out_dtype):
    """Errors of the sums, whose relative square is at most `limit`, as the epilogue passes them on (`energy` is that of
    the sums times the squared slope), and the result's rounding: over everything, and 10 times that in every row and
    column of 16 or more elements."""
    out = float64(out)
    assert out.shape == expected.shape
    rounding = product_limit(out_dtype) if out_dtype != "float32" else product_limit("float32", highest=True)
    error, allowed = (out - expected) ** 2, limit * energy + rounding * expected**2
    assert error.sum() <= allowed.sum(), nmse(out, expected)
    for axis in (0, 1):
        if out.shape[axis] >= 16:
            assert (error.sum(axis) <= 10 * allowed.sum(axis)).all(), f"axis {axis}"


def check_case(case: FusedCase) -> None:
    rng = case.rng()
    x = (rng.standard_normal((case.m, case.k)) / max(case.k, 1) ** 0.5).astype(case.dtype)
    parts = [random_weight(case.format, case.n, case.k, rng) for _ in range(2 if case.gated else 1)]
    w = qg.interleave_gate_up(*(w for w, _ in parts)) if case.gated else parts[0][0]
    dense = [dense for _, dense in parts]

    def values(dtype, *shape):
        return None if dtype is None else rng.standard_normal(shape).astype(jnp.dtype(dtype))

    biases = [values(case.bias, case.n) for _ in parts]
    bias = None if case.bias is None else qg.interleave_gate_up(*biases) if case.gated else biases[0]
    residual = values(case.residual, case.m, case.n)
    scale = np.float32(0.37) if case.scale else None
    out = run(
        x, with_scale(w, scale), bias, residual, gated=case.gated, activation=case.activation,
        out_dtype=case.out_dtype, precision=case.precision,
    )  # fmt: skip
    assert out.dtype == jnp.dtype(case.out_dtype)

    x, scale = float64(x), 1.0 if scale is None else float64(scale)
    sums = [scale * (x @ d) + (0.0 if b is None else float64(b)) for d, b in zip(dense, biases, strict=True)]
    energies = [scale**2 * (x**2 @ d**2) for d in dense]
    residual = 0.0 if residual is None else float64(residual)
    slope = 1.0 if case.activation is None else 1.13  # the steepest of these activations, gelu at sqrt(2)
    value = oracle.activate(case.activation, sums[0])
    energy = slope**2 * energies[0]
    if case.gated:
        value, energy = value * sums[1], energy * sums[1] ** 2 + value**2 * energies[1]
    check_errors(out, value + residual, energy, case.limit, case.out_dtype)


@pytest.mark.parametrize("case", cases.fused_cases(), ids=str)
def test_cover(case):
    check_case(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.gpu_fused_cases(), ids=str)
def test_gpu_cover(case):
    check_case(case)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_host_instruction_sets(instruction_set, activation, gated):
    """The cover runs the best one that the CPU has."""
    for m, n, x_type in ((1, 48, "bfloat16"), (131, 176, "float32 highest"), (7, 16, "float32")):
        operands = {"scale": True, "bias": "float16", "residual": "bfloat16", "out_dtype": "float32"}
        check_case(FusedCase(Q4_0, m, n, "tail", x_type, activation=activation, gated=gated, **operands))


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("has_bias", "has_residual"), [(False, False), (True, False), (False, True), (True, True)])
def test_every_combination(activation, has_bias, has_residual, gated, kernel):
    """In full float32, with leading axes: the reference is held to what the kernels are."""
    rng = np.random.default_rng(0)
    halves = [random_weight(qg.int4(32, symmetric=False), 48, 96, rng) for _ in range(2)]
    w = qg.interleave_gate_up(*(w for w, _ in halves))
    dense = halves[0][1], halves[1][1]
    x = (rng.standard_normal((2, 3, 96)) / 10).astype(np.float32)
    biases = [rng.standard_normal(48).astype(np.float32) if has_bias else np.zeros(48, np.float32) for _ in range(2)]
    residual = rng.standard_normal((2, 3, 48)).astype(np.float32) if has_residual else None
    options = {"activation": activation, "precision": "highest", "kernel": kernel}
    oracle_options = {"activation": activation, "residual": 0 if residual is None else float64(residual)}
    if gated:
        bias = qg.interleave_gate_up(*biases) if has_bias else None
        out = run(x, w, bias, residual, gated=True, **options)
        expected = oracle.gated(float64(x), dense, bias=[float64(b) for b in biases], **oracle_options)
        pair = tuple(w for w, _ in halves)
        composed = run(x, pair, tuple(biases) if has_bias else None, residual, gated=True, **options)
        assert nmse(composed, expected) <= 1e-11
    else:
        out = run(x, halves[0][0], biases[0] if has_bias else None, residual, **options)
        expected = oracle.fused(float64(x), dense[0], bias=float64(biases[0]), **oracle_options)
    assert out.shape == (2, 3, 48)
    assert nmse(out, expected) <= 1e-11


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("gated", [False, True])
def test_results_are_rounded_once(gated, out_dtype):
    """All but the few whose exact value lies next to the middle of two numbers; rounding twice would miss many."""
    rng = np.random.default_rng(1)
    halves = [random_weight(Q4_0, 256, 256, rng) for _ in range(2)]
    x = (rng.standard_normal((32, 256)) / 16).astype(jnp.bfloat16)
    residual = rng.standard_normal((32, 256)).astype(np.float32)
    options = {"activation": "silu", "residual": residual}
    if gated:
        expected = oracle.gated(float64(x), [d for _, d in halves], **options)
        weights = [qg.interleave_gate_up(*(w for w, _ in halves)), tuple(w for w, _ in halves)]
    else:
        expected, weights = oracle.fused(float64(x), halves[0][1], **options), [halves[0][0]]
    for w in weights:
        out = np.asarray(run(x, w, residual=residual, gated=gated, activation="silu", out_dtype=out_dtype))
        assert np.mean(out == expected.astype(jnp.dtype(out_dtype))) > 0.99


# The activations.

IDENTITY = pack(
    {"codes": np.eye(16, dtype=np.uint8), "scales": np.full((16, 1), 1, np.float32).view(np.uint32)},
    qg.int8(-1, scale_dtype="float32"), 16, 16,
)  # fmt: skip


def check_activation(activation, **options):
    grid = np.linspace(-12, 12, 1 << 14)
    large = np.outer(
        [1, -1], [13, 20, 50, 87, 89, 100, 104, 1e3, 1e10, 1e20, 3e38, 1e-3, 1e-10, 1e-20, 1e-30, 0]
    ).ravel()
    v = np.concatenate([grid, large]).astype(np.float32).reshape(-1, 16)
    out = float64(run(v, IDENTITY, activation=activation, precision="highest", **options))
    expected = oracle.activate(activation, v)
    # Relative to v, which the result never exceeds: as good as a float32 sum of a few terms.
    assert (np.abs(out - expected) <= 3e-7 * np.abs(v)).all()
    special = np.resize(np.array([np.nan, np.inf, -np.inf], np.float32), 16)  # as the bias, since 0 * inf is NaN
    out = float64(run(np.zeros((1, 16), np.float32), IDENTITY, special, activation=activation, **options))
    np.testing.assert_array_equal(out[0], oracle.activate(activation, special))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(instruction_set, activation):
    """Over their whole range and at the special values: infinities become what jax.nn makes of them, NaN stays."""
    check_activation(activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_reference(activation):
    check_activation(activation, kernel="reference")


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gpu_activations(activation):
    check_activation(activation)


# Edges.


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_nan_and_inf_stay_in_their_rows(bad, activation, gated, m):
    rng = np.random.default_rng(2)
    w, _ = random_weight(qg.formats.get_format("q4_k"), 64, 256, rng)
    x = rng.standard_normal((m, 256)).astype(np.float32)
    clean = np.asarray(run(x, w, gated=gated, activation=activation))
    x[[1, m - 1], [7, 200]] = bad
    out = np.asarray(run(x, w, gated=gated, activation=activation))
    np.testing.assert_array_equal(np.delete(out, [1, m - 1], 0), np.delete(clean, [1, m - 1], 0))
    if np.isnan(bad):
        assert np.isnan(out[[1, m - 1]]).all()


@pytest.mark.parametrize("m", [0, 3, 40])
@pytest.mark.parametrize("gated", [False, True])
def test_no_k_at_all_leaves_the_epilogue(gated, m):
    format = qg.int8(-1)
    planes = [jnp.zeros(format.plane_shape(plane, 32, 0), format.plane_dtype(plane)) for plane in format.planes]
    w = qg.QTensor(tuple(planes), format, (0, 0))
    bias, residual = np.arange(32, dtype=np.float32), np.ones((m, 16 if gated else 32), np.float32)
    out = run(np.zeros((m, 0), np.float32), w, bias, residual, gated=gated, activation="relu")
    expected = np.arange(16) * np.arange(16, 32) if gated else np.arange(32)
    np.testing.assert_array_equal(np.asarray(out), np.broadcast_to(expected + 1, out.shape))


@pytest.mark.parametrize("gated", [False, True])
def test_no_columns_at_all(gated):
    planes = [jnp.zeros(Q4_0.plane_shape(plane, 0, 64), Q4_0.plane_dtype(plane)) for plane in Q4_0.planes]
    w = qg.QTensor(tuple(planes), Q4_0)
    out = run(np.ones((3, 64), np.float32), w, np.zeros(0, np.float32), gated=gated, activation="silu")
    assert out.shape == (3, 0)


@pytest.mark.parametrize("gated", [False, True])
def test_elements_depend_on_their_row_and_column_alone(instruction_set, gated):
    """Whatever else is in the batch, and so however the work is divided."""
    rng = np.random.default_rng(3)
    w, _ = random_weight(Q4_0, 160, 1024, rng)
    x = rng.standard_normal((259, 1024)).astype(np.float32)
    residual = rng.standard_normal((259, 80 if gated else 160)).astype(np.float32)
    full = np.asarray(run(x, w, None, residual, gated=gated, activation="gelu"))
    for m in (1, 2, 5, 131):
        np.testing.assert_array_equal(run(x[:m], w, None, residual[:m], gated=gated, activation="gelu"), full[:m])
    part = qg.QTensor(tuple(p[:6] for p in w.planes), w.format)
    out = run(x[:7], part, None, residual[:7, : 48 if gated else 96], gated=gated, activation="gelu")
    np.testing.assert_array_equal(out, full[:7, : 48 if gated else 96])


# The interleaved weight.


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_interleaved_weight(format):
    """16 columns of each in turn, to the bit; stacked too; slices of n and of the stack are interleaved weights."""
    rng = np.random.default_rng(4)
    k = cases.k_of("tail", format)
    (gate, dense_gate), (up, dense_up) = (random_weight(format, 64, k, rng, batch=2) for _ in range(2))
    w = qg.interleave_gate_up(gate, up)
    assert (w.shape, w.padding, w.nbytes) == ((2, k, 128), gate.padding, gate.nbytes + up.nbytes)
    tiles = [d.reshape(2, k, 4, 16) for d in (dense_gate, dense_up)]
    expected = np.stack(tiles, axis=3).reshape(2, k, 128)
    np.testing.assert_array_equal(np.asarray(w.dequantize()), expected.astype(np.float32))
    np.testing.assert_array_equal(
        qg.interleave_gate_up(*map(jnp.float32, (dense_gate, dense_up))), jnp.float32(expected)
    )
    np.testing.assert_array_equal(w[1].dequantize(), qg.interleave_gate_up(gate[1], up[1]).dequantize())
    half = jax.tree.map(lambda plane: plane[1, :4], w)
    np.testing.assert_array_equal(half.dequantize(), expected[1, :, :64].astype(np.float32))


def test_checkpoint_metadata():
    """One permutation and input_scale for both halves; a global_scale of each goes with the pair."""
    rng = np.random.default_rng(5)
    halves = [random_weight(qg.formats.get_format("nvfp4"), 32, 128, rng) for _ in range(2)]
    permutation = jnp.asarray(rng.permutation(128).astype(np.int32))
    input_scale = jnp.asarray(rng.uniform(0.5, 2, 128).astype(np.float32))
    gate, up = (qg.QTensor(w.planes, w.format, permutation=permutation, input_scale=input_scale) for w, _ in halves)
    x = (rng.standard_normal((5, 128)) / 10).astype(np.float32)
    dense = [float64(w.dequantize()) for w in (gate, up)]
    expected = oracle.gated(float64(x), dense, activation="silu")
    out = run(x, qg.interleave_gate_up(gate, up), gated=True, activation="silu", precision="highest")
    assert nmse(out, expected) <= 1e-11

    scaled = tuple(with_scale(w, np.float32(s)) for (w, _), s in zip(halves, (0.5, 3), strict=True))
    expected = oracle.gated(float64(x), (0.5 * halves[0][1], 3 * halves[1][1]), activation="silu")
    assert nmse(run(x, scaled, gated=True, activation="silu", precision="highest"), expected) <= 1e-11


def test_a_pair_of_two_formats():
    rng = np.random.default_rng(6)
    halves = [random_weight(qg.formats.get_format(name), 37, 256, rng) for name in ("q4_k", "q6_k")]
    x = (rng.standard_normal((5, 256)) / 16).astype(np.float32)
    out = run(x, tuple(w for w, _ in halves), gated=True, activation="gelu_tanh", precision="highest")
    assert nmse(out, oracle.gated(float64(x), [d for _, d in halves], activation="gelu_tanh")) <= 1e-11
