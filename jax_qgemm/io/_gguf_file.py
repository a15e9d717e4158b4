"""An open GGUF file: checked reads by position, and the cursor that walks through its header."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from jax_qgemm.io.errors import FormatError, shorten

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_HEADER_CHUNK = 1 << 20
_DATA_CHUNK = 1 << 24

# Python objects can be larger than the bytes they come from: a two-character string takes 10 bytes in the
# file and some 70 in memory. What a header decodes to may hold this much plus four times the bytes read so
# far, with room left for buffers; headers of real models stay far below.
_MEMORY_BASE = 48 << 20
_MEMORY_PER_BYTE = 4


class GGUFFile:
    """An open file, read by position. It may shrink at any time, so that every read is checked."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self.size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def read_into(
        self, buffer: memoryview, offset: int, field: str, advance: Callable[[int], Any] | None = None
    ) -> None:
        """Fills the buffer from `offset`; `advance` is called with the bytes of each step."""
        done = 0
        while done < len(buffer):
            step = os.preadv(self._file.fileno(), [buffer[done : done + _DATA_CHUNK]], offset + done)
            if step == 0:
                problem = f"no more data, but the file had {self.size} bytes when it was opened"
                raise FormatError(self.path, field, offset + done, problem)
            done += step
            if advance is not None:
                advance(step)


class Cursor:
    """Walks through the header; `field` says what is being read, for the errors."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.offset = 0
        self.field = "magic"
        self._chunk = b""
        self._chunk_offset = 0
        self._held = 0

    @property
    def left(self) -> int:
        return self.file.size - self.offset

    def fail(self, problem: str, offset: int | None = None) -> NoReturn:
        raise FormatError(self.file.path, self.field, self.offset if offset is None else offset, problem)

    def hold(self, nbytes: int, transient: int = 0) -> None:
        """Counts memory that stays, and checks it together with what is needed only for a moment."""
        self._held += nbytes
        limit = _MEMORY_BASE + _MEMORY_PER_BYTE * self.offset
        if self._held + transient > limit:
            self.fail(f"the header would need more than {limit} bytes of memory to decode")

    def take(self, nbytes: int) -> bytes:
        start = self.offset - self._chunk_offset
        if start + nbytes > len(self._chunk):
            if nbytes > self.left:
                self.fail(f"truncated: {nbytes} bytes expected, {self.left} left in the file")
            chunk = bytearray(min(max(nbytes, _HEADER_CHUNK), self.left))
            self.file.read_into(memoryview(chunk), self.offset, self.field)
            self._chunk, self._chunk_offset, start = bytes(chunk), self.offset, 0
        self.offset += nbytes
        return self._chunk[start : start + nbytes]

    def u32(self) -> int:
        return _U32.unpack(self.take(4))[0]

    def u64(self) -> int:
        return _U64.unpack(self.take(8))[0]

    def count(self, min_bytes: int) -> int:
        """A number of entries of at least `min_bytes` each."""
        start = self.offset
        count = self.u64()
        if count * min_bytes > self.left:
            self.fail(f"{count} entries of at least {min_bytes} bytes, but {self.left} bytes are left", start)
        return count

    def name(self, max_bytes: int) -> str:
        """A string that names something: strict UTF-8 without NUL."""
        start = self.offset
        nbytes = self.u64()
        if nbytes > max_bytes:
            self.fail(f"a name of {nbytes} bytes, expected at most {max_bytes}", start)
        raw = self.take(nbytes)
        if b"\0" in raw:
            self.fail(f"the name {shorten(raw)} contains a NUL", start)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"the name {shorten(raw)} is not UTF-8: {error.reason}", start)
        self.hold(sys.getsizeof(text))
        return text

    def string(self) -> str:
        nbytes = self.u64()
        raw = self.take(nbytes)
        if nbytes > _HEADER_CHUNK:
            # CPython widens the whole string at the first wide character: raw and 1 + 2 bytes per byte, and
            # four more if a four-byte sequence (it starts with 0xF0 or above) makes it widen again.
            widest = np.frombuffer(raw, np.uint8).max()
            self.hold(0, transient=(7 if widest >= 0xF0 else 4) * nbytes)
        text = raw.decode("utf-8", "surrogateescape")
        self.hold(sys.getsizeof(text) + 16)
        return text
