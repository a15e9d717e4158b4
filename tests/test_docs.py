"""README.md and docs/ are true: their Python runs and prints what they show, their tables and pictures are up to date,
and the files and tests that they name exist."""

import contextlib
import importlib
import importlib.util
import io
import re
import types
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
IDS = [page.name for page in PAGES]
_BLOCK = re.compile(
    r"(?P<marker><!-- not run(?P<reason>: [^>]+)? -->\n+)?^```python\n(?P<code>.*?)^```$"
    r"(?:\n+```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
_PATH = re.compile(r"`((?:benchmarks|cmake|cuda|docs|examples|jax_qgemm|scripts|tests)/[\w./-]*)(?:::(\w+))?`")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page in order, in one namespace. A text block right behind one is what it prints."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace = {"__name__": "__main__"}
    for block in _BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("code"))
        if block["marker"]:
            assert block["reason"], f"{page.name}:{line}: <!-- not run --> needs a reason: <!-- not run: why -->"
            continue
        printed = io.StringIO()
        # Blank lines before the code make the line numbers of a traceback those of the page.
        code = compile("\n" * line + block["code"], str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block["output"] is not None:
            assert printed.getvalue() == block["output"], f"{page.name}:{line}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_named_files_and_tests_exist(page):
    for target in _LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name, test in _PATH.findall(page.read_text()):
        path = ROOT / name
        assert path.exists(), f"{page.name} names {name}"
        if test:
            assert re.search(rf"^ *def {test}\b", path.read_text(), re.MULTILINE), f"{name} has no {test}"


@pytest.mark.parametrize("module", ["jax_qgemm", "jax_qgemm.io", "jax_qgemm.flax"])
def test_public_names_are_documented(module):
    documented = set(re.findall(r"^::: [\w.]*\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    public = importlib.import_module(module)
    for name in public.__all__:
        assert name in documented or isinstance(getattr(public, name), types.ModuleType), f"{module}.{name}"


@pytest.mark.parametrize("path", report.PAGES, ids=lambda path: path.name)
def test_tables_are_up_to_date(path):
    page = path.read_text()
    assert report.filled(page) == page, "run python -m benchmarks.report"


@pytest.mark.parametrize("name", ["tile", "words"])
def test_pictures_of_the_layout_are_up_to_date(name):
    path = ROOT / "scripts" / "draw_layout.py"
    spec = importlib.util.spec_from_file_location("draw_layout", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn = getattr(module, f"draw_{name}")()
    assert drawn == (ROOT / "docs" / "img" / f"{name}.svg").read_text(), "run scripts/draw_layout.py"
