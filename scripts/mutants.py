"""`make test-mutants`: breaks the decoders and kernels on purpose; the tests must catch every break.

Each mutant of mutants_table.py is applied to a copy of the tree, the native module or the emulated CUDA kernels are
rebuilt, and the unmodified tests run until the first failure. The result goes to tests/mutants.json, for a run over all
of them.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mutants_table import CUDA_MUTANTS, MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "tests" / "mutants.json"
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in ("matmul", "format_tables", "transforms", "fused", "fused_transforms", "experts")
)
# Of mutants of a CUDA kernel, which is emulated.
CUDA_TESTS = ("tests/test_gemm_sm90_a8_emulated.py",)
COPIED = ("CMakeLists.txt", "pyproject.toml", "cmake", "cuda", "jax_qgemm", "tests")
# An editable install's import hook would find the module of the original tree before that of the copy.
RUNNER = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
import jax_qgemm._native, pytest
assert jax_qgemm._native.__file__.startswith(sys.argv[1]), jax_qgemm._native.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""
PYTEST_FAILED = 1


def find_stale(root: Path = ROOT) -> list[str]:
    """Mutants whose `old` text does not occur exactly once in their file."""
    return [
        f"{m.name}: its text occurs {count} times in {m.path}, expected once"
        for m in MUTANTS
        if (count := (root / m.path).read_text().count(m.old)) != 1
    ]


class Workbench:
    """A copy of the tree that is rebuilt and tested again and again."""

    def __init__(self, folder: Path):
        self.tree, self.build = folder / "tree", folder / "build"
        self.tree.mkdir()
        ignore = shutil.ignore_patterns("_native*.so", "__pycache__", "golden")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.tree / name, ignore=ignore)
            else:
                shutil.copy2(source, self.tree / name)
        # Every instruction set is built from the same kernels: one of them is enough, and three times as fast.
        for path in (self.tree / "cuda/host").glob("*_avx*.cc"):
            path.unlink()
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self.environment = os.environ | {"PATH": tools, "JAX_QGEMM_CUDA": "off", "JAX_PLATFORMS": "cpu"}
        self.environment["EMULATION_BUILD"] = str(folder / "emulation")
        generator = ["-G", "Ninja"] if shutil.which("ninja", path=tools) else []
        self._run("cmake", "-S", self.tree, "-B", self.build, *generator, f"-DPython_EXECUTABLE={sys.executable}")

    def _run(self, *command: str | Path) -> None:
        done = subprocess.run(
            list(map(str, command)), env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-4000:]}")

    def caught_by(self, tests: tuple[str, ...]) -> str | None:
        """Rebuilds and runs the tests: the first that fails, None if all pass."""
        self._run("cmake", "--build", self.build, "--parallel")
        (module,) = self.build.glob("_native*.so")
        shutil.copy2(module, self.tree / "jax_qgemm")
        options = ["-x", "-q", "-rf", "--tb=no", "-m", "not gpu", "-p", "no:cacheprovider"]
        command = [sys.executable, "-c", RUNNER, str(self.tree), *options, *tests]
        done = subprocess.run(command, cwd=self.tree, env=self.environment, capture_output=True, text=True, check=False)
        failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
        if done.returncode == PYTEST_FAILED and failed:
            return failed[1]
        if done.returncode:
            sys.exit(f"pytest ended with status {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
        return None

    @contextlib.contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        path = self.tree / mutant.path
        text = path.read_text()
        path.write_text(text.replace(mutant.old, mutant.new))
        yield
        path.write_text(text)


def tests_of(mutant: Mutant) -> tuple[str, ...]:
    return CUDA_TESTS if mutant in CUDA_MUTANTS else TESTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants; the result is not written")
    arguments = parser.parse_args()
    if stale := find_stale():
        sys.exit("mutants that no longer fit the sources:\n" + "\n".join(stale))
    names = [m.name for m in MUTANTS]
    if unknown := set(arguments.only or ()) - set(names):
        sys.exit(f"no mutants {sorted(unknown)}; there are {', '.join(names)}")
    chosen = [m for m in MUTANTS if not arguments.only or m.name in arguments.only]

    with tempfile.TemporaryDirectory(prefix="jax_qgemm-mutants-") as folder:
        bench = Workbench(Path(folder).resolve())
        print("without a mutant:", flush=True)
        if failed := bench.caught_by(tuple(dict.fromkeys(test for m in chosen for test in tests_of(m)))):
            sys.exit(f"the tests fail without a mutant: {failed}")
        print("  all tests pass", flush=True)
        results = []
        for mutant in chosen:
            start = time.monotonic()
            with bench.mutated(mutant):
                caught_by = bench.caught_by(tests_of(mutant))
            results.append({**dataclasses.asdict(mutant), "caught_by": caught_by})
            took = f"({time.monotonic() - start:.0f} s)"
            print(f"{mutant.name}: {mutant.what}\n  {caught_by or 'SURVIVED'} {took}", flush=True)

    survivors = [r["name"] for r in results if not r["caught_by"]]
    print(f"{len(results) - len(survivors)} of {len(results)} mutants caught", flush=True)
    if not arguments.only:
        result = {"tests": TESTS, "cuda_tests": CUDA_TESTS, "survivors": survivors, "mutants": results}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    if survivors:
        sys.exit(f"survivors: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
