"""Times of short operations on a GPU: many in one jitted function, over more distinct operands than its cache holds.

What keeps a time honest:

- Every operation has operands of its own, more bytes than the L2 cache holds before one comes round again.
- Operations follow one another through optimization barriers, which cost nothing on the device: XLA can't merge two,
  drop one, or run two at once.
- All results are returned, into buffers that are donated: XLA runs such a function as one CUDA graph, and a graph whose
  addresses change is recorded again.
- The host's part is not in it. A long read keeps the device busy while the runs are queued, and a time is the
  difference between many runs and one, so that launch, read and synchronization drop out.
- Runs follow one another: the GPU is as warm as under load, and lowers its clocks where products draw much power. The
  time after a rest is another figure, `measure(run, idle=seconds)`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import operator
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.harness import tree_bytes

MAX_OPERATIONS = 320
_FEW, _MANY = 1, 9
_BLOCK_S = 2e-3  # of `_long_read` on an H200
_COOL_S = 10e-3  # of what is timed after a rest, more or less: power limits act within tens of milliseconds
_GRANULE = 1 << 14  # bytes: what a plain read is rounded down to, at most 0.2% of 8 MB


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def rotate(make: Callable[[int], Any]) -> list[Any]:
    """Distinct operands: more than 512 MB and at least 32 on a GPU, 256 MB and 8 on a CPU; at most MAX_OPERATIONS."""
    total, least = (512 << 20, 32) if on_gpu() else (256 << 20, 8)
    first = make(0)
    count = min(max(least, -(-total // tree_bytes(first))), MAX_OPERATIONS)
    return [first, *(make(i) for i in range(1, count))]


@dataclasses.dataclass
class Run:
    """A jitted function of `count` operations with its arguments, lowered or compiled."""

    function: Any
    args: tuple[Any, ...]
    outs: Any
    count: int

    def compile(self) -> Run:
        return dataclasses.replace(self, function=self.function.compile())


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one operation.

    Attributes:
      seconds: the median.
      spread: the middle half of the samples spans this share of the median.
      host_bound: queueing took the host about as long as the whole run, so that the time may be the host's.
      ops: how many of each HLO operation the compiled function holds.
    """

    seconds: float
    spread: float
    host_bound: bool
    ops: dict[str, int]

    def row(self) -> dict[str, Any]:
        """As a row of a result file has it; what is as it should be is left out."""
        row: dict[str, Any] = {"us": self.seconds * 1e6, "spread": round(self.spread, 4)}
        return row | ({"host_bound": True} if self.host_bound else {}) | ({"ops": self.ops} if on_gpu() else {})


def lower(function: Callable[..., Any], *args: Any, count: int) -> Run:
    """`function(*args)` of `count` operations, its results in donated buffers."""

    def donated(outs: Any, *args: Any) -> Any:
        del outs
        return function(*args)

    outs = jax.eval_shape(function, *args)
    # The donated buffers are not read: without keep_unused they would be dropped, and nothing donated.
    return Run(jax.jit(donated, donate_argnums=0, keep_unused=True).lower(outs, *args), args, outs, count)


def lower_products(product: Callable[[Any, Any], Any], x: Any, weights: Sequence[Any]) -> Run:
    """`product(x, w)` for each of the weights, one after the other."""
    product = jax.jit(product)  # traced once for all of them

    def sequence(x: Any, weights: Sequence[Any]) -> list[Any]:
        results = []
        for w in weights:
            x, w = lax.optimization_barrier((x, w))
            out = product(x, w)
            x, out = lax.optimization_barrier((x, out))
            results.append(out)
        return results

    return lower(sequence, x, weights, count=len(weights))


