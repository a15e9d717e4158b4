"""The SentencePiece tokenizer that a GGUF file describes, rebuilt from its tokens, scores and types.

The rules are those of llama.cpp for `tokenizer.ggml.model = "llama"`, which the file was written for:

1. Special tokens are cut out of the text, longer ones first. User-defined tokens (runs of newlines and
   spaces, HTML tags) always count as special; control tokens only with `parse_special`.
2. In what is left, spaces become U+2581 and single characters are merged pairwise: always the adjacent
   pair whose union is the token of the highest score, the leftmost of equals, until no pair is a token.
3. A character that is no token becomes its UTF-8 bytes, as tokens `<0x00>` to `<0xFF>`.
"""

import codecs
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_SPACE = "\u2581"
# The values of llama.cpp's token types, as `tokenizer.ggml.token_type` stores them.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_UNKNOWN_TEXT = "\u2585".encode()


def _encode(text: str) -> bytes:
    """UTF-8, where a byte that was none stands as a lone surrogate (of `sys.argv`, or of a token)."""
    return text.encode("utf-8", "surrogateescape")


class Tokenizer:
    """Encodes text to token ids and back.

    Args:
      tokens: text of each token, by id.
      scores: merge priority of each token, higher first.
      token_types: llama.cpp token type of each token (1 normal, 2 unknown, 3 control, 4 user-defined,
        5 unused, 6 byte).
      bos_id, eos_id: ids that begin and end a text; None where the model has none.
      add_bos, add_eos: whether `encode` adds them, as `begin_ids` and `end_ids`.
      add_space_prefix: whether a space is put before the text and after each special token.

    Raises:
      ValueError: the three sequences differ in length, or a byte has neither a byte token nor a token
        of its own.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        scores: Sequence[float],
        token_types: Sequence[int],
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        add_bos: bool = True,
        add_eos: bool = False,
        add_space_prefix: bool = True,
    ):
        if not len(tokens) == len(scores) == len(token_types):
            raise ValueError(
                "tokens, scores and token_types must have one entry per token, got "
                f"{len(tokens)}, {len(scores)} and {len(token_types)}"
            )
        self.tokens, self.scores, self.token_types = list(tokens), list(scores), list(token_types)
        self.ids = {text: i for i, text in enumerate(self.tokens)}
        self.eos_id = eos_id
        self.begin_ids = [bos_id] if add_bos and bos_id is not None else []
        self.end_ids = [eos_id] if add_eos and eos_id is not None else []
        self.add_space_prefix = add_space_prefix
        self._byte_ids = [self._byte_id(b) for b in range(256)]
        self._bytes = {i: bytes([b]) for b, i in enumerate(self._byte_ids) if self.token_types[i] == _BYTE}
        special = [i for i, t in enumerate(self.token_types) if t in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
        self._special = sorted((i for i in special if self.tokens[i]), key=self._utf8_length, reverse=True)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Builds the tokenizer from GGUF metadata.

        Raises:
          ValueError: a key is missing, or the tokenizer is not of the SentencePiece kind.
        """
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "llama":
            raise ValueError(f"tokenizer.ggml.model must be 'llama' (SentencePiece), got {kind!r}")

        def required(name: str) -> list:
            key = f"tokenizer.ggml.{name}"
            if key not in metadata:
                raise ValueError(f"the GGUF metadata has no {key}")
            return list(metadata[key])

        def flag(name: str, default: bool) -> bool:
            return bool(metadata.get(f"tokenizer.ggml.{name}", default))

        return cls(
            required("tokens"),
            [float(s) for s in required("scores")],
            [int(t) for t in required("token_type")],
            # The defaults are llama.cpp's for this tokenizer.
            bos_id=int(metadata.get("tokenizer.ggml.bos_token_id", 1)),
            eos_id=int(metadata.get("tokenizer.ggml.eos_token_id", 2)),
            add_bos=flag("add_bos_token", True),
            add_eos=flag("add_eos_token", False),
            add_space_prefix=flag("add_space_prefix", True),
        )

    def _byte_id(self, byte: int) -> int:
        for text in (f"<0x{byte:02X}>", chr(byte)):
            if text in self.ids:
                return self.ids[text]
        raise ValueError(f"tokens has no <0x{byte:02X}>, which a character outside the vocabulary needs")

    def _utf8_length(self, i: int) -> int:
        return len(_encode(self.tokens[i]))

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Returns the ids of a text.

        Args:
          text: any text; bytes that were not UTF-8, as Python keeps them in `sys.argv`
            (surrogateescape), become byte tokens.
          add_special: add the begin and end tokens that the model asks for.
          parse_special: read control tokens such as `<end_of_turn>` where the text spells them.
            Without it a user's text cannot forge them.

        Raises:
          UnicodeEncodeError: the text holds a lone surrogate that stands for no byte.
        """
        ids = [*self.begin_ids] if add_special else []
        after_special = True
        for part in self._split_special(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
            else:
                prefix = _SPACE if self.add_space_prefix and after_special else ""
                ids.extend(self._merge(prefix + part.replace(" ", _SPACE)))
                after_special = False
        return ids + self.end_ids if add_special else ids

    def _split_special(self, text: str, parse_special: bool) -> Iterator[str | int]:
        """Yields stretches of plain text and ids of special tokens, in order."""
        found: list[tuple[int, int]] = []  # (start, id)
        end_of = [0] * len(text)  # for a character inside a special token, where that token ends
        for i in self._special:
            if self.token_types[i] != _USER_DEFINED and not parse_special:
                continue
            special = self.tokens[i]
            start = text.find(special)
            while start >= 0:
                stop = start + len(special)
                # Tokens come longest first, so one that is already there covers an end of this one.
                taken = end_of[start] or end_of[stop - 1]
                if not taken:
                    found.append((start, i))
                    end_of[start:stop] = [stop] * (stop - start)
                start = text.find(special, taken or stop)
        position = 0
        for start, i in sorted(found):
            if start > position:
                yield text[position:start]
            yield i
            position = start + len(self.tokens[i])
        if position < len(text):
            yield text[position:]

    def _merge(self, text: str) -> Iterator[int]:
        """Yields the ids of plain text: pairwise merges by score, then bytes for what is no token."""
        n = len(text)
        stop = list(range(1, n + 1))  # stop[s]: end of the symbol that starts at s; 0 once merged away
        previous = list(range(-1, n - 1))
        ids, scores = self.ids, self.scores
        heap: list[tuple[float, int, int, int]] = []

        def propose(left: int, right: int) -> None:
            i = ids.get(text[left : stop[right]])
            if i is not None:
                heapq.heappush(heap, (-scores[i], left, right, stop[right]))

        for right in range(1, n):
            propose(right - 1, right)
        while heap:
            _, left, right, end = heapq.heappop(heap)
            if stop[left] != right or stop[right] != end:
                continue  # one of the two has been merged with another symbol since
            stop[left], stop[right] = end, 0
            if left > 0:
                propose(previous[left], left)
            if end < n:
                previous[end] = left
                propose(left, end)

        start = 0
        while start < n:
            symbol = text[start : stop[start]]
            i = ids.get(symbol)
            if i is not None:
                yield i
            else:
                yield from (self._byte_ids[b] for b in _encode(symbol))
            start = stop[start]

    def token_bytes(self, i: int) -> bytes:
        """Returns the UTF-8 bytes that a token adds to a text; none for a control token."""
        kind = self.token_types[i]
        if kind == _CONTROL:
            return b""
        if kind == _UNKNOWN:
            return _UNKNOWN_TEXT
        if i in self._bytes:
            return self._bytes[i]
        text = self.tokens[i]
        return _encode(text if kind == _USER_DEFINED else text.replace(_SPACE, " "))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; bytes that are no UTF-8 become U+FFFD, control tokens nothing."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", "replace")


class StreamDecoder:
    """Turns ids into text as they come, holding back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that these ids complete."""
        return self._decoder.decode(b"".join(self._tokenizer.token_bytes(int(i)) for i in ids))

    def finish(self) -> str:
        """Returns what was held back, as U+FFFD where it never became a character."""
        return self._decoder.decode(b"", final=True)
