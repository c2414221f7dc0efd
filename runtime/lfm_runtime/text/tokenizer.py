"""Byte-level BPE: text ↔ ids as `tokenizers` gives them, from the compiled form in prompt.json.

Own code, because the `tokenizers` wheel brings an HTTP stack to the device. It knows one family: byte-level BPE behind
regular-expression splits (GPT-2, Llama 3, LFM2). Anything else is refused when the prompt is compiled, by name.
"""

from __future__ import annotations

import bisect
import codecs
import heapq
import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_CACHE_WORDS = 1 << 15
_BITS = 24  # of an id, where two are one number

# Stand-ins: a pattern sees one character of a class instead of its thousands. Private-use characters have no case, so
# that a part of a pattern that ignores case leaves them alone.
_OTHER = "\ue000"
_STAND_IN = {name: chr(0xE001 + i) for i, name in enumerate(("L", "N", "s", "Lu", "Ll", "Lt", "Lm", "Lo", "M"))}
_KEPT = "ſ\u212a"  # letters that match an ASCII letter when case is ignored: they stay themselves
_ASCII = {"L": f"A-Za-z{_KEPT}", "Lu": "A-Z\u212a", "Ll": "a-zſ", "N": "0-9", "s": "\\t-\\r "}
LETTER_KINDS = ("Lu", "Ll", "Lt", "Lm", "Lo")
CLASSES = tuple(_STAND_IN)
"""The Unicode classes that split patterns may name: letters, their kinds, marks, numbers; s is white space."""


def class_members(name: str) -> str:
    """What a class becomes inside the brackets of a compiled split pattern."""
    kinds = "".join(_STAND_IN[kind] for kind in LETTER_KINDS) if name == "L" else ""
    return _ASCII.get(name, "") + _STAND_IN[name] + kinds


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    extra = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(extra)) for b in range(256)]


class CharacterClasses(dict[int, str]):
    """str.translate table: non-ASCII characters → their class's stand-in, found in sorted code point ranges when first
    met.
    """

    def __init__(self, ranges: Mapping[str, Sequence[int]]) -> None:
        """`ranges`: for each class, start, end (inclusive), start, end …; no character is in two."""
        super().__init__((code, chr(code)) for code in [*range(128), *map(ord, _KEPT)])
        self.ranges = tuple((flat, _STAND_IN[name]) for name, flat in ranges.items())

    def __missing__(self, code: int) -> str:
        found = next((stand_in for flat, stand_in in self.ranges if _in_ranges(flat, code)), _OTHER)
        self[code] = found
        return found


def _in_ranges(flat: Sequence[int], code: int) -> bool:
    at = bisect.bisect_right(flat, code)
    return at % 2 == 1 or (at > 0 and flat[at - 1] == code)


@dataclass(frozen=True)
class Vocabulary:
    """The compiled tokenizer, as prompt.json stores it."""

    tokens: list[str | None]  # by id: byte-level spelling, or the content of an added token; None where no id is used
    merges: array[int]  # unsigned, flat: left id, right id, merged id; in order of rank
    ignore_merges: bool  # a whole piece that is a token is that token
    splits: list[str]  # patterns, applied in order; each match is a piece
    added: list[list[str]]  # added tokens' contents; all of the first list are cut out before any of the second
    special: list[int]  # ids left out of decoded text
    classes: dict[
        str, list[int]
    ]  # Unicode class → flat inclusive ranges beyond ASCII, of those that the patterns tell apart


