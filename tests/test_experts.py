"""Products with weights chosen by index: their interface, epilogue, derivatives, and indices out of range."""

import functools

import epilogue_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_weight
from jax import export
from test_errors import shape
from test_gemm_sm90 import needs_hopper

import jax_qgemm as qg
from jax_qgemm.formats import get_format
from jax_qgemm.testing import check_product, nmse, product_limit

# What is chosen of four weights: an index out of range is the nearest.
COUNT = 4
EXPERTS, CHOSEN = np.array([3, 0, 3, -2, 9], np.int32), np.array([3, 0, 3, 0, 3])
OTHERS, OTHERS_CHOSEN = np.array([8, -3, 2, -1, 2], np.int32), np.array([3, 0, 2, 0, 2])
K, N = 96, 40
HIGHEST = product_limit("float32", highest=True)
highest = functools.partial(qg.expert_matmul, precision="highest")


@pytest.fixture
def small():
    """A stack of four int4 weights (96, 40), its dense values, and a generator."""
    rng = np.random.default_rng(0)
    w, dense = random_weight(qg.int4(32, symmetric=False), N, K, rng, batch=COUNT)
    return jax.tree.map(jnp.asarray, w), dense, rng


def test_top_k_of_tokens(small):
    """As the docstring has it: x goes to all the experts of its token, or each has a row of its own."""
    w, dense, rng = small
    tokens = rng.standard_normal((6, K)).astype(np.float32)
    logits = rng.standard_normal((6, COUNT)).astype(np.float32)
    _, experts = jax.lax.top_k(logits, 2)
    chosen = dense[np.argsort(-logits, axis=-1)[:, :2]]
    out = jax.jit(highest)(tokens[:, None], w, experts)
    assert out.shape == (6, 2, N)
    check_product(out[:, :, None], np.repeat(tokens[:, None, None], 2, axis=1), chosen, HIGHEST)
    rows = rng.standard_normal((6, 2, K)).astype(np.float32)
    check_product(jax.jit(highest)(rows, w, experts)[:, :, None], rows[:, :, None], chosen, HIGHEST)


@pytest.mark.parametrize("rows", [(), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (0,), (2, 1, 2)], ids=str)
def test_leading_axes(small, lead, rows):
    w, dense, rng = small
    experts = rng.integers(0, COUNT, lead)
    x = rng.standard_normal((*lead, *rows, K)).astype(np.float32)
    out = jax.jit(highest)(x, w, experts)
    assert out.shape == (*lead, *rows, N)
    if out.size:
        check_product(np.reshape(out, (*lead, -1, N)), x.reshape(*lead, -1, K), dense[experts], HIGHEST)


@pytest.mark.parametrize("lead", [(1, 3), (2, 1), (1, 1)], ids=str)
def test_rows_that_go_to_several_experts(small, lead):
    w, dense, rng = small
    experts = rng.integers(0, COUNT, (2, 3))
    x = rng.standard_normal((*lead, 4, K)).astype(np.float32)
    every = np.broadcast_to(x, (2, 3, 4, K))
    out, pull = jax.vjp(lambda x: highest(x, w, experts), x)
    check_product(out, every, dense[experts], HIGHEST)
    g = rng.standard_normal(out.shape).astype(np.float32)
    axes = tuple(i for i in range(2) if lead[i] == 1)
    expected = np.sum(g.astype(np.float64) @ dense[experts].swapaxes(-1, -2), axis=axes, keepdims=True)
    assert nmse(pull(g)[0], expected) <= 1e-11


@pytest.mark.parametrize(
    "experts",
    [
        np.array([-(2**31), -1, 0, 3, 4, 2**31 - 1], np.int32),
        np.array([-(2**63), -(2**32), 2**32 + 1, 3, 2**31, 2**63 - 1]),
        np.array([0, 3, 4, 2**31, 2**32 - 1], np.uint32),
        np.array([0, 3, 2**32, 2**64 - 1], np.uint64),
        np.array([-128, 2, 127], np.int8),
        np.array([2, 255], np.uint8),
        np.array([-(2**15), 1, 2**15 - 1], np.int16),
    ],
    ids=lambda experts: str(experts.dtype),
)
@pytest.mark.parametrize("kernel", ["auto", "dense", "reference"])
def test_an_index_out_of_range_is_the_nearest(small, experts, kernel):
    w, dense, rng = small
    x = rng.standard_normal((len(experts), 1, K)).astype(np.float32)
    expected = dense[[min(max(int(i), 0), COUNT - 1) for i in experts]]
    check_product(highest(x, w, experts, kernel=kernel), x, expected, HIGHEST)
    if experts.dtype.itemsize <= 4:  # 64 bits need jax_enable_x64
        check_product(jax.jit(functools.partial(highest, kernel=kernel))(x, w, experts), x, expected, HIGHEST)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kernel", ["auto", "host", "dense", "reference"])
