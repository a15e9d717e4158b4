"""What rounding to nearest and GPTQ cost the MiniLM example, by bits: figures of quality, on a CPU.

python -m benchmarks.minilm

Writes benchmarks/results/cpu-minilm.json.
"""

from __future__ import annotations

from typing import Any

import jax

from benchmarks import harness
from examples.minilm.__main__ import FORMATS, dense_bytes, packaged_model, sentences
from examples.minilm.checkpoint import load
from examples.minilm.compare import agreement
from examples.minilm.quantize import by_gptq, by_rounding

GROUP_SIZE = 64


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    encoder, _ = load(packaged_model())
    calibration, held_out = sentences("calibration"), sentences("held_out")
    reference = encoder(held_out)
    rows: list[dict[str, Any]] = []
    for bits, make in FORMATS.items():
        format = make(GROUP_SIZE, symmetric=False)
        encoders = {
            "rounded to nearest": by_rounding(encoder, format),
            "GPTQ": by_gptq(encoder, calibration, format),
            "GPTQ, act-order": by_gptq(encoder, calibration, format, act_order=True),
        }
        for method, quantized in encoders.items():
            figures = agreement(quantized(held_out), reference)._asdict()
            rows.append({"bits": bits, "method": method, **figures, "dense_bytes": dense_bytes(quantized)})
            print(rows[-1], flush=True)
    results = {
        "group_size": GROUP_SIZE,
        "calibration_sentences": len(calibration),
        "held_out_sentences": len(held_out),
        "float32_bytes": dense_bytes(encoder),
        "rows": rows,
    }
    print(f"wrote {harness.write_results('minilm', results)}")


if __name__ == "__main__":
    main()
