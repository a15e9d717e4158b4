"""What the ops compile to: custom calls, nothing dense, no copies of slices, CUDA graphs."""

import dataclasses
import functools
import math
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, random_weight
from jax import export

import jax_qgemm as qg
from jax_qgemm._registration import FUSED_MATMUL_TARGET, MATMUL_TARGET
from jax_qgemm.testing import check_product, product_limit

needs_cuda_build = pytest.mark.skipif(not qg.build_info().cuda, reason="needs a build with CUDA")
M, K, N, LAYERS = 5, 512, 384, 7  # no packed array has k * n words, of one layer or of all


def _weight(format, batch=None):
    w, dense = random_weight(format, N, K, np.random.default_rng(0), batch=batch)
    return jax.tree.map(jnp.asarray, w), dense


def _loss(x, w):
    return jnp.sum(qg.matmul(x, w).astype(jnp.float32) ** 2)


def _scan(x, stacked):
    return jax.lax.scan(lambda _, w: (None, qg.matmul(x, w)), None, stacked)[1]


def _unrolled(x, stacked):
    return jnp.stack([qg.matmul(x, stacked[i]) for i in range(LAYERS)])


def _epilogue(x, w):
    return qg.matmul(x, w, bias=x[0, :N], activation="silu", residual=x[:, :N])


