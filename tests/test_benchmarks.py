"""The benchmarks measure what they say: what is timed, what is read out of a trace or a tool's output, and what a
report makes of it. The times themselves are no test's business."""

import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

import jax_qgemm as qg
from benchmarks import bitwise, chain, harness, matmul, ncu, plot, report, report_gpu, timing, trace, verify
from jax_qgemm.formats import GGUF_FORMATS

FORMATS = ["int4", "int4:32", "int4:-1", "int8:-1", "int4:128:asymmetric", "int3:64", *GGUF_FORMATS]
ENVIRONMENT = {"commit": "0123456789abcdef", "device": "a device", "jax": "0.0", "platform_version": ""}


@pytest.mark.parametrize(
    ("text", "format"),
    [
        ("q4_k", "q4_k"),
        ("int4", qg.int4(128)),
        ("int4:32", qg.int4(32)),
        ("int8:-1", qg.int8(-1)),
        ("int2:64:asymmetric", qg.int2(64, symmetric=False)),
    ],
)
def test_format_by_name(text, format):
    assert harness.parse_format(text) == (GGUF_FORMATS[format] if isinstance(format, str) else format)


@pytest.mark.parametrize("text", ["q4_0:32", "int4:", "int4:x", "int4:32:odd", "int4:7", "nothing"])
def test_unknown_format(text):
    with pytest.raises(ValueError, match=r"format|group_size"):
        harness.parse_format(text)


def test_shapes_by_name():
    assert harness.parse_shapes("decode", matmul.SHAPES)[-1] == (28672, 4096)
    assert harness.parse_shapes("32x64,16x128", matmul.SHAPES) == [(32, 64), (16, 128)]
    with pytest.raises(ValueError, match="decode, untuned"):
        harness.parse_shapes("4096", matmul.SHAPES)


@pytest.mark.parametrize("text", FORMATS)
def test_random_weight_is_moderate(text):
    w = harness.random_weight(harness.parse_format(text), 256, 33, 0)
    assert w.shape == (256, 33)
    dense = np.asarray(w.dequantize(), np.float64)
    assert np.isfinite(dense).all()
    assert 0 < np.abs(dense).max() < 1e3
    assert len(np.unique(dense)) > 10
    other = np.asarray(harness.random_weight(harness.parse_format(text), 256, 33, 1).dequantize())
    assert not np.array_equal(other, dense)


def test_bits_per_weight():
    assert harness.bits_per_weight(qg.int4(128)) == 4 + 16 / 128
    assert harness.bits_per_weight(qg.int4(32, symmetric=False)) == 4 + 24 / 32
    assert harness.bits_per_weight(GGUF_FORMATS["q6_k"]) == 8 * 210 / 256


# Timing.


@pytest.fixture(scope="module")
def weights():
    return [harness.random_weight(qg.int4(32), 64, 48, i) for i in range(5)]


def test_timed_products_are_all_there_and_nothing_else(weights):
    x = harness.random_x(3, 64, "float32")
    run = timing.lower_products(qg.matmul, x, weights).compile()
    text = run.function.as_text()
    assert timing.hlo_ops(text) == {"custom-call": 5}
    assert all(f"{{{i}}}: ({i}, " in text.split("input_output_alias=")[1] for i in range(5)), "results are not donated"
    outs = run.function([jnp.zeros((3, 48)) for _ in weights], *run.args)
    for out, w in zip(outs, weights, strict=True):
        expected = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


def test_measure(weights):
    timed = timing.measure(timing.lower_products(qg.matmul, harness.random_x(1, 64, "float32"), weights).compile())
    assert 0 < timed.seconds < 0.1
    assert timed.row().keys() == {"us", "spread"}


def test_chain_depends_on_every_product(weights):
    weights = [harness.random_weight(qg.int4(32), 64, 64, i) for i in range(3)]
    x = harness.random_x(2, 64, "float32")
    run = chain.lower_chain(qg.matmul, x, weights).compile()
    expected = np.asarray(x, np.float64)
    for w in weights:
        expected = expected @ np.asarray(w.dequantize(), np.float64)
    np.testing.assert_allclose(run.function(jnp.zeros((2, 64)), *run.args), expected, rtol=1e-4)
    assert timing.hlo_ops(run.function.as_text()) == {"custom-call": 3}


