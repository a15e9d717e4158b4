"""What the primitives of the product share: checks of the packed weight, and the lowerings to the native handlers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_qgemm._build_info import build_info
from jax_qgemm._registration import require_cuda
from jax_qgemm._sharding import whole_last_axis
from jax_qgemm.formats.format import Format
from jax_qgemm.formats.integer import SCALE_DTYPES, IntFormat
from jax_qgemm.formats.layout import TILE_N

FLOAT_DTYPES = (jnp.dtype("float16"), jnp.dtype("bfloat16"), jnp.dtype("float32"))

# Which kernels serve which platform; those of no platform serve them all.
KERNELS: dict[str, tuple[str, ...]] = {
    "gemv": ("cuda",),
    "gemv_sm90": ("cuda",),
    "gemm_sm80": ("cuda",),
    "gemm_sm90": ("cuda",),
    "gemm_sm90_a8": ("cuda",),
    "host": ("cpu",),
    "dense": (),
    "reference": (),
}

# Rows of x from which "auto" takes "dense" on a GPU where gemm_sm90 does not serve: gemm_sm80 decodes the weight again
# for every 32 of them, and the transposed product has no tensor-core kernel.
DENSE_MIN_ROWS = 256
DENSE_MIN_ROWS_TRANSPOSED = 16


def weight_shape(planes: Any, format: Format, padding: tuple[int, int]) -> tuple[int, int]:
    """(k, n) of the weight that the planes hold, from the first of them."""
    n16, blocks = planes[0].shape[-3:-1]
    return blocks * format.k_block - padding[0], n16 * TILE_N - padding[1]


def check_operands(
    x: Any,
    planes: Any,
    format: Format,
    padding: tuple[int, int],
    batch_ndim: int,
    transpose: bool = False,
    experts: Any = None,
) -> int:
    """Raises unless x, the planes and the experts fit each other; how many columns the product has."""
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    if x.ndim <= batch_ndim:
        raise ValueError(f"x has shape {x.shape}: expected {batch_ndim} batch axes and at least one more")
    if len(planes) != len(format.planes):
        raise ValueError(f"w has {len(planes)} planes, but format {format} has {len(format.planes)}")
    k, n = weight_shape(planes, format, padding)
    batch = stack = x.shape[:batch_ndim]
    if experts is not None:
        if experts.dtype != jnp.int32 or experts.shape != batch:
            raise ValueError(f"experts has {experts.dtype}{list(experts.shape)}, expected int32{list(batch)}")
        stack = planes[0].shape[:1]
        if stack == (0,):
            raise ValueError("w has no weights for experts to choose from")
    for plane, array in zip(format.planes, planes, strict=True):
        shape = (*stack, *format.plane_shape(plane, n, k))
        if array.shape != shape or array.dtype != format.plane_dtype(plane):
            raise ValueError(
                f"plane {plane.name!r} of w ({format}) has {array.dtype}{list(array.shape)}, expected "
                f"{format.plane_dtype(plane)}{list(shape)}"
            )
    contracted, kept, axis = (n, k, "n") if transpose else (k, n, "k")
    if x.shape[-1] != contracted:
        raise ValueError(f"x has shape {x.shape}, but w has {axis} = {contracted} (shape {(k, n)})")
    return kept


def result_aval(x: Any, columns: int, dtype: str) -> Any:
    """The abstract value of a result: x with another last axis and type."""
    shape = (*x.shape[:-1], columns)
    return x.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=whole_last_axis(x))


def gemv_max_rows(dtype: Any) -> int:
    """Rows of x of that type that gemv and gemv_sm90 serve."""
    return 8 if dtype == jnp.float32 else 64


def check_platform(kernel: str, platform: str) -> None:
    """Raises ValueError where a kernel that was asked for does not serve the platform."""
    if kernel != "auto" and KERNELS[kernel] and platform not in KERNELS[kernel]:
        serves = " and ".join(KERNELS[kernel])
        raise ValueError(f"kernel={kernel!r} serves {serves}, but the product is lowered for {platform}")


def _why_not(kernel: str, x: Any, format: Format, batch_ndim: int) -> list[str]:
    """Every reason why a kernel can't serve a product, but for those that only the device knows."""
    reasons = []
    if kernel == "gemm_sm90_a8":
        reasons.append("it serves quantized x, so x_format or QActivations")
    sm90 = kernel in ("gemv_sm90", "gemm_sm90")
    rows, most = math.prod(x.shape[batch_ndim:-1]), gemv_max_rows(x.dtype)
    if kernel in ("gemv", "gemv_sm90") and isinstance(rows, int) and rows > most:
        reasons.append(f"x has {rows} rows of {x.dtype}, more than {most}")
    if sm90 and x.dtype == jnp.float32:
        reasons.append("it serves float16 and bfloat16 x")
    # gemv_sm90 multiplies with integers themselves where a scale serves 64 of them, and with 4-bit floats in float16.
    exact = kernel == "gemv_sm90" and not (isinstance(format, IntFormat) and 0 < format.group < 64)
    rounds = kernel == "dense" or (sm90 and not exact)
    if rounds and x.dtype == jnp.float16 and not format.scales_fit_float16:
        reasons.append("it rounds w to the type of x, and float16 can't hold the scales")
    if sm90 and isinstance(x.shape[-1], int) and x.shape[-1] % 8:
        reasons.append(f"k = {x.shape[-1]} is not a multiple of 8")
    if (sm90 or kernel == "gemv") and isinstance(format, IntFormat):
        if format.group == 16:
            reasons.append("it serves integer groups of 32 and more")
        if format.scale_dtype == "float32":
            reasons.append("it serves integers with 16-bit scales")
    return reasons


