"""Conversion of nnx models, layer by layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from jax_qgemm.flax.layers import QEmbed, QLayer, QLinear, QLinearGeneral, check_quantized_x
from jax_qgemm.flax.variables import map_spec
from jax_qgemm.formats import QTensor
from jax_qgemm.formats import quantize as quantize_array
from jax_qgemm.formats.format import Format
from jax_qgemm.formats.registry import get_format
from jax_qgemm.ops.integer_matmul import check_x_format

Path = tuple[Any, ...]  # names, keys and indices from the model to a module

# The layers that are converted, and the attribute that holds the weight.
_KERNEL: dict[type, str] = {nnx.Linear: "kernel", nnx.LinearGeneral: "kernel", nnx.Embed: "embedding"}
# Selecting one of these asks for a quantized weight, which passing over it would silently deny.
_WEIGHT_LAYERS = (*_KERNEL, nnx.Einsum, nnx.Conv, nnx.ConvTranspose)


def quantize(
    model: Any,
    format: str | Format | Callable[[Path, nnx.Module], str | Format | None],
    where: Callable[[Path, nnx.Module], bool] | None = None,
    *,
    x_format: str | None = None,
    progress: bool | None = None,
) -> Any:
    """A copy of an nnx model with quantized layers.

    `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Embed` become `QLinear`, `QLinearGeneral` and `QEmbed`, which
    compute in the same types. Only modules of exactly these types are converted, since a subclass may compute
    something else. Layers stacked by `nnx.vmap`, for `nnx.scan`, stay stacked. `model` is not changed; the
    copy shares the arrays of its biases and of all that is not converted. Works under tracing, so in
    `nnx.eval_shape`.

    What is tied stays tied: a module that stands at several places is converted once (`where` sees it under
    the first of its paths), and layers that share one kernel variable share the packed weight.

    Metadata of a kernel pass to the `QWeight` variables, `out_sharding` brought to their axes. An axis of a
    LinearGeneral that flattens several keeps the first name among them.

    Args:
      model: an nnx.Module. Its layers may sit in lists and dicts, nnx or plain ones, but not in tuples.
      format: a name such as "q4_0", a `Format`, or a function of (path, module) that returns one, or None for
        a module to leave as it is.
      where: a function of (path, module) that says whether to convert a module; None converts all layers of
        the three types. A path is a tuple of attribute names, keys and indices. It is asked about every
        module; containers, norms and modules of your own that it accepts are passed over, for their children
        are asked about in turn.
      x_format: None, or how the converted Linear and LinearGeneral layers quantize x, see `QLinear`.
      progress: whether to show a progress bar; None shows it if the conversion takes more than a second.

    Returns:
      The converted model, of the same type unless it is itself a layer.

    Raises:
      TypeError: model is not an nnx.Module; a selected module is a convolution, an nnx.Einsum or a subclass
        of the three types, has a `dot_general` or `promote_dtype` of its own, or has a kernel that is not
        float16, bfloat16 or float32.
      ValueError: nothing is selected; an unknown format; k not a multiple of the format's block; values that
        the format can't hold; a kernel shared with something that is not converted in the same way; an unknown
        x_format, or one that the format can't be multiplied with.
        Errors name the path of the module, and all but those about values come before the first conversion.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module, got {type(model).__name__}")
    check_x_format(x_format)
    formats = _select(model, format, where, x_format)
    _check_shared(model, formats)
    packed: dict[int, QTensor] = {}  # by identity of the kernel variable

    def convert(path: Path, module: Any) -> Any:
        if path not in formats:
            return module
        kernel = _kernel(module)
        with _naming(path):
            w = packed.get(id(kernel))
            if w is None:
                w = quantize_array(_matrix(module, kernel.get_value()), formats[path])
            layer = _to_quantized(module, w, x_format)
        packed[id(kernel)] = layer.packed
        bar.update()
        return layer

    with tqdm(
        total=len(formats),
        desc="quantize",
        unit=" layers",
        delay=0 if progress else 1,
        disable=progress is False,
    ) as bar:
        # recursive_map gives new modules around the old variables, clone then new variables.
        return nnx.clone(nnx.recursive_map(convert, model))


def _select(model: nnx.Module, format: Any, where: Any, x_format: str | None) -> dict[Path, Format]:
    """The format of each layer to convert, by path, after every check that needs no values."""
    formats: dict[Path, Format] = {}
    passed_over: list[str] = []
    for path, module in nnx.iter_modules(model):
        if not (type(module) in _KERNEL if where is None else where(path, module)):
            continue
        if not isinstance(module, _WEIGHT_LAYERS):
            passed_over.append(f"{type(module).__name__} at {_name(path)}")
            continue
        chosen: Any = format(path, module) if callable(format) else format
        if chosen is None:
            continue
        with _naming(path):
            formats[path] = get_format(chosen)
            _check_layer(module)
            value = _kernel(module).get_value()
            w = jax.eval_shape(lambda v, m=module, f=formats[path]: quantize_array(_matrix(m, v), f), value)
            if type(module) is not nnx.Embed:
                check_quantized_x(x_format, w)
    if not formats:
        accepted = f"; where accepted {', '.join(passed_over)}" if passed_over else ""
        raise ValueError(
            "no module was selected that is an nnx.Linear, an nnx.LinearGeneral or an nnx.Embed" + accepted
        )
    return formats