def test_kernels_by_name(kernel, dtype):
    rng = np.random.default_rng(1)
    w, dense = random_weight(get_format("q5_k"), 72, 256, rng, batch=COUNT)
    x = jnp.asarray(rng.standard_normal((5, 9, 256)), dtype)
    limit = product_limit(dtype, minimums=True)
    out, pull = jax.vjp(lambda x: qg.expert_matmul(x, w, EXPERTS, kernel=kernel), x)
    check_product(out, x, dense[CHOSEN], limit)
    check_product(pull(out)[0], out, dense[CHOSEN].swapaxes(1, 2), limit)


@pytest.mark.parametrize("m", [1, 40])
def test_every_instruction_set(instruction_set, small, m):
    """A row of x takes another way through the CPU kernel than several do; the derivative a third."""
    w, dense, rng = small
    x = rng.standard_normal((5, m, K)).astype(np.float32)
    out, pull = jax.vjp(lambda x: highest(x, w, EXPERTS), x)
    check_product(out, x, dense[CHOSEN], HIGHEST)
    check_product(pull(out)[0], out, dense[CHOSEN].swapaxes(1, 2), HIGHEST)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("format", ["q4_0", "q4_k", "q6_k", "int4", "int8"])
@pytest.mark.parametrize(
    ("kernel", "m"),
    [
        ("gemv", 1), ("gemv", 8), ("gemv", 40), ("gemv_sm90", 12), ("gemv_sm90", 64), ("gemm_sm80", 3),
        ("gemm_sm80", 70), ("gemm_sm90", 70), ("gemm_sm90", 300), ("dense", 20), ("auto", 1), ("auto", 20),
        ("auto", 100),
    ],
)  # fmt: skip
def test_gpu_kernels(kernel, m, format, dtype):
    if kernel.endswith("sm90"):
        needs_hopper()
    rng = np.random.default_rng(m)
    w, dense = random_weight(get_format(format), 330, 1024, rng, batch=COUNT)
    x = jnp.asarray(rng.standard_normal((5, m, 1024)), dtype)
    limit = product_limit(dtype, minimums=format == "q4_k")
    out, pull = jax.vjp(jax.jit(lambda x: qg.expert_matmul(x, w, EXPERTS, kernel=kernel)), x)
    check_product(out, x, dense[CHOSEN], limit)
    check_product(pull(out)[0], out, dense[CHOSEN].swapaxes(1, 2), limit)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_gpu_decoding_of_tokens(seed):
    """One row for each token and expert, some of them out of range."""
    rng = np.random.default_rng(seed)
    w, dense = random_weight(get_format("q4_0"), 512, 1024, rng, batch=32)
    w = jax.tree.map(jnp.asarray, w)
    function = jax.jit(qg.expert_matmul)
    for tokens in (1, 7, 64):
        x = jnp.asarray(rng.standard_normal((tokens, 8, 1024)), jnp.bfloat16)
        experts = rng.integers(-3, 35, (tokens, 8)).astype(np.int32)
        expected = dense[np.clip(experts, 0, 31)]
        check_product(function(x, w, experts)[:, :, None], x[:, :, None], expected, product_limit("bfloat16"))


@pytest.mark.parametrize("kernel", ["auto", "dense", "reference"])
@pytest.mark.parametrize("bias_dtype", [None, "float16", "float32"])
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_epilogue(small, activation, bias_dtype, kernel):
    w, dense, rng = small
    x = rng.standard_normal((5, 3, K)).astype(np.float32)
    bias = None if bias_dtype is None else rng.standard_normal((COUNT, N)).astype(bias_dtype)
    out = jax.jit(functools.partial(highest, activation=activation, kernel=kernel))(x, w, EXPERTS, bias=bias)
    of_entry = 0.0 if bias is None else bias.astype(np.float64)[CHOSEN, None]
    expected = oracle.fused(x.astype(np.float64), dense[CHOSEN], bias=of_entry, activation=activation)
    assert nmse(out, expected) <= 1e-11


@pytest.mark.parametrize("mapped", ["x", "experts", "bias", "x experts", "w", "w bias", "x w experts bias"])
def test_vmap_of_an_epilogue(small, mapped):
    """One call, but where biases alone are mapped."""
    w, dense, rng = small
    names = ("x", "w", "experts", "bias")
    two = {
        "x": rng.standard_normal((2, 5, 3, K)).astype(np.float32),
        "w": jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), w),
        "experts": np.stack([EXPERTS, OTHERS]),
        "bias": rng.standard_normal((2, COUNT, N)).astype(np.float32),
    }
    values = {n: v if n in mapped.split() else jax.tree.map(lambda a: a[0], v) for n, v in two.items()}
    function = jax.vmap(
        lambda x, w, experts, bias: highest(x, w, experts, bias=bias, activation="silu"),
        [0 if n in mapped.split() else None for n in names],
    )
    out = jax.jit(function)(*(values[n] for n in names))
    exact = {
        "x": two["x"],
        "w": np.stack([dense, dense[::-1]]),
        "experts": np.stack([CHOSEN, OTHERS_CHOSEN]),
        "bias": two["bias"],
    }
    for i in range(2):
        of = {n: exact[n][i if n in mapped.split() else 0] for n in names}
        bias = of["bias"].astype(np.float64)[of["experts"], None]
        expected = oracle.fused(of["x"].astype(np.float64), of["w"][of["experts"]], bias=bias, activation="silu")
        assert nmse(out[i], expected) <= 1e-11
    one_call = str(jax.make_jaxpr(function)(*(values[n] for n in names))).count("= qmatmul_fused[") == 1
    assert one_call == (mapped != "bias")


