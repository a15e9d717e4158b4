"""What a reader raises when a file is not what its format promises."""

from __future__ import annotations

import os


class FormatError(ValueError):
    """A checkpoint file is damaged, or uses something that its reader does not support.

    Attributes:
      path: the file.
      field: what was being read, such as "tensor 'output.weight': offset".
      offset: the byte of the file where that field starts.
    """

    def __init__(self, path: str | os.PathLike[str], field: str, offset: int, problem: str):
        super().__init__(path, field, offset, problem)
        self.path = os.fspath(path)
        self.field = field
        self.offset = offset
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path}: {self.field} at byte {self.offset}: {self.problem}"


def shorten(name: str | bytes) -> str:
    """A quoted name, for messages."""
    quoted = repr(name)
    return quoted if len(quoted) <= 100 else f"{quoted[:48]}...{quoted[-48:]}"
