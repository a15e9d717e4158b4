"""GPTQ of one weight.

E. Frantar, S. Ashkboos, T. Hoefler and D. Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", 2022. The rows of w (k, n) are quantized one after another, and after each the rows still to
come are moved to where they make up best for its error. Best is what minimizes ||x @ w - x @ q||² over calibration
inputs x. (The paper has w transposed: its columns are the rows here.)
"""

import jax
import jax.numpy as jnp
import numpy as np

import jax_qgemm as qg
from jax_qgemm.formats import IntFormat


def hessian_of(x: np.ndarray) -> np.ndarray:
    """xᵀ @ x in float64, (k, k), over all rows of x (..., k): half the Hessian of ||x @ w||² in any column of w.

    GPTQ depends on it only up to a factor.
    """
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return x.T @ x


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """The upper triangular u with uᵀ @ u = (hessian + damping * mean(diagonal) * identity)⁻¹.

    Row i of u from the diagonal on is proportional to the first row of the inverse of the Hessian of rows i, i + 1, ...
    alone, which is what an update needs (section 3.3, step 3 of the paper). Inputs that are always zero count as
    uncorrelated with any other: their rows are rounded to nearest and move nothing.
    """
    damped = np.array(hessian, np.float64)
    diagonal = np.einsum("ii->i", damped)  # a view
    diagonal += damping * diagonal.mean()
    diagonal[diagonal == 0] = 1
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def quantize(
    w: np.ndarray, hessian: np.ndarray, format: IntFormat, *, act_order: bool = False, damping: float = 0.01
) -> qg.QTensor:
    """Quantizes a weight by GPTQ.

    The scales and zero points of a group are those that `jax_qgemm.quantize` gives its rows, as they stand when the
    first of them is quantized.

    Args:
      w: float32 (k, n), k a multiple of the group size.
      hessian: float64 (k, k), see `hessian_of`.
      format: an asymmetric one, such as `jax_qgemm.int4(group_size=64, symmetric=False)`.
      act_order: take the rows by falling diagonal of the Hessian; groups are of rows that follow each other then.
      damping: what is added to the Hessian's diagonal, in units of its mean.

    Returns:
      A QTensor (k, n); with act_order it has a permutation.

    Raises:
      ValueError: a symmetric format, or shapes that do not fit.
      numpy.linalg.LinAlgError: the damped Hessian is not positive definite.
    """
    k, n = w.shape
    group_size = format.group or k
    if format.symmetric:
        raise ValueError(f"format must be asymmetric, got {format}")
    if k % group_size:
        raise ValueError(f"w has shape {w.shape}, but format {format} needs k to be a multiple of {group_size}")
    if hessian.shape != (k, k):
        raise ValueError(f"hessian has shape {hessian.shape}, expected ({k}, {k}) for w of shape {w.shape}")
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(k)
    u = inverse_factor(hessian[np.ix_(order, order)], damping)
    rows = np.asarray(w, np.float64)[order]
    codes = np.empty((k, n), np.uint8)
    groups = []
    lowest = -128 if format.bits == 8 else 0
    for start in range(0, k, group_size):
        stop = start + group_size
        fields, scale, zero_point = _group_fields(qg.quantize(jnp.asarray(rows[start:stop], jnp.float32), format))
        groups.append(fields)
        scale, zero_point = np.asarray(scale), np.asarray(zero_point)
        divisor = np.where(scale == 0, np.float32(1), scale)
        errors = np.empty((group_size, n))  # of the group's rows, over the diagonal of u
        for i in range(start, stop):
            row = rows[i] - u[start:i, i] @ errors[: i - start]
            qvalue = np.rint(row.astype(np.float32) / divisor) + zero_point
            qvalue = np.clip(qvalue, lowest, lowest + (1 << format.bits) - 1).astype(np.int32)
            codes[order[i]] = qvalue.astype(np.uint8)
            errors[i - start] = (row - scale * (qvalue - zero_point)) / u[i, i]
        rows[stop:] -= u[start:stop, stop:].T @ errors

    group_of_row = np.empty(k, np.int32)
    group_of_row[order] = np.arange(k) // group_size
    permutation = np.argsort(group_of_row, kind="stable")
    fields = {name: np.concatenate([g[name] for g in groups], axis=-1) for name in ("scales", "zero_points")}
    q = _pack({"codes": codes[permutation].T, **fields}, format)
    if (permutation == np.arange(k)).all():
        return q
    return qg.QTensor(q.planes, q.format, q.padding, permutation=jnp.asarray(permutation, jnp.int32))


_pack = jax.jit(qg.QTensor.from_fields, static_argnums=1)


@jax.jit
def _group_fields(group: qg.QTensor) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """The fields of a weight that is one group, and its scales and zero points as numbers, (n,)."""
    fields = group.fields()
    zero_point = group.format.zero_point(fields)
    assert zero_point is not None
    return fields, group.format.scale(fields)[:, 0], zero_point[:, 0]
