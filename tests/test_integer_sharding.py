"""Products of quantized activations whose operands are sharded, on four CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from cases import random_weight
from quantized_x import LIMITS, quantized
import jax_qgemm as qg
from jax_qgemm.ops import integer_dense
from jax_qgemm.testing import check_product, product_limit

assert jax.device_count() == 4, jax.devices()
integer_dense.SCRATCH_BYTES = 1 << 12  # several slabs
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
w, dense = random_weight(qg.int4(64), 128, 512, rng)
x = rng.standard_normal((8, 512)).astype(np.float32)
exact, limit = quantized(x, "int8"), LIMITS["int8"]

def put(tree, spec):
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec)), tree)

for kernel in ("auto", "dense"):
    matmul = functools.partial(qg.matmul, x_format="int8", kernel=kernel)
    for x_spec, w_spec in ((P(), P("d")), (P("d"), P()), (P(None, "d"), P(None, "d")), (P("d"), P("d"))):
        check_product(jax.jit(matmul)(put(x, x_spec), put(w, w_spec)), exact, dense, limit)

# Inside shard_map: each device has a quarter of n, and the gradient of x is the sum of theirs.
    trained = functools.partial(matmul, straight_through=True, precision="highest")
    local = jax.shard_map(trained, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(None, "d"))
    check_product(jax.jit(local)(x, put(w, P("d"))), exact, dense, limit)
    dx = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(local(x, w)))))(x, put(w, P("d")))
    check_product(dx, np.cos(exact @ dense), dense.T, product_limit("float32"))

# On a mesh of explicit axes rows stay split, and columns are gathered.
    with jax.set_mesh(jax.make_mesh((4,), ("e",), axis_types=(AxisType.Explicit,))):
        for spec, out_spec in ((P("e"), P("e", None)), (P(None, "e"), P(None, None))):
            operand = jax.device_put(x, spec)
            shared = jax.jit(functools.partial(qg.quantize_activations, format="int8"))(operand)
            for out in (jax.jit(matmul)(operand, w), jax.jit(functools.partial(qg.matmul, kernel=kernel))(shared, w)):
                assert jax.typeof(out).sharding.spec == out_spec, jax.typeof(out)
                check_product(out, exact, dense, limit)
print("right")
"""


def test_sharded_operands():
    here = Path(__file__).parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "right"