def _gated(x, w):  # any weight of a multiple of 32 columns holds a gate and what it opens
    return qg.gated_matmul(x, w, bias=x[0, :N], residual=x[:, : N // 2])


# name: function of x and a weight, batch of the weight, custom calls in its module
OPS = {
    "matmul": (qg.matmul, None, 1),
    "epilogue": (_epilogue, None, 1),
    "gated": (_gated, None, 1),
    "vmap of gated": (jax.vmap(_gated, (None, 0)), LAYERS, 1),
    "grad of gated": (jax.grad(lambda x, w: jnp.sum(_gated(x, w).astype(jnp.float32))), None, 2),
    "grad": (jax.grad(_loss), None, 2),
    "vmap over x": (jax.vmap(qg.matmul, (0, None)), None, 1),
    "vmap over w": (jax.vmap(qg.matmul, (None, 0)), LAYERS, 1),
    "scan": (_scan, LAYERS, 1),
    "unrolled": (_unrolled, LAYERS, LAYERS),
}


def _calls(module):
    return sum(module.count(f"custom_call @{target}") for target in (MATMUL_TARGET, FUSED_MATMUL_TARGET))


def _export(function, *arguments):
    checks = qg.export_safety_checks()
    return export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments)


@needs_cuda_build
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("op", OPS)
def test_cuda_lowering_exports(op, dtype):
    function, batch, calls = OPS[op]
    w, _ = _weight(qg.formats.get_format("q4_k"), batch)
    module = _export(function, jax.ShapeDtypeStruct((M, K), dtype), w).mlir_module()
    assert _calls(module) == calls
    assert (FUSED_MATMUL_TARGET in module) == (op in ("epilogue", "gated", "vmap of gated"))


@needs_cuda_build
@pytest.mark.parametrize("format", cases.ALL_FORMATS, ids=str)
def test_cuda_lowering_of_every_format(format):
    w, _ = random_weight(format, 48, format.k_block, np.random.default_rng(0))
    module = _export(jax.grad(_loss), jax.ShapeDtypeStruct((M, format.k_block), jnp.bfloat16), w).mlir_module()
    assert module.count(f"custom_call @{MATMUL_TARGET}") == 2
    assert f'format = "{format.name}"' in module
    assert "transpose = true" in module


@needs_cuda_build
def test_cuda_lowering_with_symbolic_m():
    w, _ = _weight(qg.int4(128))
    (m,) = export.symbolic_shape("m")
    exported = _export(qg.matmul, jax.ShapeDtypeStruct((m, K), jnp.bfloat16), w)
    assert f"custom_call @{MATMUL_TARGET}" in exported.mlir_module()
    assert str(exported.out_avals[0].shape) == f"(m, {N})"


@needs_cuda_build
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh", "relu"])
def test_cuda_lowering_of_an_epilogue(activation):
    w, _ = _weight(qg.int4(128))
    function = functools.partial(qg.gated_matmul, activation=activation)
    module = _export(function, jax.ShapeDtypeStruct((M, K), jnp.bfloat16), w).mlir_module()
    assert f'activation = "{activation or "none"}"' in module
    assert "gated = true" in module


@needs_cuda_build
@pytest.mark.parametrize(
    ("kernel", "m", "k", "dtype", "format", "reasons"),
    [
        ("gemv", 65, 256, "bfloat16", qg.formats.get_format("q4_0"), ["x has 65 rows of bfloat16, more than 64"]),
        ("gemv", 9, 256, "float32", qg.formats.get_format("q4_0"), ["x has 9 rows of float32, more than 8"]),
        ("gemv", 8, 256, "float16", qg.int8(16), ["integer groups of 32 and more"]),
        (
            "gemv",
            65,
            256,
            "bfloat16",
            qg.int4(16, scale_dtype="float32"),
            ["65 rows", "groups of 32", "16-bit scales"],
        ),
        ("gemm_sm90", 65, 256, "float32", qg.formats.get_format("q4_0"), ["float16 and bfloat16 x"]),
        ("gemm_sm90", 65, 256, "float16", qg.formats.get_format("mxfp4"), ["float16 can't hold"]),
        ("gemm_sm90", 65, 204, "float16", qg.int4(-1, scale_dtype="float32"), ["k = 204", "16-bit scales"]),
    ],
    ids=str,
)
def test_a_forced_kernel_refuses_with_every_reason(kernel, m, k, dtype, format, reasons):
    w, _ = random_weight(format, 48, k, np.random.default_rng(0))
    with pytest.raises(ValueError, match=f"kernel='{kernel}' can't serve") as error:
        _export(functools.partial(qg.matmul, kernel=kernel), jax.ShapeDtypeStruct((m, k), dtype), w)
    assert all(reason in str(error.value) for reason in reasons)


@needs_cuda_build
@pytest.mark.parametrize("kernel", ["gemv", "gemv_sm90", "gemm_sm80", "gemm_sm90"])
def test_a_forced_kernel_leaves_the_derivative_to_its_own(kernel):
    w, _ = _weight(qg.formats.get_format("q4_0"))
    loss = lambda x, w: jnp.sum(qg.matmul(x, w, kernel=kernel) ** 2)  # noqa: E731
    module = _export(jax.grad(loss), jax.ShapeDtypeStruct((M, K), jnp.bfloat16), w).mlir_module()
    assert module.count(f'kernel = "{kernel}"') == 1
    assert module.count('kernel = "auto"') == 1


@needs_cuda_build
def test_take_exports_for_cuda_without_a_custom_call():
    w, _ = _weight(qg.formats.get_format("q6_k"))
    exported = _export(qg.take, w, jax.ShapeDtypeStruct((3,), jnp.int32))
    assert exported.out_avals[0].shape == (3, K)


@pytest.mark.parametrize("op", OPS)
def test_a_build_without_cuda_refuses_to_lower_for_cuda(op, monkeypatch):
    """It says so, instead of leaving an unknown custom call to be found on the GPU."""
    info = dataclasses.replace(qg.build_info(), cuda=False, cuda_version=None, cuda_architectures=())
    monkeypatch.setattr("jax_qgemm._registration.build_info", lambda: info)
    function, batch, _ = OPS[op]
    w, _ = _weight(qg.formats.get_format("q4_0"), batch)
    with pytest.raises(RuntimeError, match=r"built without CUDA.*JAX_QGEMM_CUDA"):
        _export(function, jax.ShapeDtypeStruct((M, K), jnp.float32), w)


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_other_platforms_get_the_reference(platform):
    w, _ = _weight(qg.formats.get_format("q4_0"))
    checks = qg.export_safety_checks()
    exported = export.export(jax.jit(qg.matmul), platforms=[platform], disabled_checks=checks)
    module = exported(jax.ShapeDtypeStruct((M, K), jnp.float32), w).mlir_module()
    assert MATMUL_TARGET not in module
    assert "dot_general" in module


def test_one_module_for_several_platforms():
    w, dense = _weight(qg.formats.get_format("q4_0"))
    x = np.random.default_rng(1).standard_normal((M, K)).astype(np.float32)
    checks = qg.export_safety_checks()
    exported = export.export(jax.jit(qg.matmul), platforms=["cpu", "tpu"], disabled_checks=checks)(x, w)
    assert MATMUL_TARGET in exported.mlir_module()
    assert "dot_general" in exported.mlir_module()
    with jax.default_device(jax.devices("cpu")[0]):
        check_product(exported.call(x, w), x, dense, product_limit("float32"))


# The compiled program.

_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]+)\]")


