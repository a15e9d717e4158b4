"""Speed and memory of the Gemma 3 example, in a process of its own for each activation type.

python -m benchmarks.demo [--gguf PATH] [--max-tokens 128]

Reads a prompt of 256 tokens and generates, once to compile and once to measure. Writes
benchmarks/results/<device>-demo.json.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import jax
from flax import nnx

from benchmarks import harness
from examples.gemma3.__main__ import demo_gguf, load
from examples.gemma3.generate import Generator
from jax_qgemm.io import read_gguf_header

SENTENCE = "The planets of the solar system, in order from the Sun, are far from each other. "
PROMPT_TOKENS = 256


def measure(path: Path, dtype: str, max_tokens: int) -> dict[str, float | int | str]:
    model, tokenizer, _ = load(path, dtype)
    generate = Generator(model)
    ids = tokenizer.encode(SENTENCE * PROMPT_TOKENS)[:PROMPT_TOKENS]
    for _ in range(2):
        for _ in generate(ids, max_tokens):
            pass
    t = generate.timing
    stats = jax.devices()[0].memory_stats() or {}
    elements = sum(math.prod(t.shape) for t in read_gguf_header(path).tensors.values())
    return {
        "dtype": dtype,
        "weights_mib": sum(a.nbytes for a in jax.tree.leaves(nnx.state(model))) / (1 << 20),
        "weights_f16_mib": 2 * elements / (1 << 20),
        "prompt_tokens": t.prefill_tokens,
        "prefill_tokens_per_s": t.prefill_tokens / t.prefill_s,
        "decode_tokens": t.decode_tokens,
        "decode_tokens_per_s": t.decode_tokens / t.decode_s,
        "peak_host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_device_mib": stats.get("peak_bytes_in_use", 0) / (1 << 20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--measure", metavar="DTYPE", help="measure one activation type and print JSON")
    args = parser.parse_args()
    path = args.gguf or demo_gguf()
    if args.measure:
        print(json.dumps(measure(path, args.measure, args.max_tokens)))
        return
    rows = []
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-m", "benchmarks.demo", "--gguf", str(path), "--measure", dtype]
        done = subprocess.run(
            [*command, "--max-tokens", str(args.max_tokens)], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    print(f"wrote {harness.write_results('demo', {'model': path.name, 'rows': rows})}")


if __name__ == "__main__":
    main()
