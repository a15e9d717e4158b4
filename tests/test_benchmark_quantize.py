"""The benchmark of the quantizer measures what it says; the times themselves are no test's business."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantize_oracle import FORMATS

from benchmarks import harness, quantize, timing


@pytest.fixture(autouse=True)
def few_operations(monkeypatch):
    monkeypatch.setattr(timing, "MAX_OPERATIONS", 3)


def test_copies_read_and_write_half_of_the_bytes_each(monkeypatch):
    xs = []
    monkeypatch.setattr(quantize, "copy", lambda x: xs.append(x) or x + 1)
    times = quantize.time_copies([4096, 8192, 4096])
    assert sorted(times) == sorted(2 * x.nbytes for x in xs) == [4096, 8192]
    assert min(times.values()) > 0
    assert quantize.copy_bandwidth(1 << 16) > 0


def test_rows():
    rows = quantize.measure_shape(3, 64, FORMATS, "bfloat16")
    assert [row["kind"] for row in rows] == ["int8", "xla_int8", "fp8", "xla_fp8", "q8_1", "xla_q8_1"]
    x_and_codes, scales, groups = 3 * 64 * 3, 3 * 4, 3 * 2 * (2 + 2)
    assert [row["bytes"] for row in rows[::2]] == [x_and_codes + scales, x_and_codes + scales, x_and_codes + groups]
    for row in rows:
        assert row["m"] == 3
        assert row["k"] == 64
        assert min(row["us"], row["copy_us"]) > 0
        assert row["kind"] in quantize.line(row)


def test_every_input_is_quantized():
    xs = [jnp.full((2, 32), i, jnp.float32) for i in range(1, 4)]
    run = quantize._lower(lambda x: quantize.qg.quantize_activations(x, "int8"), xs).compile()
    outs = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), run.outs)
    quantized = run.function(outs, *run.args)
    for i, part in enumerate(quantized):
        np.testing.assert_array_equal(part.codes, 127)
        np.testing.assert_array_equal(part.scales, np.float32(i + 1) / np.float32(127))


def test_lines_say_what_else_was_timed():
    row = {"kind": "int8", "m": 1, "k": 64, "us": 2.0, "spread": 0.01, "bytes": 8_000_000, "copy_us": 1.0}
    assert "4.00 TB/s" in quantize.line(row)
    assert "50% of a copy" in quantize.line(row)
    assert "also in the graph: {'fusion': 2}" in quantize.line(row | {"ops": {"custom-call": 3, "fusion": 2}})
    assert "also" not in quantize.line(row | {"kind": "xla_int8", "ops": {"fusion": 2}})
    assert "HOST-BOUND" in quantize.line(row | {"host_bound": True})


def test_main_writes_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(quantize, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr("sys.argv", ["quantize", "--formats", "int8", "--m", "1,2", "--k", "64"])
    quantize.main()
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())
    assert path.name.endswith("-quantize.json")
    assert {(row["m"], row["k"]) for row in results["rows"]} == {(1, 64), (2, 64)}
    assert results["copy_bandwidth"] == 1e12
    assert "1.00 TB/s" in capsys.readouterr().out