def _arrays(text: str) -> set[tuple[str, int]]:
    """(dtype, elements) of every array in a compiled program."""
    return {(dtype, math.prod(map(int, dims.split(",")))) for dtype, dims in _ARRAY.findall(text)}


def _compile(function, *arguments, **options) -> str:
    text = jax.jit(function).lower(*arguments).compile(options).as_text()
    assert text is not None
    return text


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("format", FORMATS[::4], ids=str)
def test_nothing_is_dequantized(format, op):
    """No array of k * n elements, in any type, but the packed planes; nor one of all the layers."""
    function, batch, _ = OPS[op]
    w, _ = _weight(format, batch)
    text = _compile(function, jnp.ones((M, K), jnp.bfloat16), w)
    assert MATMUL_TARGET in text or FUSED_MATMUL_TARGET in text
    dense = {(t, size) for t, size in _arrays(text) if size in (K * N, LAYERS * K * N)}
    assert not dense, f"{dense} in\n{text}"


@pytest.mark.parametrize("op", ["matmul", "grad"])
def test_the_check_for_dequantized_weights_finds_them(op):
    w, _ = _weight(qg.formats.get_format("q4_0"))
    function = functools.partial(qg.matmul, kernel="reference")
    if op == "grad":
        function = jax.grad(lambda x, w: jnp.sum(qg.matmul(x, w, kernel="reference") ** 2))
    assert any(size == K * N for _, size in _arrays(_compile(function, jnp.ones((M, K)), w)))


def test_layers_of_a_scan_stay_packed():
    """The loop's body calls the kernel once; slices of planes are all that it takes of the stack."""
    w, _ = _weight(qg.formats.get_format("q4_k"), LAYERS)
    text = _compile(_scan, jnp.ones((M, K), jnp.float32), w)
    assert text.count(f'custom_call_target="{MATMUL_TARGET}"') == 1
    assert " while(" in text


# On the GPU.


