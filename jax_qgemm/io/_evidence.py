"""What the values of a checkpoint say about how it was packed, from a few rows of a few of its weights.

Weights of a model have a mean near zero, so that the codes of a group have a mean near its zero point. A label that
shifts every zero point by one, or an order that takes a neighbour's, shows.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from jax_qgemm.io import awq
from jax_qgemm.io._checkpoint import Module, Plan
from jax_qgemm.io._repack import unpack_words, words_for

_MODULES = 8
_ROWS = 768  # of k; the packed words of any width end there
_TOLERANCE = 0.3  # of one step: how near to a whole step the mean of a weight must be


def sample(weights: Sequence[tuple[Module, Plan]]) -> list[tuple[Module, Plan]]:
    """Some of the asymmetric weights, from the first to the last."""
    found = [(module, plan) for module, plan in weights if any(p.name == "zero_points" for p in plan.format.planes)]
    count = min(len(found), _MODULES)
    return [found[i * (len(found) - 1) // max(count - 1, 1)] for i in range(count)]


def gptq_offset(module: Module, plan: Plan) -> float | None:
    """The mean of code - stored zero point: near 0 in version 2, near 1 in version 1; None where none can be used."""
    (k, n), bits = plan.shape, plan.format.code_bits
    rows = min(k, _ROWS)
    words = module.read("qweight", words_for(rows, bits))
    codes = unpack_words(words.T, bits, rows).T.astype(np.float32)
    group = module.read("g_idx")[:rows] if "g_idx" in module.parts else np.arange(rows) // (plan.format.group or k)
    zero_points = unpack_words(module.read("qzeros"), bits, n)[group]
    usable = zero_points != (1 << bits) - 1  # a version 1 zero point that wrapped around
    return float((codes - zero_points)[usable].mean()) if usable.any() else None


def version_by_values(offsets: Sequence[float | None]) -> int | None:
    """The version that the offsets of several weights speak for, None where they are not clear."""
    found = [offset for offset in offsets if offset is not None]
    if not found:
        return None
    middle = statistics.median(found)
    for version, expected in ((1, 1), (2, 0)):
        if abs(middle - expected) < _TOLERANCE:
            return version
    return None


def awq_gemm(module: Module, plan: Plan) -> tuple[float, bool]:
    """Of version gemm: the mean of code - zero point; and whether another order of columns fits clearly better."""
    k, n = plan.shape
    group = plan.format.group or k
    groups = min(max(_ROWS // group, 1), k // group)
    codes = awq.unpack_gemm(module.read("qweight", groups * group))
    zero_points = awq.unpack_gemm(module.read("qzeros", groups)).astype(np.float32)
    means = codes.reshape(groups, group, n).mean(1, dtype=np.float32)
    eights = means.reshape(len(means), -1, 8)
    residuals = [
        float(((eights[..., order].reshape(means.shape) - zero_points) ** 2).mean())
        for order in (np.arange(8), awq.COLUMN_OF_NIBBLE, awq.NIBBLE_OF_COLUMN)
    ]
    other = min(residuals[1:])
    return float((means - zero_points).mean()), other < 0.5 * residuals[0]
