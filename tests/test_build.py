"""The build's settings, what it says of itself, and the guard against a jaxlib that is too old for it."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jax_qgemm as qg
from jax_qgemm import _guard, _native

ROOT = Path(__file__).parent.parent
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="needs cmake, on the PATH or beside the interpreter")
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)")


def run(*command: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=env or os.environ, capture_output=True, text=True, check=False)


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, env=os.environ | env)


def write_ffi_header(include_dir: Path, major: int, minor: int) -> None:
    header = include_dir / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text(
        f"// XLA_FFI_API_MINOR 77\n#define XLA_FFI_API_MAJOR {major}\n\n#define XLA_FFI_API_MINOR {minor}  // why\n"
    )


class TestBuildInfo:
    def test_says_what_the_native_module_holds(self):
        info = qg.build_info()
        assert info.version == importlib.metadata.version("jax_qgemm")
        assert info.cuda == bool(_native.registrations()["CUDA"])
        assert info.cuda == bool(info.cuda_architectures) == (info.cuda_version is not None)
        assert "generic" in info.host_instruction_sets

    def test_ffi_version_is_one_that_the_installed_jaxlib_loads(self):
        major, minor = qg.build_info().ffi_api_version
        assert major == 0
        assert 3 <= minor <= _guard.runtime_ffi_version()[1]

    @needs_readelf
    def test_native_module_needs_no_cuda_library(self):
        assert _native.__file__ is not None
        dynamic = run("readelf", "-d", _native.__file__).stdout
        needed = [line for line in dynamic.splitlines() if "(NEEDED)" in line]
        assert needed
        assert not [line for line in needed if "cuda" in line or "nv" in line]

    def test_imports_where_no_gpu_is_visible(self):
        result = run_python(
            "import jax_qgemm; print(jax_qgemm.build_info())", CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu"
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("BuildInfo(")

    def test_stub_of_the_native_module_is_current(self, tmp_path):
        stub = tmp_path / "_native.pyi"
        result = run(sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "jax_qgemm._native", "-o", stub)
        assert result.returncode == 0, result.stderr
        assert (ROOT / "jax_qgemm" / "_native.pyi").read_text() == stub.read_text(), "run `make stubs`"


class TestGuard:
    @pytest.mark.parametrize(("built", "runtime"), [((0, 3), (0, 3)), ((0, 3), (0, 5))])
    def test_accepts_the_same_or_a_later_minor(self, built, runtime):
        _guard.check_ffi_version(built, runtime)

    @pytest.mark.parametrize(("built", "runtime"), [((0, 4), (0, 3)), ((1, 0), (0, 9)), ((0, 3), (1, 5))])
    def test_refuses_an_earlier_minor_and_another_major(self, built, runtime):
        with pytest.raises(ImportError) as error:
            _guard.check_ffi_version(built, runtime)
        message = str(error.value)
        assert "{}.{}".format(*built) in message
        assert "{}.{}".format(*runtime) in message
        assert "\n" not in message

    def test_reads_the_version_from_the_installed_headers(self, tmp_path, monkeypatch):
        write_ffi_header(tmp_path, 2, 41)
        monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
        assert _guard.runtime_ffi_version() == (2, 41)

    def test_stops_the_import_before_a_handler_is_registered(self, tmp_path):
        write_ffi_header(tmp_path, 0, 0)
        result = run_python(
            f"import jax; jax.ffi.include_dir = lambda: {str(tmp_path)!r}\n"
            "try: import jax_qgemm\n"
            "except ImportError as error: print(error)\n"
            "print(jax.numpy.ones(3).sum())",
            JAX_PLATFORMS="cpu",
        )
        refusal, total = result.stdout.splitlines()
        assert "the installed jaxlib provides 0.0" in refusal
        assert total == "3.0", result.stderr


@needs_cmake
class TestSettings:
    """Only the settings are read: no compiler is looked for, nothing is built."""

    def configure(self, tmp_path, *parts: str, defines: dict[str, str] | None = None, **env: str):
        script = tmp_path / "script.cmake"
        includes = [f'include("{ROOT.as_posix()}/cmake/{part}.cmake")' for part in ("settings", *parts)]
        report = 'message(STATUS "enabled=${JAX_QGEMM_CUDA_ENABLED}")'
        preamble = ["cmake_minimum_required(VERSION 3.25)", f'set(Python_EXECUTABLE "{sys.executable}")']
        script.write_text("\n".join([*preamble, *includes, report]))
        clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_QGEMM_") and k != "CUDACXX"}
        return run(CMAKE, *(f"-D{k}={v}" for k, v in (defines or {}).items()), "-P", script, env=clean | env)

    def test_unknown_cuda_choice_is_an_error(self, tmp_path):
        result = self.configure(tmp_path, "cuda_toolkit", JAX_QGEMM_CUDA="yes")
        assert result.returncode != 0
        assert "JAX_QGEMM_CUDA is 'yes'" in result.stderr
        assert "auto, on, wheels, off" in result.stderr

    def test_on_without_a_compiler_is_an_error(self, tmp_path):
        result = self.configure(tmp_path, "cuda_toolkit", JAX_QGEMM_CUDA="on", PATH=str(tmp_path))
        assert result.returncode != 0
        assert "neither CUDACXX nor nvcc" in result.stderr

    @pytest.mark.parametrize("choice", ["auto", ""])
    def test_auto_without_a_compiler_says_off(self, tmp_path, choice):
        result = self.configure(tmp_path, "cuda_toolkit", JAX_QGEMM_CUDA=choice, PATH=str(tmp_path))
        assert result.returncode == 0, result.stderr
        assert "jax_qgemm: CUDA off (JAX_QGEMM_CUDA=auto)" in result.stdout
        assert "enabled=OFF" in result.stdout

    def test_off_ignores_the_compiler(self, tmp_path):
        result = self.configure(tmp_path, "cuda_toolkit", JAX_QGEMM_CUDA="off", CUDACXX="/no/such/nvcc")
        assert result.returncode == 0, result.stderr
        assert "enabled=OFF" in result.stdout

    def test_a_compiler_that_is_not_there_is_an_error(self, tmp_path):
        result = self.configure(tmp_path, "cuda_toolkit", CUDACXX="/no/such/nvcc")
        assert result.returncode != 0
        assert "/no/such/nvcc" in result.stderr

    @pytest.mark.parametrize("architectures", ["75", "90a,75", "hopper"])
    def test_impossible_architectures_are_an_error(self, tmp_path, architectures):
        result = self.configure(
            tmp_path, "cuda_toolkit", CUDACXX=sys.executable, JAX_QGEMM_CUDA_ARCHITECTURES=architectures
        )
        assert result.returncode != 0
        assert architectures.split(",")[-1] in result.stderr

    @pytest.mark.parametrize(("minor", "allow", "accepted"), [(3, "", True), (4, "", False), (4, "ON", True)])
    def test_newer_ffi_headers_need_the_switch(self, tmp_path, minor, allow, accepted):
        write_ffi_header(tmp_path / "include", 0, minor)
        defines = {"JAX_QGEMM_FFI_INCLUDE_DIR": str(tmp_path / "include")}
        result = self.configure(tmp_path, "ffi_headers", defines=defines, JAX_QGEMM_ALLOW_NEWER_FFI=allow)
        assert (result.returncode == 0) == accepted
        assert f"0.{minor}" in (result.stdout if accepted else result.stderr)


class TestScripts:
    def test_peak_rss_measures_the_child_and_enforces_the_limit(self):
        measure = [sys.executable, "scripts/peak_rss.py", "--limit-mb"]
        child = [sys.executable, "-c", "x = bytearray(300_000_000)"]
        results = [run(*measure, limit, *child) for limit in (250, 450)]
        assert [result.returncode for result in results] == [1, 0]
        assert 300 <= float(results[0].stdout.split()[2]) <= 450

    def test_compile_times_counts_overlapping_files_once(self, tmp_path):
        rows = [(0, 4000, "a.cc.o"), (1000, 5000, "a.cu.o"), (4000, 7000, "b.cu.o"), (9000, 9500, "c.cu.o")]
        lines = ["# ninja log v5", *(f"{start}\t{end}\t0\t{name}\tabc" for start, end, name in rows)]
        (tmp_path / ".ninja_log").write_text("\n".join(lines))
        command = [sys.executable, "scripts/compile_times.py", tmp_path, "--limit-s"]
        results = [run(*command, limit) for limit in (6.6, 6.4)]
        assert [result.returncode for result in results] == [0, 1]
        assert "6.5 s  CUDA part, 3 files" in results[0].stdout
