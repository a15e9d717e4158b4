"""QTensors whose planes are sharded give right numbers under jit, whatever XLA gathers: four CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from cases import random_weight
import jax_qgemm as qg
from jax_qgemm.testing import check_product, product_limit

assert jax.device_count() == 4, jax.devices()
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
limit = product_limit("float32")
rng = np.random.default_rng(0)

def put(tree, spec):
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec)), tree)

for name, k in (("q4_0", 256), ("q4_k", 1024), ("int4", 512)):
    w, dense = random_weight(qg.formats.get_format(name), 64, k, rng)
    x = rng.standard_normal((8, k)).astype(np.float32)
    for x_spec, w_spec in ((P(), P("d")), (P("d"), P()), (P(None, "d"), P(None, "d")), (P("d"), P("d"))):
        xs, ws = put(x, x_spec), put(w, w_spec)
        check_product(jax.jit(qg.matmul)(xs, ws), x, dense, limit)
        dx = jax.jit(jax.grad(lambda x, w: jnp.sum(qg.matmul(x, w))))(xs, ws)
        check_product(dx, np.ones((8, 64)), dense.T, limit)
    rows = jax.jit(qg.take)(put(w, P("d")), np.array([0, 63, 17]))
    np.testing.assert_array_equal(np.asarray(rows), dense.T[[0, 63, 17]].astype(np.float32))

stacked, dense = random_weight(qg.formats.get_format("q8_0"), 32, 64, rng, batch=4)
x = rng.standard_normal((4, 3, 64)).astype(np.float32)
out = jax.jit(jax.vmap(qg.matmul))(put(x, P("d")), put(stacked, P("d")))
check_product(out, x, dense, limit)

experts = rng.integers(-1, 5, (4, 3)).astype(np.int32)
chosen = np.clip(experts, 0, 3)
for x_spec, w_spec in ((P("d"), P()), (P(), P("d")), (P("d"), P("d"))):
    xs, es, ws = put(x, x_spec), put(experts, x_spec), put(stacked, w_spec)
    out = jax.jit(qg.expert_matmul)(xs, ws, es)
    check_product(out[:, :, None], x[:, :, None], dense[chosen], limit)

# Experts of several devices: each computes what its own are chosen for, and leaves the rest to the others.
def parallel(x, w, experts):
    local = experts - jax.lax.axis_index("d") * w.shape[0]
    out = qg.expert_matmul(x, w, local)
    mine = (local >= 0) & (local < w.shape[0])
    return jax.lax.psum(jnp.where(mine[..., None], out, 0), "d")

spread = jax.jit(jax.shard_map(parallel, mesh=mesh, in_specs=(P(), P("d"), P()), out_specs=P()))
args = put(x, P()), put(stacked, P("d")), put(chosen.astype(np.int32), P())
check_product(spread(*args)[:, :, None], x[:, :, None], dense[chosen], limit)
dx = jax.jit(jax.grad(lambda x: jnp.sum(spread(x, *args[1:]))))(args[0])
check_product(dx[:, :, None], np.ones((4, 3, 1, 32)), dense[chosen].swapaxes(-1, -2), limit)

# Inside shard_map the local view is an ordinary QTensor: here each device has a quarter of n.
w, dense = random_weight(qg.formats.get_format("q4_0"), 128, 64, rng)
x = x[0]
parts = put(w, P("d"))
relu, by_dense = functools.partial(qg.matmul, activation="relu"), functools.partial(qg.matmul, kernel="dense")
for function in (qg.matmul, relu, by_dense):
    local = jax.shard_map(function, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(None, "d"))
    sums = x.astype(np.float64) @ dense
    active = sums > 0 if function is relu else sums == sums
    np.testing.assert_allclose(jax.jit(local)(x, parts), sums * active, atol=1e-4 * np.abs(sums).max())
    # The gradient of x, which every device has, is the sum of theirs.
    dx = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(local(x, parts)))))(x)
    check_product(dx, np.cos(sums * active) * active, dense.T, limit)
    try:
        jax.shard_map(function, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())(x, parts)
    except ValueError as error:
        assert "out_specs" in str(error), error
    else:
        raise AssertionError("one device's columns passed for all")

# On a mesh of explicit axes the result's type says what is split: rows are, columns are gathered.
with jax.set_mesh(jax.make_mesh((4,), ("e",), axis_types=(AxisType.Explicit,))):
    rows = jax.device_put(np.tile(x, (4, 1)), P("e"))
    out = jax.jit(qg.matmul)(rows, w)
    assert jax.typeof(out).sharding.spec == P("e", None), jax.typeof(out)
    check_product(out, np.tile(x, (4, 1)), dense, limit)
    out = jax.jit(qg.matmul)(jax.device_put(x, P(None, "e")), w)
    assert jax.typeof(out).sharding.spec == P(None, None), jax.typeof(out)
    check_product(out, x, dense, limit)
print("right")
"""


@pytest.fixture(scope="module")
def environment():
    here = Path(__file__).parent
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
    }


def test_sharded_planes(environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "right"