def compile_all(runs: Iterable[Run]) -> list[Run]:
    """Compiles on all cores. Not for functions whose compilation measures on the device."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(Run.compile, runs))


def measure(run: Run, repeats: int = 7, idle: float = 0.0) -> Timing:
    """Times a compiled run.

    Args:
      idle: seconds of rest before each of the samples, which then are of few runs; 0 times under load.
    """
    outs = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), run.outs)
    occupy = _blocker() if on_gpu() else lambda: None
    few, many = (_FEW, _MANY) if on_gpu() else (0, 1)
    blocks, queued = 1, 0.0

    def sample(runs: int) -> tuple[float, float]:
        nonlocal outs
        if idle:
            time.sleep(idle)
        start = time.perf_counter()
        for _ in range(blocks):
            occupy()
        for _ in range(runs):
            outs = run.function(outs, *run.args)
        queued = time.perf_counter()
        jax.block_until_ready(outs)
        return time.perf_counter() - start, queued - start

    # XLA runs a function without a CUDA graph first, then records one.
    for _ in range(3):
        _, queued = sample(1)
    if idle:
        once = max(sample(many)[0] - sample(few)[0], 0.0) / (many - few)
        many = few + min(max(round(_COOL_S / max(once, 1e-9)), 1), many - few)
    # Long enough for all of the runs to be queued meanwhile.
    blocks = min(16, 1 + int(1.5 * many * queued / _BLOCK_S))
    samples, shares = [], []
    for _ in range(repeats):
        short, _ = sample(few)
        long, queued = sample(many)
        samples.append((long - short) / (many - few) / run.count)
        shares.append(queued / long)
    low, seconds, high = statistics.quantiles(samples, n=4)
    host_bound = on_gpu() and statistics.median(shares) > 0.9
    return Timing(seconds, (high - low) / seconds, host_bound, hlo_ops(run.function.as_text()))


def time_products(product: Callable[[Any, Any], Any], x: Any, weights: Sequence[Any]) -> Timing:
    return measure(lower_products(product, x, weights).compile())


_OP = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = .*? ([a-z][a-z-]*)\(", re.MULTILINE)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*?^\}", re.MULTILINE | re.DOTALL)
_CALLED = re.compile(r"(?:calls|to_apply)=\{?%?([\w.-]+)")
_FREE = frozenset({"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "call", "opt-barrier"})


def hlo_ops(text: str) -> dict[str, int]:
    """Operations of a compiled module that run as such: not those inside fusions and reductions, nor those that cost
    nothing."""
    bodies = {match[1]: match[0] for match in _COMPUTATION.finditer(text)}
    inner = set()
    for body in bodies.values():
        for line in body.splitlines():
            if " call(" not in line:  # a called computation's operations run one by one
                inner.update(_CALLED.findall(line))
    counts: collections.Counter[str] = collections.Counter()
    for name, body in bodies.items():
        if name not in inner:
            counts.update(op for op in _OP.findall(body) if op not in _FREE)
    return dict(sorted(counts.items()))


# Plain reads.


def _read_rows(w: jax.Array) -> jax.Array:
    """One sum for each of 1024 rows: XLA gives a row to a CTA, so that one kernel of one wave reads everything. A sum
    of everything would take a second kernel."""
    return jnp.sum(w.reshape(1024, -1), axis=1, dtype=w.dtype)


def _read_slices(w: jax.Array) -> jax.Array:
    """The elementwise sum of 32 slices: one fusion, whose threads have 32 independent loads each, at the price of
    writing 1/32 of what is read."""
    return functools.reduce(operator.add, list(w.reshape(32, -1)))


READS: dict[str, Callable[[jax.Array], jax.Array]] = {"rows": _read_rows, "slices": _read_slices}


@functools.partial(jax.jit, static_argnames="words")
def _random_words(words: int, seed: int) -> jax.Array:
    return jax.random.bits(jax.random.key(seed, impl="rbg"), (words,), jnp.uint32)


def time_reads(sizes: Iterable[int]) -> dict[int, tuple[float, str]]:
    """Seconds and name of the faster of XLA's plain reads of so many bytes, rounded down to 16 KiB."""
    rounded = {size: max(size // _GRANULE, 1) * _GRANULE for size in sizes}
    best: dict[int, tuple[float, str]] = {}
    for nbytes in sorted(set(rounded.values())):
        data = rotate(lambda i, words=nbytes // 4: _random_words(words, i))
        x = jnp.zeros(())
        runs = compile_all(lower_products(lambda x, w, read=read: read(w), x, data) for read in READS.values())
        times = {name: measure(run, repeats=5).seconds for name, run in zip(READS, runs, strict=True)}
        name = min(times, key=lambda name: times[name])
        best[nbytes] = times[name], name
    return {size: best[nbytes] for size, nbytes in rounded.items()}


@functools.cache
def _long_read() -> Run:
    """Reads of 8 arrays of 1 GiB on a GPU, about 2 ms; of one of 256 MiB on a CPU."""
    count, size = (8, 1 << 30) if on_gpu() else (1, 256 << 20)
    data = [_random_words(size // 4, i) for i in range(count)]
    return lower_products(lambda x, w: _read_rows(w), jnp.zeros(()), data).compile()


@functools.cache
def _blocker() -> Callable[[], None]:
    """Keeps the device busy for some milliseconds, in which the host can queue what is to be timed."""
    run = _long_read()
    outs = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), run.outs)

    def occupy() -> None:
        nonlocal outs
        outs = run.function(outs, *run.args)

    return occupy


def read_bandwidth() -> float:
    """Bytes per second of a read of 1 GiB (256 MiB on a CPU): the bandwidth that this run can be held to."""
    run = _long_read()
    return tree_bytes(run.args) / run.count / measure(run).seconds