class Tokenizer:
    """Encode and decode with a compiled vocabulary. Thread-compatible: only its word cache changes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.special = frozenset(vocabulary.special)
        self.id_of: dict[str, int] = dict(zip(vocabulary.tokens, range(len(vocabulary.tokens)), strict=True))  # type: ignore[arg-type]
        self.id_of.pop(None, None)  # type: ignore[call-overload]
        without_id = [c for contents in vocabulary.added for c in contents if c not in self.id_of]
        if without_id:
            raise ValueError(f"the added token {without_id[0]!r} has no id")
        self._alphabet = byte_alphabet()
        self._byte_ids = [self.id_of[c] for c in self._alphabet]
        # (left id, right id) → (rank, merged id), each pair as one whole number: a fifth of the time that tuples take.
        left, right, merged = np.array(vocabulary.merges, np.int64).reshape(-1, 3).T
        ranked = np.arange(len(merged), dtype=np.int64) << _BITS | merged
        self._merges = dict(zip((left << _BITS | right).tolist(), ranked.tolist(), strict=True))
        self._special_tokens = {c for i in vocabulary.special if (c := vocabulary.tokens[i])}
        self._added_as_text = [[c for c in found if c not in self._special_tokens] for found in vocabulary.added]
        self._splits = [re.compile(pattern) for pattern in vocabulary.splits]
        self._classes = CharacterClasses(vocabulary.classes)
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str, *, special: bool = True, guard: str = "") -> list[int]:
        """Ids of `text`; added tokens in it are recognised; nothing is put in front or behind.

        Args:
            text: any string.
            special: False takes special tokens as text, as `tokenizers` does with encode_special_tokens.
            guard: a character that keeps special tokens from being recognised where it stands in them (see `guarded`),
                and is left out.
        """
        if guard:  # it holds for special tokens alone: other added tokens are words, and found in the text without it
            found = [
                [self.id_of[piece]] if is_token else self.encode(piece.replace(guard, ""), special=False)
                for piece, is_token in _cut_added(text, [self._special_tokens])
            ]
            return [i for ids in found for i in ids]
        ids: list[int] = []
        for piece, is_token in _cut_added(text, self.vocabulary.added if special else self._added_as_text):
            if is_token:
                ids.append(self.id_of[piece])
            else:
                for word in self._split(piece):
                    ids += self._word(word)
        return ids

    def guarded(self, text: str, guard: str) -> str:
        """`text` with the character `guard` in whatever is, or with text behind it could become, a special token."""
        return self._special_starts.sub(lambda found: found[0] + guard, text)

    @cached_property
    def _special_starts(self) -> re.Pattern[str]:
        """Finds the first character of every special token, overlapping ones too, and of beginnings of them at the end
        of a text.
        """
        contents = self._special_tokens
        beginnings = {content[:n] for content in contents for n in range(1, len(content))}
        pattern = rf"(?=(?:{_alternatives(contents)})|(?:{_alternatives(beginnings)})\Z)." if contents else "(?!)"
        return re.compile(pattern, re.DOTALL)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids if not (skip_special and i in self.special)).decode(
            "utf-8", "replace"
        )

    def token_bytes(self, token: int) -> bytes:
        """The bytes one id stands for; empty for an id the vocabulary does not use."""
        text = self.vocabulary.tokens[token] if 0 <= token < len(self.vocabulary.tokens) else None
        if text is None:
            return b""
        if text in self._added_contents:
            return text.encode()
        decode = self._byte_of
        return bytes(decode[c] for c in text) if all(c in decode for c in text) else text.encode()

    @cached_property
    def _added_contents(self) -> frozenset[str]:
        return frozenset(c for contents in self.vocabulary.added for c in contents)

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        return {c: b for b, c in enumerate(self._alphabet)}

    def _split(self, text: str) -> Iterator[str]:
        pieces = [(text, text if text.isascii() else text.translate(self._classes))]
        for pattern in self._splits:
            pieces = [piece for whole, classes in pieces for piece in _isolate(pattern, whole, classes)]
        return (text for text, _ in pieces)

    def _word(self, word: str) -> list[int]:
        found = self._words.get(word)
        if found is None:
            if len(self._words) >= _CACHE_WORDS:
                self._words.clear()
            found = self._words[word] = self._merge(word)
        return found

    def _merge(self, word: str) -> list[int]:
        """Byte-pair merges, lowest rank first, leftmost first among equals; a heap keeps long pieces at n log n."""
        data = word.encode("utf-8", "surrogatepass")
        ids = [self._byte_ids[b] for b in data]
        if self.vocabulary.ignore_merges:
            whole = self.id_of.get("".join(self._alphabet[b] for b in data))
            if whole is not None and whole not in self.special:
                return [whole]
        merges, n = self._merges, len(ids)
        after = list(range(1, n + 1))
        before = list(range(-1, n - 1))
        # An entry is (rank, left position, merged id, left id, right id); it is stale once either id has changed.
        queue: list[tuple[int, int, int, int, int]] = []
        for i in range(n - 1):
            if (pair := ids[i] << _BITS | ids[i + 1]) in merges:
                rank, merged = divmod(merges[pair], 1 << _BITS)
                queue.append((rank, i, merged, ids[i], ids[i + 1]))
        heapq.heapify(queue)
        while queue:
            _, i, merged, left, right = heapq.heappop(queue)
            j = after[i] if ids[i] == left else n
            if j >= n or ids[j] != right:
                continue
            ids[i], ids[j] = merged, -1
            after[i] = after[j]
            if after[i] < n:
                before[after[i]] = i
            for a, b in ((before[i], i), (i, after[i])):
                if a >= 0 and b < n and (pair := ids[a] << _BITS | ids[b]) in merges:
                    rank, new = divmod(merges[pair], 1 << _BITS)
                    heapq.heappush(queue, (rank, a, new, ids[a], ids[b]))
        return [i for i in ids if i >= 0]


def _alternatives(contents: Iterable[str]) -> str:
    """A pattern for any of these strings, the longest that matches."""
    return "|".join(re.escape(c) for c in sorted(contents, key=len, reverse=True))


def _cut_added(text: str, stages: Sequence[Collection[str]]) -> Iterator[tuple[str, bool]]:
    """Pieces of `text` in order, with whether each is an added token; those of the first stage are cut out before the
    second's.
    """
    if not stages:
        if text:
            yield text, False
        return
    # A pattern of those that occur: one of all 500 takes 10 ms to compile, more than a question takes to encode.
    here = [content for content in stages[0] if content in text]
    at = 0
    for match in re.finditer(_alternatives(here), text) if here else ():
        yield from _cut_added(text[at : match.start()], stages[1:])
        yield match[0], True
        at = match.end()
    yield from _cut_added(text[at:], stages[1:])


def _isolate(pattern: re.Pattern[str], text: str, classes: str) -> Iterator[tuple[str, str]]:
    """Cut at every match, empty ones too; matches and what lies between them are pieces. `classes` is `text` with
    stand-ins, as long.
    """
    at = 0
    for match in pattern.finditer(classes):
        start, end = match.span()
        if at < start:
            yield text[at:start], classes[at:start]
        if start < end:
            yield text[start:end], classes[start:end]
        at = end
    if at < len(text):
        yield text[at:], classes[at:]


class TextStream:
    """Ids in, text out, piece by piece; a character whose bytes are still incomplete waits for the next id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that `token` completes; "" while a character is incomplete, and for special tokens."""
        if token in self.tokenizer.special:
            return ""
        return self._decoder.decode(self.tokenizer.token_bytes(token))

    def finish(self) -> str:
        """Return the text held back; an incomplete character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)