def test_gradients_of_an_epilogue(small):
    """In x and bias, of each expert the sum over its entries, by differences in float64."""
    w, dense, rng = small
    x = rng.standard_normal((5, 3, K)).astype(np.float32)
    bias = rng.standard_normal((COUNT, N)).astype(np.float32)
    weights = rng.standard_normal((5, 3, N))

    def loss(x, bias):
        return jnp.sum(highest(x, w, EXPERTS, bias=bias, activation="gelu_tanh") * weights)

    def exact(x, bias):
        return np.sum(oracle.fused(x, dense[CHOSEN], bias=bias[CHOSEN, None], activation="gelu_tanh") * weights)

    dx, dbias = (np.asarray(g, np.float64) for g in jax.jit(jax.grad(loss, (0, 1)))(x, bias))
    assert not dbias[[1, 2]].any()  # chosen by nobody
    x, bias = x.astype(np.float64), bias.astype(np.float64)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        a, b = rng.standard_normal(x.shape), rng.standard_normal(bias.shape)
        slope = (exact(x + 1e-6 * a, bias + 1e-6 * b) - exact(x - 1e-6 * a, bias - 1e-6 * b)) / 2e-6
        np.testing.assert_allclose(np.sum(dx * a) + np.sum(dbias * b), slope, rtol=1e-4)


def test_second_derivatives_and_linear_transposes(small):
    w, dense, rng = small
    x = rng.standard_normal((5, K)).astype(np.float32)
    hessian = jax.jit(jax.hessian(lambda x: 0.5 * jnp.sum(highest(x, w, EXPERTS) ** 2)))(x)
    for i in range(5):
        assert nmse(hessian[i, :, i], dense[CHOSEN[i]] @ dense[CHOSEN[i]].T) <= 1e-11
    product = functools.partial(highest, w=w, experts=EXPERTS)
    twice = jax.linear_transpose(jax.linear_transpose(product, x), np.ones((5, N), np.float32))
    check_product(twice((x,))[0][:, None], x[:, None], dense[CHOSEN], HIGHEST)


def test_weights_and_experts_get_no_gradient(small):
    w, _, rng = small
    x = rng.standard_normal((5, K)).astype(np.float32)
    grads = jax.grad(lambda *a: jnp.sum(highest(x, *a)), (0, 1), allow_int=True)(w, jnp.asarray(EXPERTS))
    assert all(leaf.dtype == jax.dtypes.float0 for leaf in jax.tree.leaves(grads))


def test_metadata_of_checkpoints():
    """permutation, input_scale and global_scale of each expert."""
    rng = np.random.default_rng(2)
    w, dense = random_weight(get_format("nvfp4"), 48, 128, rng, batch=COUNT)
    permutation = np.stack([rng.permutation(128) for _ in range(COUNT)]).astype(np.int32)
    input_scale = rng.uniform(0.5, 2, (COUNT, 128)).astype(np.float32)
    global_scale = rng.uniform(0.5, 2, COUNT).astype(np.float32)
    w = qg.QTensor(
        w.planes, w.format, w.padding,
        permutation=jnp.asarray(permutation), input_scale=jnp.asarray(input_scale),
        global_scale=jnp.asarray(global_scale),
    )  # fmt: skip
    logical = np.empty_like(dense)
    for e in range(COUNT):
        logical[e, permutation[e]] = dense[e] * np.float64(global_scale[e]) / input_scale[e, :, None].astype(np.float64)
    for x in (rng.standard_normal((5, 7, 128)), rng.standard_normal((5, 128))):
        x = x.astype(np.float32)
        out = jax.jit(qg.expert_matmul)(x, w, EXPERTS)
        limit = product_limit("float32")
        check_product(out.reshape(5, -1, 48), x.reshape(5, -1, 128), logical[CHOSEN], limit)


def test_export_with_symbolic_tokens(small):
    w, dense, rng = small
    (t,) = export.symbolic_shape("t")
    shapes = shape(t, 1, K), shape(t, 2, dtype=jnp.int32)
    checks = qg.export_safety_checks()
    function = jax.jit(lambda x, experts: highest(x, w, experts, activation="relu"))
    loaded = export.deserialize(export.export(function, disabled_checks=checks)(*shapes).serialize())
    for tokens in (1, 5):
        x = rng.standard_normal((tokens, 1, K)).astype(np.float32)
        experts = rng.integers(0, COUNT, (tokens, 2)).astype(np.int32)
        expected = np.maximum(x.astype(np.float64)[:, :, None] @ dense[experts], 0)
        assert nmse(loaded.call(x, experts)[:, :, None], expected) <= 1e-11
