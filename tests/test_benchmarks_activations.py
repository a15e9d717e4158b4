"""Benchmarks of products of quantized activations, and of products after a rest of the GPU."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from quantized_x import LIMITS, quantized

from benchmarks import harness, matmul, report, report_gpu, timing
from jax_qgemm.testing import check_product

ENVIRONMENT = {"commit": "0123456789abcdef", "device": "a device", "jax": "0.0", "platform_version": ""}


@pytest.mark.parametrize("text", ["int4:-1/int8", "int8/int8", "int4/fp8", "int4"])
def test_kinds_by_name(text):
    """The product quantizes x itself, so that this is timed too."""
    name, _, x_format = text.partition("/")
    format, product = harness.parse_kind(text)
    assert format == harness.parse_format(name)
    w, x = harness.random_weight(format, 256, 48, 0), harness.random_x(5, 256, "float32")
    exact = quantized(np.asarray(x), x_format) if x_format else x
    check_product(product(x, w), exact, w.dequantize(), LIMITS.get(x_format, 1e-11))


@pytest.mark.parametrize("text", ["int4/", "int4/q8_1", "/int8", "int4:/int8"])
def test_unknown_kinds(text):
    with pytest.raises(ValueError, match=r"expected one of int8, fp8 behind the slash|format"):
        harness.parse_kind(text)


def test_rows_with_a_time_under_load_and_a_cool_one(monkeypatch):
    monkeypatch.setattr(timing, "MAX_OPERATIONS", 3)
    rests = []
    monkeypatch.setattr(timing.time, "sleep", rests.append)
    rows = matmul.measure_shape(48, 128, ["int4:-1/int8", "int4/fp8"], [2], [2], "float32", ["dense"], idle=0.25)
    assert [row["kind"] for row in rows] == ["xla_f32", "int4:-1/int8", "int4/fp8"]
    for row in rows:
        assert min(row["us"], row["cool_us"]) > 0
        assert f"cool {row['cool_us']:9.2f} us" in matmul.line(row)
    # Before each sample: warming up, sizing the samples, a short and a long one five times; for three rows.
    assert rests == [0.25] * (3 + 2 + 2 * 5) * 3


def test_cool_samples_are_short(monkeypatch):
    """As many runs as take about ten milliseconds, at least one more than the short sample."""
    monkeypatch.setattr(timing.time, "sleep", lambda _: None)
    monkeypatch.setattr(timing, "on_gpu", lambda: True)
    monkeypatch.setattr(timing, "_blocker", lambda: lambda: None)
    for run_s, runs in ((2e-3, 5), (50e-3, 1), (1e-6, 8)):
        clock, calls = itertools.count(), []
        now = [0.0]

        class Compiled:
            def __call__(self, outs, run_s=run_s, now=now, calls=calls):
                now[0] += run_s
                calls.append(now[0])
                return outs

            def as_text(self):
                return ""

        monkeypatch.setattr(timing.time, "perf_counter", lambda now=now, clock=clock: now[0] + 1e-12 * next(clock))
        timed = timing.measure(timing.Run(Compiled(), (), jnp.zeros(()), 1), repeats=5, idle=0.1)
        assert timed.seconds == pytest.approx(run_s, rel=1e-3)
        assert len(calls) == 3 + 10 + 5 * (1 + 1 + runs)


def results(idle):
    rows = []
    for n, m in itertools.product((4096, 28672), (128, 2048)):
        for kind, us in (("xla_bf16", 40.0), ("int4:-1/int8", 16.0), ("int4/fp8", 20.0)):
            row = {"kind": kind, "n": n, "k": 4096, "m": m, "us": us, "read_us": 4.0, "floor_us": 5.0}
            rows.append(row | ({"cool_us": us - 4} if idle else {}))
    return {"environment": ENVIRONMENT, "dtype": "bfloat16", "idle": idle, "read_bandwidth": 4.5e12, "rows": rows}


def test_tables():
    table = report_gpu.prefill(results(0.25))
    assert "| n x k | m | XLA bf16 | int4:-1/int8 | int4/fp8 |\n" in table
    assert "| 28672 x 4096 | 2048 | 40.0 | 16.0 (2.50) | 20.0 (2.00) |\n" in table
    cool = report_gpu.prefill_cool(results(0.25))
    assert "| 28672 x 4096 | 2048 | 36.0 | 12.0 (3.00) | 16.0 (2.25) |\n" in cool
    assert "rested for 0.25 s before each sample" in cool
    assert "Not measured: the results are of a run without `--idle`." in report_gpu.prefill_cool(results(0.0))


def test_pages_without_results_say_so(tmp_path):
    page = "<!-- table:h200-activations -->\n<!-- end -->\n<!-- table:h200-activations-cool -->\n<!-- end -->\n"
    text = report.filled(page, tmp_path)
    assert text.count("Not measured yet: there is no `nvidia_h200-activations.json`") == 2