def test_hlo_ops_counts_what_runs():
    text = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[8]) -> f32[] {
  %p = f32[8]{0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %r = f32[] reduce(%p, %zero), dimensions={0}, to_apply=%add
}

%command_buffer (p: f32[8]) -> (f32[], f32[8]) {
  %p.1 = f32[8]{0} parameter(0)
  %fusion.1 = f32[] fusion(%p.1), kind=kInput, calls=%fused
  %gemm.1 = (f32[8]{0}, s8[4]{0}) custom-call(%p.1), custom_call_target="gemm"
  %out = f32[8]{0} get-tuple-element(%gemm.1), index=0
  ROOT %t = (f32[], f32[8]) tuple(%fusion.1, %out)
}

ENTRY %main.5 (x: f32[8]) -> f32[] {
  %x = f32[8]{0} parameter(0)
  %copy.2 = f32[8]{0} copy(%x)
  %call.1 = (f32[], f32[8]) call(%copy.2), to_apply=%command_buffer
  ROOT %o = f32[] get-tuple-element(%call.1), index=0
}
"""
    assert timing.hlo_ops(text) == {"copy": 1, "custom-call": 1, "fusion": 1}


@pytest.mark.parametrize("name", timing.READS)
def test_reads_read_every_word(name):
    words = np.random.default_rng(0).integers(0, 1 << 32, 1 << 13, np.uint32)
    assert np.sum(timing.READS[name](jnp.asarray(words)), dtype=np.uint32) == np.sum(words, dtype=np.uint32)


def test_matmul_rows(monkeypatch):
    monkeypatch.setattr(timing, "MAX_OPERATIONS", 3)
    rows = matmul.measure_shape(48, 128, ["int4:32", "q4_k", "q4_0"], [1, 2], [1], "float32")
    # q4_k has blocks of 256.
    expected = ["xla_f32", "xla_int4", "int4:32", "q4_0", "int4:32", "q4_0"]
    assert [row["kind"] for row in rows] == expected
    assert [row["m"] for row in rows] == [1, 1, 1, 1, 2, 2]
    sizes = {row["kind"]: row["bytes"] for row in rows}
    codes = 48 * 128 // 2
    assert sizes == {
        "xla_f32": 8 * codes,
        "xla_int4": codes + 48 * 2,
        "int4:32": codes + 48 * 4 * 2,
        "q4_0": codes + 48 * 4 * 2,
    }
    for row in rows:
        assert min(row["us"], row["read_us"], row["floor_us"]) > 0
        assert row["kind"] in matmul.line(row)


def test_bitwise_finds_a_product_that_changes(monkeypatch):
    w = harness.random_weight(qg.int4(32), 64, 16, 0)
    x = harness.random_x(2, 64, "float32")
    assert bitwise.differing_runs(x, w, 4) == 0
    counter = itertools.count()

    def changing(x, w):
        shape = jax.ShapeDtypeStruct((2, 16), jnp.float32)
        return jax.pure_callback(lambda x: np.full((2, 16), next(counter) // 3, np.float32), shape, x)

    monkeypatch.setattr(bitwise.qg, "matmul", changing)
    assert bitwise.differing_runs(x, w, 6) == 3


# Traces.

_GPU_TRACE = """
planes {{ name: "/host:CPU" lines {{ name: "python" events {{ metadata_id: 1 duration_ps: 9000000 }} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "not on the device" }} }} }}
planes {{ name: "/device:GPU:0"
  lines {{ name: "Stream #14(Compute)" timestamp_ns: 1000 {stream} }}
  lines {{ name: "XLA Modules" timestamp_ns: 1000 events {{ metadata_id: 1 offset_ps: 0 duration_ps: 9000000000 }} }}
  {names} }}
