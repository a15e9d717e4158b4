"""Decoding with the Gemma 3 example: tokens per second, and what the device does meanwhile.

python -m benchmarks.gemma_decode [--gguf PATH] [--dtype bfloat16] [--max-tokens 128] [--name gemma-decode]

Tokens per second are measured without the profiler, as benchmarks/demo.py measures them; shares of time come from a
second process that traces the same decoding, inside CUDA graphs as without a profiler (XLA by default takes them apart
while one is active). Writes benchmarks/results/<device>-<name>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks import demo, harness, trace
from examples.gemma3.__main__ import demo_gguf, load
from examples.gemma3.generate import Generator

GRAPHS_FLAG = "--xla_enable_command_buffers_during_profiling=true"
LIMIT_S = 300


def traced(path: Path, dtype: str, max_tokens: int) -> dict[str, Any]:
    """The summary of a trace of decoding, and how many tokens it covers."""
    model, tokenizer, _ = load(path, dtype)
    generate = Generator(model)
    ids = tokenizer.encode(demo.SENTENCE * demo.PROMPT_TOKENS)[: demo.PROMPT_TOKENS]
    for _ in generate(ids, max_tokens):
        pass  # compiles
    chunks = generate(ids, max_tokens)
    next(chunks)
    time.sleep(0.5)  # the run that is already queued ends before the trace begins
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            tokens = sum(len(chunk) for chunk in chunks)
        summary = trace.summarize(trace.read_trace(Path(folder)))
    runs = -(-tokens // generate.steps) - 1  # the last may decode more tokens than it yields
    in_graphs = GRAPHS_FLAG in os.environ.get("XLA_FLAGS", "")
    return {"tokens": runs * generate.steps, "in_cuda_graphs": in_graphs} | summary


def child(mode: str, args: argparse.Namespace, path: Path, flags: str = "") -> dict[str, Any] | None:
    """What this script prints in a process of its own; None where that fails."""
    command = [sys.executable, "-m", "benchmarks.gemma_decode", "--gguf", str(path), "--dtype", args.dtype]
    command += ["--max-tokens", str(args.max_tokens), "--mode", mode]
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True, cwd=harness.ROOT
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"{mode} failed: {error}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def show(row: dict[str, Any], found: dict[str, Any] | None) -> None:
    print(
        f"{row['dtype']}: {row['decode_tokens_per_s']:.0f} tokens/s, {1e6 / row['decode_tokens_per_s']:.0f} us a token"
    )
    if found is None:
        return
    tokens = found["tokens"]
    print(f"traced: {found['span_us'] / tokens:.0f} us a token, {found['not_products']:.1%} not matrix products")
    for name, group in found["groups"].items():
        print(
            f"  {name:30} {group['share']:6.1%} {group['us'] / tokens:9.1f} us {group['events'] / tokens:7.1f} launches"
        )
    for kernel in found["kernels"][:12]:
        print(f"    {kernel['name']:50.50} {kernel['us'] / tokens:9.2f} us {kernel['events'] / tokens:7.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--name", default="gemma-decode", help="of the result file")
    parser.add_argument("--mode", choices=("measure", "trace"), help="do one of the two and print JSON")
    args = parser.parse_args()
    path = args.gguf or demo_gguf()
    if args.mode:
        function = demo.measure if args.mode == "measure" else traced
        print(json.dumps(function(path, args.dtype, args.max_tokens)))
        return
    row = child("measure", args, path)
    if row is None:
        sys.exit("no measurement")
    # Graphs under a profiler are experimental in XLA: without them the gaps are longer than they are.
    found = child("trace", args, path, GRAPHS_FLAG) or child("trace", args, path)
    show(row, found)
    print(f"wrote {harness.write_results(args.name, {'model': path.name, 'row': row, 'trace': found})}")


if __name__ == "__main__":
    main()
