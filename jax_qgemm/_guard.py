"""The check that stands before the native module's handlers reach XLA.

XLA refuses a handler whose FFI version is newer than its own, and does so late and loudly: one registered
before the backend starts takes the CPU backend down ("Unable to initialize backend"), on CUDA it leaves
jaxlib's own handlers unregistered. So the versions are compared at import.
"""

import importlib
import re
from pathlib import Path

import jax

_FFI_VERSION = re.compile(r"^#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", re.MULTILINE)


def runtime_ffi_version() -> tuple[int, int]:
    """The XLA FFI version (major, minor) of the installed jaxlib, read from its headers."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    parts = {name: int(value) for name, value in _FFI_VERSION.findall(header)}
    return parts["MAJOR"], parts["MINOR"]


def check_ffi_version(built: tuple[int, int], runtime: tuple[int, int]) -> None:
    """Raise ImportError unless handlers built against FFI version `built` load into `runtime`."""
    if built[0] != runtime[0] or built[1] > runtime[1]:
        raise ImportError(
            f"jax_qgemm was built for XLA FFI {built[0]}.{built[1]}, but the installed jaxlib provides "
            f"{runtime[0]}.{runtime[1]}: upgrade jaxlib, or rebuild jax_qgemm against the installed one."
        )


def check_native() -> None:
    """Import the native module and check that the installed jaxlib can load its handlers.

    Raises:
      ImportError: the native module was not built, or for an FFI version that jaxlib does not provide.
    """
    try:
        native = importlib.import_module("jax_qgemm._native")
    except ModuleNotFoundError as error:
        raise ImportError(
            "jax_qgemm's native module is not built: run `make build` in the checkout, or `pip install .`."
        ) from error
    check_ffi_version(native.build_info()["ffi_api_version"], runtime_ffi_version())