def _check_layer(module: nnx.Module) -> None:
    if type(module) not in _KERNEL:
        raise TypeError(
            f"can't convert {type(module).__qualname__}: only modules of exactly the types nnx.Linear, "
            "nnx.LinearGeneral and nnx.Embed"
        )
    standard = {
        "dot_general": (None, jax.lax.dot_general),
        "dot_general_cls": (None,),
        "promote_dtype": (promote_dtype,),
    }
    for name, values in standard.items():
        if hasattr(module, name) and getattr(module, name) not in values:
            raise TypeError(
                f"can't convert {type(module).__name__}: its own {name}, {getattr(module, name)!r}, "
                "would be lost; exclude it with where"
            )
    if isinstance(_kernel(module).get_value(), jax.ShapeDtypeStruct):
        raise TypeError("the kernel is abstract: call quantize inside nnx.eval_shape")


def _check_shared(model: nnx.Module, formats: dict[Path, Format]) -> None:
    """Raises where one variable is the kernel of a layer to convert and something else."""
    layers = {path: module for path, module in nnx.iter_modules(model) if path in formats}
    kernels: dict[Path, Path] = {(*path, _KERNEL[type(module)]): path for path, module in layers.items()}
    for group in nnx.find_duplicates(model):
        paths = [kernels[path] for path in group if path in kernels]
        kinds = {(type(layers[path]), formats[path]) for path in paths}
        if paths and (len(paths) < len(group) or len(kinds) > 1):
            raise ValueError(
                f"{_name(paths[0])}: its kernel is shared by {', '.join(map(_name, group))}, and not all of "
                "them are converted to the same type of layer and format"
            )


def _kernel(module: Any) -> nnx.Variable:
    return getattr(module, _KERNEL[type(module)])


def _matrix(module: Any, kernel: jax.Array) -> jax.Array:
    """The kernel as (*batch, k, n)."""
    sharding = jax.typeof(kernel).sharding
    if any(sharding.spec):
        # Packing reshapes, which axes of an Explicit mesh do not survive; QWeight shards the planes again.
        kernel = jax.sharding.reshard(kernel, NamedSharding(sharding.mesh, PartitionSpec()))
    if type(module) is nnx.LinearGeneral:
        shape = (*module.batch_axis.values(), *module.in_features, *module.out_features)
    elif type(module) is nnx.Embed:
        shape = (module.num_embeddings, module.features)
    else:
        shape = (module.in_features, module.out_features)
    if kernel.shape[-len(shape) :] != shape:
        raise ValueError(f"the kernel has shape {kernel.shape}, expected {shape} behind the axes of a stack")
    if type(module) is nnx.Embed:
        return jnp.swapaxes(kernel, -1, -2)
    if type(module) is nnx.LinearGeneral:
        k, n = math.prod(module.in_features), math.prod(module.out_features)
        outputs = len(module.in_features) + len(module.out_features)
        return kernel.reshape(*kernel.shape[:-outputs], k, n)
    return kernel


def _metadata(module: Any, kernel: nnx.Variable) -> dict[str, Any]:
    """The kernel's metadata, as they are of `_matrix`."""
    metadata = kernel.get_metadata()
    if metadata.get("out_sharding"):
        ndim = len(kernel.shape)

        def axes(names: tuple[Any, ...]) -> tuple[Any, ...]:
            if type(module) is nnx.Embed:
                return (*names[:-2], names[-1], names[-2])
            if type(module) is nnx.LinearGeneral:
                n_axis = ndim - len(module.out_features)
                k_axis = n_axis - len(module.in_features)
                return (*names[:k_axis], _first(names[k_axis:n_axis]), _first(names[n_axis:]))
            return names

        metadata["out_sharding"] = map_spec(metadata["out_sharding"], ndim, axes)
    return metadata


def _first(names: tuple[Any, ...]) -> Any:
    return next((name for name in names if name is not None), None)


def _to_quantized(module: Any, w: QTensor, x_format: str | None) -> QLayer:
    kernel = _kernel(module)
    metadata = _metadata(module, kernel)
    if type(module) is nnx.Embed:
        return QEmbed(w, dtype=module.dtype, kernel_metadata=metadata)
    options: dict[str, Any] = {
        "dtype": module.dtype,
        "param_dtype": kernel.get_value().dtype,
        "precision": module.precision,
        "preferred_element_type": module.preferred_element_type,
        "x_format": x_format,
        "kernel_metadata": metadata,
    }
    if type(module) is nnx.Linear:
        return QLinear(w, module.bias, **options)
    return QLinearGeneral(
        w,
        module.bias,
        in_features=module.in_features,
        out_features=module.out_features,
        axis=module.axis,
        batch_axis=module.batch_axis,
        **options,
    )


def _name(path: Path) -> str:
    return "/".join(map(str, path)) or "the model itself"


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the path of a module before the text of an error."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{_name(path)}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{_name(path)}: {error}") from error
