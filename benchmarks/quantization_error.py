"""Quantization error of every format on normal weights, and whether `quantize` writes the bytes of gguf-py.

python -m benchmarks.quantization_error

Runs on the CPU, needs the test extra (gguf-py), and writes benchmarks/results/quantization_error.json;
`python -m benchmarks.report` then puts the figures into docs/formats.md.
"""

from __future__ import annotations

import json
from typing import Any

import gguf
import jax
import numpy as np

import jax_qgemm as qg
from benchmarks import harness
from benchmarks.report_formats import INT_FORMATS
from jax_qgemm.formats import GGUF_FORMATS, Format, GGUFFormat
from jax_qgemm.testing import nmse

SEED, K, N = 0, 4096, 256
RESULTS = harness.RESULTS / "quantization_error.json"


def equals_gguf_py(w: np.ndarray, packed: qg.QTensor) -> bool | None:
    """Whether gguf-py quantizes w to the same bytes; None where it has no quantizer for the format."""
    if not isinstance(packed.format, GGUFFormat):
        return None
    try:
        expected = gguf.quants.quantize(w.T, gguf.GGMLQuantizationType(packed.format.ggml_type))
    except NotImplementedError:
        return None
    return bool(np.array_equal(packed.to_gguf_bytes(), expected))


def measure(format: Format, w: np.ndarray) -> dict[str, Any]:
    packed = qg.quantize(w, format)
    error = nmse(packed.dequantize(), w)
    return {"format": str(format), "nmse": error, "equals_gguf_py": equals_gguf_py(w, packed)}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    w = np.random.default_rng(SEED).standard_normal((K, N)).astype(np.float32)
    rows = []
    for format in (*GGUF_FORMATS.values(), *INT_FORMATS):
        rows.append(measure(format, w))
        print(rows[-1], flush=True)
    results = {"environment": harness.environment(), "seed": SEED, "k": K, "n": N, "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
