"""What XLA is given of products of quantized activations, on the CPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_weight
from quantized_x import F32

import jax_qgemm as qg
from jax_qgemm.ops import integer_dense


def test_integers_are_multiplied_as_such_and_decoded_by_slabs(monkeypatch):
    w, _ = random_weight(qg.int8(-1), 4096, 512, np.random.default_rng(2))
    shape = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)
    function = jax.jit(functools.partial(qg.matmul, x_format="int8", kernel="dense"))
    lowered = function.lower(shape, w)
    assert "(tensor<8x1x512xi8>, tensor<4096x1x512xi8>) -> tensor<1x8x4096xi32>" in lowered.as_text()
    monkeypatch.setattr(integer_dense, "SCRATCH_BYTES", 1 << 17)
    compiled = jax.jit(functools.partial(qg.matmul, x_format="int8", kernel="dense")).lower(shape, w).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 512 // 2  # of its codes


def test_x_is_quantized_once_for_several_products():
    weights = [random_weight(qg.int4(64), 48, 192, np.random.default_rng(seed))[0] for seed in range(3)]

    def project(x, weights):
        return [qg.matmul(x, w, x_format="int8") for w in weights]

    compiled = jax.jit(project).lower(jax.ShapeDtypeStruct((5, 192), jnp.bfloat16), weights).compile()
    assert str(compiled.as_text()).count(" round-nearest-even(") == 1


def test_host_is_the_cpus():
    w, _ = random_weight(qg.int4(64), 48, 128, np.random.default_rng(15))
    x = np.random.default_rng(16).standard_normal((4, 128)).astype(F32)
    lowered = jax.jit(functools.partial(qg.matmul, x_format="int8", kernel="host")).trace(x, w)
    with pytest.raises(ValueError, match="kernel='host' serves cpu"):
        lowered.lower(lowering_platforms=("cuda",))
    cpu = lowered.lower(lowering_platforms=("cpu",))
    assert "jax_qgemm.matmul" in cpu.as_text()
