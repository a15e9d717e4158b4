"""Tests marked `gpu` are skipped, with what is missing as the reason, where they cannot run; all others run on the CPU,
whatever the machine has; shared fixtures."""

import contextlib
import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import emulated as emulation
import jax
import pytest

import jax_qgemm as qg
from jax_qgemm import _native


def missing_for_gpu() -> str | None:
    """What this machine or this build lacks for the tests marked `gpu`."""
    if not qg.build_info().cuda:
        return "needs a build with CUDA (make build JAX_QGEMM_CUDA=on)"
    try:
        jax.devices("cuda")
    except RuntimeError:
        return "needs an NVIDIA GPU that JAX finds (jax.devices('cuda') is empty)"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    missing = missing_for_gpu()
    if missing is None:
        return
    if config.getoption("markexpr") == "gpu":
        raise pytest.UsageError(f"the tests marked gpu were asked for; running them {missing}")
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason=missing))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    stays = jax.default_backend() == "cpu" or item.get_closest_marker("gpu")
    with contextlib.nullcontext() if stays else jax.default_device(jax.devices("cpu")[0]):
        return (yield)


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """XLA's own compilers, for what must be equal to the bit on each."""
    with jax.default_device(jax.devices(request.param)[0]):
        yield


@pytest.fixture(params=qg.build_info().host_instruction_sets)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that the CPU kernels were built for, in use."""
    try:
        _native.set_host_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"needs a CPU with {request.param}")
    with jax.default_device(jax.devices("cpu")[0]):
        yield request.param
    _native.set_host_instruction_set("")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> emulation.Emulated:
    """The CUDA kernels, compiled for the CPU: into the folder EMULATION_BUILD, if set, which keeps the objects."""
    if shutil.which("make") is None or shutil.which("g++") is None:
        pytest.skip("needs make and g++ to compile the kernels for the CPU")
    kept = os.environ.get("EMULATION_BUILD")
    return emulation.build(Path(kept) if kept else tmp_path_factory.mktemp("emulation"))
