"""JSON of untrusted files: no duplicate keys, no NaN, bounded size and depth; and typed access to its values."""

from __future__ import annotations

import json
import os
import stat
from typing import Any, NoReturn

from jax_qgemm.io.errors import FormatError, shorten

MAX_BYTES = 32 << 20  # headers, indexes and configurations of real models stay below 16 MB
_MAX_DEPTH = 64


class _Refused(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Refused(f"the key {shorten(name)} is there twice")
        found[name] = value
    return found


def _constant(text: str) -> NoReturn:
    raise _Refused(f"{text} is no JSON number")


def _check_depth(values: Any) -> None:
    level = [values]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise RecursionError


def parse(raw: bytes, path: str | os.PathLike[str], field: str, offset: int = 0) -> dict[str, Any]:
    """The JSON object that `raw` holds; errors are at `offset` of the file, plus where the text fails."""
    try:
        values = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_constant)
        if isinstance(values, (dict, list)):
            _check_depth(values)
    except UnicodeDecodeError as error:
        raise FormatError(path, field, offset + error.start, f"not UTF-8: {error.reason}") from None
    except json.JSONDecodeError as error:
        at = offset + len(error.doc[: error.pos].encode())
        raise FormatError(path, field, at, f"not JSON: {error.msg}") from None
    except _Refused as error:
        raise FormatError(path, field, offset, str(error)) from None
    except RecursionError:
        raise FormatError(path, field, offset, "JSON nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise FormatError(path, field, offset, f"not JSON that can be read: {error}") from None
    if not isinstance(values, dict):
        raise FormatError(path, field, offset, f"got a JSON {type(values).__name__}, expected an object")
    return values


def read_file(path: str, field: str) -> dict[str, Any]:
    """The JSON object in a regular file of at most `MAX_BYTES`."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(path, field, 0, "not a regular file")
    if status.st_size > MAX_BYTES:
        raise FormatError(path, field, 0, f"{status.st_size} bytes, expected at most {MAX_BYTES}")
    with open(path, "rb") as file:
        return parse(file.read(MAX_BYTES + 1), path, field)


class Config:
    """A JSON object whose values are checked as they are taken.

    Attributes:
      path: the file that it comes from, for errors.
      name: where it is in that file, such as "quantization_config".
      values: the object.
    """

    def __init__(self, path: str, name: str, values: dict[str, Any]):
        self.path = path
        self.name = name
        self.values = values

    def fail(self, key: str, problem: str) -> NoReturn:
        raise FormatError(self.path, f"{self.name}.{key}" if self.name else key, 0, problem)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value, of exactly this type; the default where it is missing or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not kind:  # True is no int here
            what = f"a {type(value).__name__}" if isinstance(value, (dict, list)) else shorten(value)
            self.fail(key, f"got {what}, expected a value of type {kind.__name__}")
        return value

    def first(self, keys: tuple[str, ...], kind: type, default: Any = None) -> Any:
        """The value under the first of these keys that has one: tools do not agree on names."""
        for key in keys:
            value = self.get(key, kind)
            if value is not None:
                return value
        return default

    def table(self, key: str) -> Config | None:
        values = self.get(key, dict)
        return None if values is None else Config(self.path, f"{self.name}.{key}" if self.name else key, values)
