"""Covers of a product space: rows such that every pair of values of any two factors occurs in one of them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def cover(factors: Mapping[str, Sequence[Any]], *, seed: int, count: int = 0) -> list[dict[str, Any]]:
    """A greedy pairwise cover, the same for the same seed; filled up with random rows to `count` rows.

    Each row starts with a pair not covered yet, of the two factors that have most of them, and takes for
    every other factor, in random order, a value that covers most pairs with those chosen before.
    """
    rng = np.random.default_rng(seed)
    names = list(factors)
    sizes = [len(factors[name]) for name in names]
    missing = {(i, j): np.ones((sizes[i], sizes[j]), bool) for i, j in itertools.permutations(range(len(names)), 2)}
    rows: dict[tuple[int, ...], None] = {}
    while (worst := max(missing, key=lambda pair: missing[pair].sum())) and missing[worst].any():
        chosen = dict(zip(worst, map(int, rng.choice(np.argwhere(missing[worst]))), strict=True))
        for i in map(int, rng.permutation(len(names))):
            if i not in chosen:
                gain = sum(missing[i, j][:, value].astype(int) for j, value in chosen.items())
                chosen[i] = int(rng.choice(np.flatnonzero(gain == np.max(gain))))
        for (i, j), pairs in missing.items():
            pairs[chosen[i], chosen[j]] = False
        rows[tuple(chosen[i] for i in range(len(names)))] = None
    while len(rows) < count:
        rows[tuple(int(rng.integers(size)) for size in sizes)] = None
    return [{name: factors[name][index] for name, index in zip(names, row, strict=True)} for row in rows]
