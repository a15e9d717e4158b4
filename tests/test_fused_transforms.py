"""Batches, scans and exports of products with an epilogue, against float64 item by item."""

import itertools

import epilogue_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_operands import LIMIT, NAMES, SIZE, K, M, N, apply, count, operands
from jax import export

import jax_qgemm as qg
from jax_qgemm.testing import nmse


def check_vmap(names, gated):
    data = operands(gated, dict.fromkeys(names, (SIZE,)))
    function = jax.vmap(apply(gated), [0 if name in names else None for name in NAMES])
    values = [data.values[name] for name in NAMES]
    out = jax.jit(function)(*values)
    expected = np.stack([data.expected(**dict.fromkeys(names, i)) for i in range(SIZE)])
    assert nmse(out, expected) <= LIMIT
    one_call = count("qmatmul_fused", function, *values) == 1
    assert one_call == ("w" in names or ("x" in names and not {"scale", "bias"} & set(names)))
    assert count("qmatmul", function, *values) == (not one_call)
    jaxpr = str(jax.make_jaxpr(function)(*values))
    if "w" not in names:
        assert f"u32[{SIZE}," not in jaxpr
    if "bias" not in names:
        assert f"f32[{SIZE},{data.values['bias'].shape[-1]}]" not in jaxpr


every_set = pytest.mark.parametrize(
    "names", [names for count in range(1, 6) for names in itertools.combinations(NAMES, count)], ids="+".join
)
either = pytest.mark.parametrize("gated", [False, True], ids=["fused", "gated"])


@either
@every_set
def test_vmap(names, gated):
    """Over every set of the operands; weights are never copied, nor is a bias that all weights share."""
    check_vmap(names, gated)


@pytest.mark.gpu
@either
@every_set
def test_gpu_vmap(names, gated):
    check_vmap(names, gated)


@either
@pytest.mark.parametrize("seed", range(12))
def test_nested_vmap(seed, gated):
    """Two levels, each over its own set of the operands and along its own axes."""
    rng = np.random.default_rng(seed)
    levels = [[n for n in NAMES if rng.random() < 0.5] or ["w"] for _ in range(2)]
    sizes = 2, 3
    axes = {n: tuple(size for level, size in zip(levels, sizes, strict=True) if n in level) for n in NAMES}
    data = operands(gated, axes, seed)
    function = apply(gated)
    for level in reversed(levels):
        function = jax.vmap(
            function, [0 if n in level else None for n in NAMES], out_axes=1 if level is levels[1] else 0
        )
    out = jax.jit(function)(*(data.values[n] for n in NAMES))
    for i, j in itertools.product(*map(range, sizes)):
        index = {n: tuple(v for level, v in zip(levels, (i, j), strict=True) if n in level) for n in NAMES if axes[n]}
        assert nmse(out[i, :, j], data.expected(**index)) <= LIMIT, (levels, i, j)


def test_vmap_along_other_axes():
    data = operands(True, dict.fromkeys(("x", "w", "bias", "residual"), (SIZE,)))
    x, w, scale, bias, residual = (data.values[n] for n in NAMES)
    function = jax.vmap(apply(True), (1, 0, None, 1, 2), out_axes=1)
    out = jax.jit(function)(x.swapaxes(0, 1), w, scale, np.swapaxes(bias, 0, 1), np.moveaxis(residual, 0, 2))
    index = {n: slice(None) for n in ("x", "w", "bias", "residual")}
    expected = [data.expected(**dict.fromkeys(index, i)) for i in range(SIZE)]
    assert nmse(jnp.swapaxes(out, 0, 1), np.stack(expected)) <= LIMIT


@either
def test_scan_over_stacked_layers(gated):
    """With the residual stream of a network, and its derivative."""
    layers = operands(gated, dict.fromkeys(("w", "scale", "bias"), (SIZE,)))
    x = np.random.default_rng(1).standard_normal((M, K)).astype(np.float32)

    def widen(y):  # (M, N) to (M, K)
        return jnp.concatenate([y, y], axis=-1)

    def step(x, layer):
        w, scale, bias = layer
        return widen(apply(gated)(x, w, scale, bias, x[:, :N])) / 2, None

    stacked = tuple(layers.values[n] for n in ("w", "scale", "bias"))
    run = jax.jit(lambda x: jax.lax.scan(step, x, stacked)[0])
    function = oracle.gated if gated else oracle.fused

    def expected(x):
        for i in range(SIZE):
            item = layers.item(w=i, bias=i, scale=i)
            options = {"scale": item["scale"], "bias": item["bias"], "residual": x[:, :N]}
            y = function(x, item["w"], activation="silu", **options)
            x = np.concatenate([y, y], axis=-1) / 2
        return x

    assert nmse(run(x), expected(np.float64(x))) <= 10 * LIMIT
    direction = np.random.default_rng(2).standard_normal((M, K))
    gradient = np.float64(jax.grad(lambda x: jnp.sum(run(x)))(x))
    slope = (expected(x + 1e-6 * direction).sum() - expected(x - 1e-6 * direction).sum()) / 2e-6
    np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-4)


@either
def test_export_with_symbolic_m(gated):
    data = operands(gated)
    x, w, scale, bias, residual = (data.values[n] for n in NAMES)
    (m,) = export.symbolic_shape("m")
    shapes = [jax.ShapeDtypeStruct((m, a.shape[-1]), jnp.float32) for a in (x, residual)]

    def function(x, residual):
        return apply(gated)(x, w, scale, bias, residual)

    checks = qg.export_safety_checks()
    exported = export.export(jax.jit(function), disabled_checks=checks)(*shapes)
    loaded = export.deserialize(exported.serialize())
    assert nmse(loaded.call(x, residual), data.expected()) <= LIMIT


def test_other_platforms_get_the_reference():
    data = operands(True)
    checks = qg.export_safety_checks()
    exporter = export.export(jax.jit(apply(True)), platforms=["cpu", "tpu"], disabled_checks=checks)
    module = exporter(*(data.values[n] for n in NAMES)).mlir_module()
    assert "jax_qgemm.fused_matmul.v1" in module
    assert "dot_general" in module
