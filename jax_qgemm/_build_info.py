"""What the installed build holds."""

import dataclasses

from jax_qgemm import _native


@dataclasses.dataclass(frozen=True)
class BuildInfo:
    """How the native module was built; `build_info()` returns it.

    Attributes:
      version: version of the package that the native module was built from.
      cuda: whether the CUDA kernels were built.
      cuda_version: version of the CUDA compiler, or None without CUDA.
      cuda_architectures: GPU architectures as CMake names them: "90a-real" is machine code for sm_90a,
        "90-virtual" PTX for compute_90. Empty without CUDA.
      ffi_api_version: (major, minor) of the XLA FFI headers; jaxlib's must be the same or of a later minor.
      layout_version: version of the kernel layout of the packed weights.
      host_instruction_sets: those the CPU kernels were built for; the best that the CPU has runs.
    """

    version: str
    cuda: bool
    cuda_version: str | None
    cuda_architectures: tuple[str, ...]
    ffi_api_version: tuple[int, int]
    layout_version: int
    host_instruction_sets: tuple[str, ...]


def build_info() -> BuildInfo:
    """Describes the installed build: CUDA on or off, architectures, FFI version, package version."""
    info = _native.build_info()
    cuda_version = info["cuda_version"]
    return BuildInfo(
        version=info["version"],
        cuda=bool(cuda_version),
        cuda_version=cuda_version or None,
        cuda_architectures=tuple(filter(None, info["cuda_architectures"].split(";"))),
        ffi_api_version=info["ffi_api_version"],
        layout_version=info["layout_version"],
        host_instruction_sets=tuple(info["host_instruction_sets"].split(";")),
    )
