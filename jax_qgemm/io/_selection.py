"""What every reader does alike: which tensors to load, progress, plain arrays."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PROGRESS_BYTES = 256 << 20


def select(names: Collection[str], tensors: Iterable[str] | Callable[[str], bool] | None) -> list[str]:
    """Those of `names` that the argument `tensors` of a reader asks for, in their order."""
    if tensors is None:
        return list(names)
    if isinstance(tensors, str):
        raise TypeError(f"tensors must be names or a predicate, got the single string {tensors!r}")
    if callable(tensors):
        return [name for name in names if tensors(name)]
    wanted = set(tensors)
    missing = sorted(map(repr, wanted.difference(names)))
    if missing:
        raise ValueError(f"tensors names {', '.join(missing)}, not among the {len(names)} tensors of the file")
    return [name for name in names if name in wanted]


def to_array(values: np.ndarray) -> jax.Array | np.ndarray:
    """A jax.Array, or the NumPy array itself where JAX would truncate its dtype."""
    return jnp.asarray(values) if jax.dtypes.canonicalize_dtype(values.dtype) == values.dtype else values


@contextlib.contextmanager
def progress_bar(
    path: str | os.PathLike[str], total: int, progress: bool | None
) -> Iterator[Callable[[int], Any] | None]:
    if progress is None:
        progress = total >= PROGRESS_BYTES and sys.stderr.isatty()
    if not progress:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=os.path.basename(path), unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar.update