@dataclasses.dataclass
class _Instruction:
    computation: str
    dims: str  # dtype[shape] of the result
    opcode: str
    line: str


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.-]+ = (\w+\[[\d,]*\])\S* ([\w-]+)\(")


_FREE = ("parameter", "get-tuple-element", "bitcast")


def _instructions(text: str) -> list[_Instruction]:
    found, computation = [], ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _INSTRUCTION.match(line):
            found.append(_Instruction(computation, match[1], match[2], line))
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["scan", "unrolled"])
@pytest.mark.parametrize("format", ["q4_k", "int4", "q8_0"])
def test_gpu_slices_reach_the_kernel_without_a_copy(format, op):
    """The slice is fused into the custom call, which then gets base + offset."""
    w, dense = _weight(qg.formats.get_format(format), LAYERS)
    x = np.random.default_rng(2).standard_normal((M, K)).astype(np.float32)
    function = OPS[op][0]
    text = _compile(function, x, w)
    instructions = _instructions(text)
    calls = [i for i in instructions if MATMUL_TARGET in i.line]
    assert len(calls) == OPS[op][2]
    with_call = {i.computation for i in calls}
    fusions = [i for i in instructions if (called := re.search(r"calls=%([\w.-]+)", i.line)) and called[1] in with_call]
    assert len(fusions) == len(calls), f"a custom call stands outside a fusion in\n{text}"
    # What XLA itself runs as base + offset is a custom fusion; a loop fusion would write the slice first.
    assert all("kind=kCustom" in fusion.line for fusion in fusions), text
    planes = {f"{jnp.dtype(p.dtype).name[0]}{p.dtype.itemsize * 8}[{d}]" for p in w.planes for d in (
        ",".join(map(str, p.shape[1:])), ",".join(map(str, (1, *p.shape[1:]))))}  # fmt: skip
    for i in instructions:
        inside = i.computation in with_call
        assert inside or i.dims not in planes or i.opcode in _FREE, f"a layer is copied: {i.line}\nin\n{text}"
    check_product(jax.jit(function)(x, w), np.broadcast_to(x, (LAYERS, M, K)), dense, product_limit("float32"))


def outermost_thunks(folder, function, *arguments) -> set[str]:
    """Kinds of what XLA executes one after the other, by its own listing."""
    enabled = "FUSION,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"
    _compile(function, *arguments, xla_dump_to=str(folder), xla_gpu_enable_command_buffer=enabled)
    listings = sorted(folder.rglob("*thunk_sequence_after_thunk_passes.txt")) or sorted(
        folder.rglob("*thunk_sequence.txt")
    )
    assert listings, f"XLA wrote no thunk sequence, only {[p.name for p in folder.rglob('*')]}"
    thunks = re.findall(r"^( *)\d+: (k\w+)", listings[-1].read_text(), re.MULTILINE)
    outermost = min(len(indent) for indent, _ in thunks)
    return {kind for indent, kind in thunks if len(indent) == outermost}


@pytest.mark.gpu
@pytest.mark.parametrize("stacked", [False, True])
def test_gpu_custom_calls_run_inside_a_cuda_graph(stacked, tmp_path):
    """There are command buffers, and no custom call beside them."""
    w, _ = _weight(qg.formats.get_format("q4_0"), LAYERS)
    function = _unrolled if stacked else lambda x, *ws: [qg.matmul(x, w) for w in ws]
    weights = (w,) if stacked else tuple(w[i] for i in range(LAYERS))
    kinds = outermost_thunks(tmp_path, function, np.ones((M, K), np.float32), *weights)
    assert "kCommandBuffer" in kinds, kinds
    assert not kinds & {"kCustomCall", "kDynamicSlice"}, kinds


@pytest.mark.gpu
def test_gpu_replayed_graph_follows_its_buffers():
    """A CUDA graph that XLA records once meets new and donated buffers in later runs."""
    w, dense = _weight(qg.formats.get_format("q4_0"), LAYERS)

    def step(x, w):
        return x + jnp.pad(0.01 * _unrolled(x, w).sum(0), ((0, 0), (0, K - N)))

    step = jax.jit(step, donate_argnums=0)
    rng = np.random.default_rng(3)
    kept = []
    for i in range(10):
        x = rng.standard_normal((M, K)).astype(np.float32)
        kept.append(jnp.full((1000 * (i + 1),), jnp.nan))
        fresh = jax.tree.map(lambda a: a + 0, w)
        out = np.asarray(step(jnp.asarray(x), fresh))
        expected = np.pad(0.01 * (x.astype(np.float64) @ dense.sum(0)), ((0, 0), (0, K - N)))
        check_product(out - x, np.eye(M), expected, 1e-5)
