"""Tests marked `gpu` are skipped, with what is missing as the reason, where they cannot run."""

import jax
import pytest

import jax_qgemm as qg


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
