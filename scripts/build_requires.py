"""Print what building jax_qgemm needs, one requirement a line, for `pip install -r`.

usage: build_requires.py static|dynamic

static: the build requirements of pyproject.toml. dynamic: what the build backend, once installed, adds to
them here (CMake or Ninja where the machine has none, the CUDA compiler for JAX_QGEMM_CUDA=wheels).
"""

import sys
import tomllib
from pathlib import Path


def main() -> None:
    match sys.argv[1:]:
        case ["static"]:
            pyproject = tomllib.loads(Path("pyproject.toml").read_text())
            requires = pyproject["build-system"]["requires"]
        case ["dynamic"]:
            from scikit_build_core.build import get_requires_for_build_editable

            requires = get_requires_for_build_editable({})
        case _:
            sys.exit(__doc__)
    print(*requires, sep="\n")


if __name__ == "__main__":
    main()