def check_reasons(kernel: str, x: Any, format: Format, reasons: list[str]) -> None:
    """Raises ValueError with the reasons, if any, why a kernel that was asked for can't serve the product."""
    if reasons:
        raise ValueError(f"kernel={kernel!r} can't serve x {list(x.shape)} with {format}: {'; '.join(reasons)}")


@functools.cache
def has_gemm_sm90() -> bool:
    """Whether every GPU of this process is one that gemm_sm90 and gemm_sm90_a8 run on, and the build has them."""
    if not any(architecture.startswith("90a") for architecture in build_info().cuda_architectures):
        return False
    try:
        return all(device.compute_capability == "9.0" for device in jax.local_devices(backend="cuda"))
    except RuntimeError:  # lowered on a machine without a GPU, for one that is not known
        return False


def _dense_pays(x: Any, format: Format, batch_ndim: int, transpose: bool) -> bool:
    """Whether "auto" takes "dense" on a GPU: many rows through one weight, of a type that holds the decoded weight, and
    no kernel for them."""
    rows = math.prod(x.shape[:-1])
    # Scales beyond float16 must not be squeezed through it.
    holds = x.dtype == jnp.bfloat16 or (x.dtype == jnp.float16 and format.scales_fit_float16)
    least = DENSE_MIN_ROWS_TRANSPOSED if transpose else DENSE_MIN_ROWS
    if batch_ndim != 0 or not holds or not isinstance(rows, int) or rows < least:
        return False
    return transpose or not has_gemm_sm90() or bool(_why_not("gemm_sm90", x, format, batch_ndim))


def weight_attributes(format: Format) -> dict[str, Any]:
    """How handlers are told of a format."""
    is_int = isinstance(format, IntFormat)
    return {
        "format": format.name,
        "group_size": np.int64(format.group if is_int else 0),
        "scale_type": np.int64(SCALE_DTYPES.index(format.scale_dtype) if is_int else 0),
    }


def lower_to_call(
    target: str, ctx: Any, operands: Any, *, format: Format, kernel: str, batch_ndim: int, **attributes: Any
) -> Any:
    """A custom call of a product's handler; what all of them are told is made of the parameters."""
    return jax.ffi.ffi_lowering(target)(
        ctx, *operands, **weight_attributes(format), kernel=kernel, batch_ndim=np.int64(batch_ndim), **attributes
    )


def register_lowerings(
    primitive: Primitive,
    target: str,
    reference: Callable[..., Any],
    dense: Callable[..., Any],
    attributes: Callable[..., dict[str, Any]],
) -> None:
    """Lowers to the handlers called `target` for cpu and cuda, or to XLA's own operations.

    Args:
      reference: takes what the primitive takes, in plain jnp; for other platforms, or asked for by name.
      dense: the same by way of a dense matrix; where it pays, or asked for by name.
      attributes: from the primitive's parameters to the handlers' attributes, but for those of every product.
    """
    lower_reference = mlir.lower_fun(reference, multiple_results=False)
    lower_dense = mlir.lower_fun(dense, multiple_results=False)

    def lower(ctx: Any, *operands: Any, platform: str, **params: Any) -> Any:
        kernel, format, batch_ndim = params["kernel"], params["format"], params["batch_ndim"]
        x = ctx.avals_in[0]
        check_platform(kernel, platform)
        check_reasons(kernel, x, format, _why_not(kernel, x, format, batch_ndim))
        if platform == "cuda" and kernel != "reference":
            require_cuda()
        pays = kernel == "auto" and platform == "cuda"
        if kernel == "dense" or (pays and _dense_pays(x, format, batch_ndim, params.get("transpose", False))):
            return lower_dense(ctx, *operands, **params)
        if kernel == "reference" or platform not in ("cpu", "cuda"):
            return lower_reference(ctx, *operands, **params)
        return lower_to_call(
            target, ctx, operands, format=format, kernel=kernel, batch_ndim=batch_ndim,
            highest=np.bool_(params["highest"]), **attributes(**params),
        )  # fmt: skip

    mlir.register_lowering(primitive, functools.partial(lower, platform="a platform without kernels"))
    for platform in ("cpu", "cuda"):
        mlir.register_lowering(primitive, functools.partial(lower, platform=platform), platform=platform)
