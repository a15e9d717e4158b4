"""Tables in Markdown, and the line that says where their figures come from."""

from collections.abc import Iterable, Mapping
from typing import Any


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def source(results: Mapping[str, Any]) -> str:
    """Device, version and commit of a result file."""
    env = results["environment"]
    commit, _, dirty = env["commit"].partition("-")
    return f"\n{env['device']}; jax {env['jax']}, commit {commit[:9]}{' and changes on it' if dirty else ''}.\n"
