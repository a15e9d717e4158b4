"""The CUDA kernels' own code, compiled for the CPU by tests/emulation, behind one function."""

import contextlib
import ctypes
import subprocess
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np

import jax_qgemm as qg
from jax_qgemm.formats import get_format
from jax_qgemm.formats.activations import ACTIVATION_FORMATS
from jax_qgemm.formats.integer import SCALE_DTYPES, IntFormat
from jax_qgemm.formats.layout import TILE_N

SOURCES = Path(__file__).parent / "emulation"
DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
X_DTYPES = DTYPES | {"int8": 3, "float8_e4m3fn": 4}  # and of codes
ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
# Major version, multiprocessors (few, for several turns of a persistent grid), bytes of shared memory.
HOPPER = (9, 3, 227 << 10)


class Epilogue(ctypes.Structure):
    """cuda/kernels/product.h"""

    _fields_ = (
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("scale_stride", ctypes.c_int64),
        ("bias_stride", ctypes.c_int64),
        ("bias_type", ctypes.c_int32),
        ("residual_type", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("gated", ctypes.c_bool),
    )


class Stack(ctypes.Structure):
    """cuda/kernels/product.h"""

    _fields_ = (("weights", ctypes.c_int64), ("experts", ctypes.c_void_p))


def pointer(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


class Emulated:
    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        for name in ("emulated_matmul", "emulated_dequantize", "emulated_gemv_sm90_split", "emulated_quantize"):
            function = getattr(self._library, name)
            function.restype = ctypes.c_char_p

    @contextlib.contextmanager
    def device(self, major: int, multiprocessors: int, shared_bytes: int, compiled: int | None = None):
        """`compiled`: 10 times the compute capability of the kernels' code, by default 80 for GPUs before Hopper."""
        compiled = compiled or (90 if major >= 9 else 80)
        self._library.emulated_device(major, multiprocessors, shared_bytes, compiled)
        try:
            yield
        finally:
            self._library.emulated_device(*HOPPER, 90)

    def gemm_sm90_choice(self, m: int, n: int, k: int, bits: float, multiprocessors: int) -> tuple[int, int, str]:
        """Tokens and rows of n of gemm_sm90's tiles; "whole", "split" along k, or both: a split "tail"."""
        return self._choice(self._library.emulated_gemm_sm90_choice, m, n, k, bits, (), multiprocessors)

    def gemm_sm90_a8_choice(
        self, m: int, n: int, k: int, bits: float, group: int, multiprocessors: int
    ) -> tuple[int, int, str]:
        """The same of gemm_sm90_a8. group: elements of k that are summed exactly, 0 for all."""
        return self._choice(self._library.emulated_gemm_sm90_a8_choice, m, n, k, bits, (group,), multiprocessors)

    def _choice(self, function, m, n, k, bits, group, multiprocessors):
        out = (ctypes.c_int64 * 4)()
        sizes = (ctypes.c_int64(size) for size in (m, n, k))
        function(*sizes, ctypes.c_double(bits), *group, max(1, multiprocessors // 2), out)
        tokens, rows, whole, items = out
        return tokens, rows, "whole" if whole == items else "tail" if whole else "split"

    def last_launch(self) -> dict[str, int]:
        values = (ctypes.c_int * 4)()
        self._library.emulated_launch(values)
        return dict(zip(("blocks", "threads", "cluster", "shared_bytes"), values, strict=True))

    def matmul(
        self,
        x: jax.Array,
        w: qg.QTensor,
        *,
        transpose=False,
        highest=False,
        out_dtype="float32",
        kernel="auto",
        experts=None,
        bias=None,
        residual=None,
        scale=None,
        activation=None,
        gated=False,
        x_scales=None,
    ) -> np.ndarray:
        """x (*batch, m, ...) times w or its transpose, as float64. bias and scale have a batch axis or are shared. With
        experts, int32 (*batch,), w is a stack (e, k, n). With x_scales, float32 (*batch, m), x are int8 or
        float8_e4m3fn codes."""
        k, n = w.shape[-2:]
        planes = [np.ascontiguousarray(p) for p in w.planes]
        xs = np.ascontiguousarray(x)
        out = np.full((*xs.shape[:-1], k if transpose else n // 2 if gated else n), np.nan, jnp.dtype(out_dtype))
        batch_ndim = len(w.shape) - 2 if experts is None else experts.ndim
        epilogue = Epilogue(
            pointer(scale),
            pointer(bias),
            pointer(residual),
            0 if scale is None or scale.ndim == 0 else 1,
            0 if bias is None or bias.ndim == 1 else bias.shape[-1],
            0 if bias is None else DTYPES[bias.dtype.name],
            0 if residual is None else DTYPES[residual.dtype.name],
            ACTIVATIONS[activation],
            gated,
        )
        assert residual is None or residual.shape == out.shape
        assert x_scales is None or (x_scales.shape == xs.shape[:-1] and x_scales.dtype == np.float32)
        x_scales = None if x_scales is None else np.ascontiguousarray(x_scales)
        name, *weight = _weight(w, planes)
        problem = self._library.emulated_matmul(
            name,
            kernel.encode(),
            *weight,
            ctypes.byref(_stack(w, experts)),
            xs.ctypes.data_as(ctypes.c_void_p),
            X_DTYPES[x.dtype.name],
            out.ctypes.data_as(ctypes.c_void_p),
            DTYPES[jnp.dtype(out_dtype).name],
            ctypes.c_int64(int(np.prod(xs.shape[:batch_ndim]))),
            ctypes.c_int64(int(np.prod(xs.shape[batch_ndim:-1]))),
            ctypes.c_int64(n),
            ctypes.c_int64(k),
            int(transpose),
            int(highest),
            ctypes.byref(epilogue),
            ctypes.c_void_p(pointer(x_scales)),
        )
        if problem is not None:
            raise RuntimeError(problem.decode())
        return out.astype(np.float64)

    def dequantize(self, w: qg.QTensor, *, first=0, rows: int, out_dtype="float32", experts=None) -> np.ndarray:
        """Rows [first, first + rows) of n, decoded: (*batch, rows, k). experts: as of `matmul`."""
        *batch, k, n = w.shape
        if experts is not None:
            batch = experts.shape
        out = np.full((*batch, rows, k), np.nan, jnp.dtype(out_dtype))
        planes = [np.ascontiguousarray(p) for p in w.planes]
        problem = self._library.emulated_dequantize(
            *_weight(w, planes),
            ctypes.byref(_stack(w, experts)),
            out.ctypes.data_as(ctypes.c_void_p),
            DTYPES[jnp.dtype(out_dtype).name],
            ctypes.c_int64(int(np.prod(batch))),
            ctypes.c_int64(-(-n // TILE_N)),
            ctypes.c_int64(first // TILE_N),
            ctypes.c_int64(rows),
            ctypes.c_int64(k),
        )
        if problem is not None:
            raise RuntimeError(problem.decode())
        return out

    def gemv_sm90_split(self, number: int, x: jax.Array, w: qg.QTensor) -> tuple[np.ndarray, dict[str, int]] | None:
        """x (batch, m, k) float16 times int4 w by the split of that number, and the split; None: there is none."""
        batch, k, n = w.shape
        planes = [np.ascontiguousarray(p) for p in w.planes]
        xs = np.ascontiguousarray(x)
        out = np.full((batch, xs.shape[1], n), np.nan, np.float32)
        names = ("rows", "slices", "cluster", "x_stays", "buffers", "passes")
        split = (ctypes.c_int * len(names))()
        problem = self._library.emulated_gemv_sm90_split(
            number,
            *(p.ctypes.data_as(ctypes.c_void_p) for p in planes),
            ctypes.c_int64(planes[0].shape[-2]),
            xs.ctypes.data_as(ctypes.c_void_p),
            out.ctypes.data_as(ctypes.c_void_p),
            *(ctypes.c_int64(size) for size in (batch, xs.shape[1], n, k)),
            split,
        )
        if problem == b"no such split":
            return None
        if problem is not None:
            raise RuntimeError(problem.decode())
        return out, dict(zip(names, split, strict=True))

    def quantize(self, x: np.ndarray, format: str, offset: int = 0) -> tuple[np.ndarray, ...]:
        """Codes, scales and, of q8_1, sums of x (rows, k). x and codes lie `offset` elements behind a multiple of 64
        bytes."""
        kind = ACTIVATION_FORMATS[format]
        rows, k = x.shape
        groups = (rows, k // kind.group if kind.group else 1)
        xs, codes = _placed(x.shape, x.dtype, offset), _placed(x.shape, jnp.dtype(kind.codes), offset)
        scales = _placed(groups, jnp.dtype(kind.scales), 0)
        sums = None if kind.sums is None else _placed(groups, jnp.dtype(kind.sums), 0)
        xs[...] = x
        outs = [out for out in (codes, scales, sums) if out is not None]
        problem = self._library.emulated_quantize(
            ("int8", "fp8", "q8_1").index(format),
            ctypes.c_void_p(pointer(xs)),
            DTYPES[x.dtype.name],
            *(ctypes.c_void_p(pointer(out)) for out in (codes, scales, sums)),
            ctypes.c_int64(rows),
            ctypes.c_int64(k),
        )
        if problem is not None:
            raise RuntimeError(problem.decode())
        for out in outs:
            around = out.base
            assert isinstance(around, np.ndarray)
            around = around.view(np.uint8)
            first = out.ctypes.data - around.ctypes.data
            outside = np.delete(around, np.s_[first : first + out.nbytes])
            assert (outside == _FILL).all(), "written outside of an array"
        return tuple(outs)


_FILL = 0xFF  # which makes a NaN of any float


def _placed(shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
    """An array that lies `offset` elements behind a multiple of 64 bytes, with bytes of _FILL in it and around it."""
    count = int(np.prod(shape))
    memory = np.full(192 + (offset + count) * dtype.itemsize, _FILL, np.uint8)
    first = 64 + -memory.ctypes.data % 64 + offset * dtype.itemsize
    return memory[first : first + count * dtype.itemsize].view(dtype).reshape(shape)


def _stack(w: qg.QTensor, experts: np.ndarray | None) -> Stack:
    assert experts is None or (experts.dtype == np.int32 and experts.flags.c_contiguous)
    return Stack(int(np.prod(w.shape[:-2])), pointer(experts))


def _weight(w: qg.QTensor, planes: list[np.ndarray]) -> tuple:
    """Format, planes, their number, k-blocks, group size and scale type, as the C functions take them."""
    format = w.format
    is_int = isinstance(format, IntFormat)
    return (
        format.name.encode(),
        (ctypes.c_void_p * len(planes))(*(p.ctypes.data for p in planes)),
        len(planes),
        ctypes.c_int64(planes[0].shape[-2]),
        format.group if is_int else 0,
        SCALE_DTYPES.index(format.scale_dtype) if is_int else 0,
    )


def build(folder: Path) -> Emulated:
    """Compiles the kernels for the CPU into `folder`."""
    done = subprocess.run(
        ["make", "-s", "-j2", "-C", SOURCES, f"BUILD={folder}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Emulated(folder / "libemulation.so")


def random_weight(format, k, n, seed, batch=None):
    """A QTensor and its dense values, from the independent table."""
    return cases.random_weight(get_format(format), n, k, np.random.default_rng(seed), batch=batch)


def random_x(shape, dtype, seed):
    x = jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)
    return x, np.asarray(x, np.float64)