"""


def gpu_trace(events: list[tuple[str, int, int]]):
    """A trace of (name, start in ns, duration in ns)."""
    names = {name: i + 1 for i, name in enumerate(dict.fromkeys(name for name, _, _ in events))}
    stream = " ".join(
        f"events {{ metadata_id: {names[name]} offset_ps: {start * 1000} duration_ps: {duration * 1000} }}"
        for name, start, duration in events
    )
    metadata = " ".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}' for n, i in names.items())
    return ProfileData.from_text_proto(_GPU_TRACE.format(stream=stream, names=metadata))


def test_trace_of_a_gpu():
    data = gpu_trace([
        ("void jax_qgemm::gemv<jax_qgemm::Q4_K, (int)4>(jax_qgemm::Product)", 0, 3000),
        ("_ZN9jax_qgemm9gemm_sm80INS_4Q4_0EEEvNS_7ProductE", 3000, 1000),
        ("loop_multiply_fusion_3", 5000, 500),
        ("loop_multiply_fusion_12", 5500, 500),
        ("MemcpyD2D", 6000, 1000),
        ("sm90_xmma_gemm_bf16bf16", 6500, 1500),  # half a microsecond of it under the copy
        ("something", 9000, 1000),
    ])  # fmt: skip
    found = trace.summarize(trace.device_events(data))
    assert found["span_us"] == pytest.approx(10)
    groups = {name: (group["us"], group["events"]) for name, group in found["groups"].items()}
    assert groups == {
        "jax_qgemm": (pytest.approx(4), 2),
        "XLA fusions": (pytest.approx(1), 2),
        "copies": (pytest.approx(1), 1),
        "other products": (pytest.approx(1), 1),
        "other": (pytest.approx(1), 1),
        "idle": (pytest.approx(2), 0),
    }
    assert sum(group["share"] for group in found["groups"].values()) == pytest.approx(1)
    assert found["not_products"] == pytest.approx(0.5)
    kernels = {kernel["name"]: kernel["events"] for kernel in found["kernels"]}
    assert kernels["jax_qgemm::gemv"] == kernels["jax_qgemm::gemm_sm80"] == 1
    assert kernels["loop_multiply_fusion"] == 2


def test_trace_without_events():
    with pytest.raises(ValueError, match="nothing that ran on a device"):
        trace.summarize(trace.device_events(gpu_trace([])))


def test_trace_of_this_machine(tmp_path):
    w = harness.random_weight(qg.int4(32), 256, 256, 0)
    f = jax.jit(lambda x: jnp.sin(qg.matmul(x, w)))
    x = harness.random_x(2, 256, "float32")
    jax.block_until_ready(f(x))
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            jax.block_until_ready(f(x))
    found = trace.summarize(trace.read_trace(tmp_path))
    assert found["groups"]["jax_qgemm"]["events"] == 3
    assert found["not_products"] < 1


def test_no_trace(tmp_path):
    with pytest.raises(ValueError, match="wrote no trace"):
        trace.read_trace(tmp_path)


# Tools.

_STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
_NCU_COLUMNS = {  # name -> unit, two kernels
    "ID": ("", "0", "1"),
    "Process Name": ("", "python3.12", "python3.12"),
    "Kernel Name": ("", *["void jax_qgemm::gemv<int, (bool)1>(Product, int)"] * 2),
    "Block Size": ("", "(256, 1, 1)", "(256, 1, 1)"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "85.5", "86.5"),
    "gpu__time_duration.sum": ("ns", "17,312", "17,120"),
    "launch__registers_per_thread": ("register/thread", "96", "96"),
    _STALLED.format("barrier"): ("inst", "0.5", "0.25"),
    _STALLED.format("long_scoreboard"): ("inst", "11.25", "11.5"),
    _STALLED.format("long_scoreboard_not_issued"): ("inst", "9", "9"),
    _STALLED.format("selected"): ("inst", "1", "1"),
}
_NCU = '==PROF== Connected to process 42\n==PROF== Profiling "gemv": 0%....50%....100% - 19 passes\n' + "".join(
    ",".join(f'"{cell}"' for cell in line) + "\n" for line in [_NCU_COLUMNS, *zip(*_NCU_COLUMNS.values(), strict=True)]
)


def test_ncu_output():
    first, second = ncu.parse(_NCU)
    assert first == {
        "kernel": "void jax_qgemm::gemv<int, (bool)1>(Product, int)",
        "dram_percent": 85.5,
        "duration": 17312.0,
        "duration_unit": "ns",
        "registers": 96.0,
        "registers_unit": "register/thread",
        "stalls": {"long_scoreboard": 11.25, "barrier": 0.5},
    }
    assert second["duration"] == 17120.0


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "ERR_NVGPUCTRPERM"),
        ("x\n==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n", "LibraryNotLoaded"),
        ("==PROF== Connected\n==WARNING== No kernels were profiled.", "found no kernel of jax_qgemm"),
    ],
)
def test_ncu_without_figures(output, reason):
    assert ncu.parse(output) == []
    assert reason in ncu.why_not(output)


@pytest.mark.parametrize(
    ("tool", "output", "cases", "errors"),
    [
        ("memcheck", "1 q4_0 m=1\n82 cases\n========= ERROR SUMMARY: 0 errors\n", 82, 0),
        ("memcheck", "82 cases\n========= ERROR SUMMARY: 1 error\n", 82, 1),
        ("racecheck", "82 cases\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 82, 0),
        ("racecheck", "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n", None, 3),
        ("initcheck", "Segmentation fault\n", None, None),
    ],
)
def test_sanitizer_output(tool, output, cases, errors):
    assert verify.parse_sanitizer(tool, output) == {"cases": cases, "errors": errors}


def test_a_step_that_hangs_is_stopped():
    sleep = [sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"]
    status, output, seconds = verify.run(sleep, 2)
    assert (status, output) == (verify.TIMED_OUT, "begun\n")
    assert seconds < 20
    assert verify.run([sys.executable, "-c", "raise SystemExit(3)"], 20)[0] == 3


# Reports.


def matmul_results() -> dict:
    """Two shapes; times that are easy to check."""
    rows = []
    for (n, k), m in itertools.product(((4096, 4096), (1000, 4096)), (1, 2, 3)):
        for kind, us in (("xla_bf16", 40.0), ("xla_int4", 80.0), ("int4", 5.0 * m), ("q4_k", 10.0)):
            if m == 1 or not kind.startswith("xla_"):
                row = {"kind": kind, "n": n, "k": k, "m": m, "us": us, "spread": 0.01, "bytes": n * k // 2}
                rows.append(row | {"read_us": 4.0, "read_by": "rows", "floor_us": 5.0})
    rows[-1]["host_bound"] = True
    return {"environment": ENVIRONMENT, "dtype": "float16", "read_bandwidth": 4.5e12, "rows": rows}


def write(folder, name, results):
    (folder / f"nvidia_h200-{name}.json").write_text(json.dumps({"environment": ENVIRONMENT, **results}))


def test_tables_of_products():
    results = matmul_results()
    int4 = report_gpu.int4(results)
    assert "| 4096 x 4096 | 1 | 4.0 | 5.0 | 1.25 | 40.0 | 8.0 | 80.0 | 16.0 |\n" in int4
    assert "| 4096 x 4096 | 2 | 4.0 | 10.0 | 2.50 |  |  |  |  |\n" in int4
    assert "a device; jax 0.0, commit 012345678." in int4
    assert "4.50 TB/s" in int4
    assert "Bound by the host, and so an upper limit: q4_k 1000 x 4096 m = 3." in int4
    formats = report_gpu.formats(results)
    assert "| n x k | m | int4 | q4_k |\n" in formats
    assert "| 1000 x 4096 | 3 | 15.0 (3.00) | 10.0 (2.00) |\n" in formats
    prefill = report_gpu.prefill(results)
    assert "| n x k | m | XLA bf16 | int4 | q4_k |\n" in prefill
    assert "| 4096 x 4096 | 1 | 40.0 | 5.0 (8.00) | 10.0 (4.00) |\n" in prefill
    assert "| 4096 x 4096 | 2 |  | 10.0 | 10.0 |\n" in prefill
    assert "| 4096 x 4096 | int4 | 1 to 3 | 2.00 | 1 to 2 |\n" in report_gpu.neighbours(results)
    assert "| 4096 x 4096 | 2 |  |  | 10.0 | 10.0 |\n" in report.matmul(results)


def test_tables_of_everything_else():
    rows = [{"kind": kind, "m": 1, "us": us} for kind, us in (("int4", 2.5), ("xla_bf16", 3.25))]
    table = report_gpu.chain({"environment": ENVIRONMENT, "length": 64, "size": 512, "rows": rows})
    assert "| m | int4 | XLA bf16 |\n" in table
    assert "| 1 | 2.50 | 3.25 |\n" in table

    summary = trace.summarize([trace.Event("jax_qgemm::gemv", 0, 6000), trace.Event("loop_add_fusion_1", 8000, 10000)])
    decode = {
        "environment": ENVIRONMENT,
        "model": "m.gguf",
        "row": {"dtype": "bfloat16", "decode_tokens_per_s": 500.0},
        "trace": {"tokens": 2, "in_cuda_graphs": True} | summary,
    }
    table = report_gpu.gemma_decode(decode)
    assert "500 tokens/s with bfloat16 activations, m.gguf." in table
    assert "5 µs a token, 40% of it not matrix products." in table
    assert "| jax_qgemm | 60.0% | 3.0 | 0.5 |\n" in table
    assert "| idle | 20.0% | 1.0 | 0.0 |\n" in table
    assert "500 tokens/s" in report_gpu.gemma_decode(decode | {"trace": None})

    steps = {
        "tests": {"exit_status": 0, "seconds": 99.5, "tests": 10, "failures": 1, "errors": 1, "skipped": 3},
        "memcheck": {"exit_status": 0, "seconds": 60, "cases": 82, "errors": 0},
        "bitwise": {"exit_status": 0, "seconds": 60, "cases": 9, "runs": 100, "different": []},
        "racecheck": {"exit_status": verify.TIMED_OUT, "seconds": 60, "cases": None, "errors": None},
        "ncu": {"exit_status": 0, "cases": [{"format": "int4", "m": 1, "n": 8, "k": 64, "kernels": ncu.parse(_NCU)}]},
    }
    results = {"environment": ENVIRONMENT, "steps": steps}
    table = report_gpu.verify(results)
    for line in ("10 tests, 2 failed, 3 skipped", "82 cases, 0 errors", "failed: timed out"):
        assert line in table
    assert "9 products, 100 runs each, 0 not equal to the bit" in table
    expected = (
        "| int4, 8 x 64, m = 1 | `jax_qgemm::gemv` | 17,120 | 86 |  |  | 96 | long scoreboard 11.5, barrier 0.2 |\n"
    )
    assert expected in report_gpu.ncu(results)
    steps["ncu"] = {"unavailable": "ncu is not on the PATH"}
    assert "Not measured: ncu is not on the PATH." in report_gpu.ncu(results)


def test_pages_are_filled_from_the_results_that_exist(tmp_path):
    page = "<!-- table:h200-int4 -->\n<!-- end -->\n<!-- picture:img/h200-matmul.svg -->\nold\n<!-- end -->\nrest\n"
    empty = report.filled(page, tmp_path)
    assert empty.count("Not measured yet") == 2
    assert "old" not in empty
    write(tmp_path, "matmul", matmul_results())
    full = report.filled(empty, tmp_path)
    assert "Not measured" not in full
    assert "| 4096 x 4096 | 1 |" in full
    assert "![Time against m, by shape, on an H200](img/h200-matmul.svg)" in full
    assert report.filled(full, tmp_path) == full


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the bench extra")
    write(tmp_path, "matmul", matmul_results())
    [(file, picture)] = report.stale_pictures(tmp_path, tmp_path)
    plot.draw_file(file, picture)
    assert report.stale_pictures(tmp_path, tmp_path) == []
    drawn = picture.read_text()
    for text in ("4096 x 4096", "1000 x 4096", "XLA int4", "plain read"):
        assert text in drawn
    plot.draw_file(file, picture)
    assert picture.read_text() == drawn, "the same results give another picture"
    write(tmp_path, "matmul", matmul_results() | {"dtype": "bfloat16"})
    assert report.stale_pictures(tmp_path, tmp_path) == [(file, picture)]


def test_pictures_of_the_documentation_are_up_to_date():
    assert report.stale_pictures() == [], "run python -m benchmarks.report"
