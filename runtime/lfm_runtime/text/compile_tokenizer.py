"""tokenizer.json → Vocabulary. Used by export, which then checks the result against `tokenizers`, and by the runtime
for folders that come without a prompt.json. Everything the compiled form cannot express is a PromptError that names it.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lfm_runtime.errors import PromptError
from lfm_runtime.text.tokenizer import CLASSES, LETTER_KINDS, Vocabulary, byte_alphabet, class_members

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_MOST_TOKENS = 1 << 22

CharacterRanges = Callable[[Sequence[str]], dict[str, list[int]]]
"""Names of `tokenizer.CLASSES` → flat inclusive ranges of each beyond ASCII: start, end, start, end …"""


def compile_tokenizer(spec: Mapping[str, Any], ranges: CharacterRanges) -> Vocabulary:
    """`spec` is the parsed tokenizer.json; `ranges` gives the members of Unicode classes.

    Raises:
        PromptError: naming the part that is not byte-level BPE as we know it.
    """
    model = spec.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise _cannot(f"model type {model.get('type')!r}", "byte-level BPE")
    for key, neutral in (
        ("dropout", None),
        ("unk_token", None),
        ("continuing_subword_prefix", None),
        ("end_of_word_suffix", None),
        ("byte_fallback", False),
    ):
        if model.get(key) not in (neutral, None, "", False):
            raise _cannot(f"model.{key} {model[key]!r}", "none")
    if spec.get("normalizer") is not None:
        raise _cannot(f"normalizer {_type(spec['normalizer']) or repr(spec['normalizer'])[:40]}", "no normalizer")
    decoders = list(_flat(spec.get("decoder"), "decoders"))
    if [_type(step) for step in decoders if _type(step) != "Fuse"] != ["ByteLevel"]:
        raise _cannot(f"decoder {' + '.join(str(_type(step)) for step in decoders)}", "ByteLevel")

    vocab: dict[str, int] = model["vocab"]
    added = spec.get("added_tokens") or []
    ids = [*vocab.values(), *(t["id"] for t in added)]
    if not all(type(i) is int and 0 <= i < _MOST_TOKENS for i in ids):
        raise _cannot("a token id that is not a number below 4,194,304", "ids from 0 to 4,194,303")
    tokens: list[str | None] = [None] * (1 + max(ids, default=-1))
    for token, i in vocab.items():
        tokens[i] = token
    for entry in added:
        for flag in ("lstrip", "rstrip", "single_word"):
            if entry.get(flag):
                raise _cannot(f"added token {entry['content']!r} with {flag}", "none")
        if tokens[entry["id"]] not in (None, entry["content"]):
            raise _cannot(
                f"id {entry['id']} for {tokens[entry['id']]!r} and for added token {entry['content']!r}",
                "one token per id",
            )
        tokens[entry["id"]] = entry["content"]
    if missing := [c for c in byte_alphabet() if c not in vocab]:
        what = f"a vocabulary without {len(missing)} of the 256 bytes ({missing[0]!r} …)"
        raise _cannot(what, "vocabularies with all 256")
    splits, named = _splits(spec.get("pre_tokenizer"))
    kinds = LETTER_KINDS if named & {*LETTER_KINDS} else ("L",)
    told_apart = [*kinds, "N", "s", *(["M"] if "M" in named else [])]
    return Vocabulary(
        tokens=tokens,
        merges=_merges(model["merges"], vocab),
        ignore_merges=bool(model.get("ignore_merges", False)),
        splits=splits,
        added=[
            [t["content"] for t in added if not t.get("normalized")],
            [t["content"] for t in added if t.get("normalized")],
        ],
        special=sorted(t["id"] for t in added if t.get("special")),
        classes=ranges(told_apart),
    )


def _merges(merges: list[Any], vocab: Mapping[str, int]) -> array[int]:
    flat: list[int] = []
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        try:
            flat += (vocab[left], vocab[right], vocab[left + right])
        except KeyError as e:
            raise PromptError(f"tokenizer.json: merge {left!r} + {right!r} is not in the vocabulary ({e})") from e
    return array("I", flat)


def _flat(step: Any, inside: str) -> Iterator[Any]:
    """The steps of a Sequence, nested or not; a step alone is one."""
    if _type(step) == "Sequence":
        for part in step[inside]:
            yield from _flat(part, inside)
    elif step is not None:
        yield step


def _splits(pre: Mapping[str, Any] | None) -> tuple[list[str], set[str]]:
    """(patterns for `re` over stand-ins, names of the Unicode classes they tell apart)."""
    patterns: list[str] = []
    for step in _flat(pre, "pretokenizers"):
        kind = _type(step)
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step["pattern"]
            patterns.append(pattern["Regex"] if "Regex" in pattern else _escaped(pattern["String"]))
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                patterns.append(GPT2_SPLIT)
        else:
            raise _cannot(
                f"pre_tokenizer {kind} { ({k: v for k, v in step.items() if k != 'type'}) }", "Split, Digits, ByteLevel"
            )
    translated = [translate_pattern(pattern) for pattern in patterns]
    if not any(_type(step) == "ByteLevel" for step in _flat(pre, "pretokenizers")):
        raise _cannot("a pre_tokenizer without ByteLevel", "byte-level BPE")
    return translated, {name for p in patterns for name in re.findall(r"\\[pP]\{\^?(\w+)\}", p)}


def _escaped(text: str) -> str:
    if not text.isascii():
        raise _cannot(f"the pre_tokenizer's string {text!r}", "ASCII")
    return re.escape(text)


_PIECE = re.compile(
    r"(?P<set>\[\^?(?:\\p\{\w+\}|\\[rntsS]|\\\W|[^\[\]\\])+\])"
    r"|(?P<name>\\[pP]\{\^?\w+\}|\\[sS])"
    r"|(?P<escape>\\[rnt]|\\[^\w\s])"
    r"|(?P<open>\(\?(?:[:=!>]|<[=!]|i:)|\((?!\?))"
    r"|(?P<close>\))"
    r"|(?P<quantifier>[*+?][?+]?|\{\d*,\d+\}[?+]?|\{\d+,\}[?+]?|\{\d+\}\+?)"
    r"|(?P<or>\|)"
    r"|(?P<end>\$)"
    r"|(?P<plain>[ -~](?<![\\\[\](){}^.*+?|$]))"
)
_KNOWN = r"\p{L}, \p{N}, \p{M} and kinds of letters, \s, groups and sets without anchors"


def translate_pattern(pattern: str) -> str:
    """An Oniguruma pattern over Unicode classes → the same for `re` over stand-in characters.

    Possessive quantifiers and atomic groups, which `re` has from Python 3.11 on, become a look-ahead and a reference to
    what it took.
    """
    levels: list[tuple[str, list[str]]] = [("", [])]  # of open groups: how it opens, and its atoms so far
    kind: str | None = None
    atomics = at = 0
    while at < len(pattern):
        piece = _PIECE.match(pattern, at)
        if piece is None:
            raise _cannot(f"{pattern[at : at + 3]!r} in the pre_tokenizer's pattern", _KNOWN)
        before, kind, text, atoms = kind, piece.lastgroup, piece[0], levels[-1][1]
        at = piece.end()
        atomic = False
        if kind == "open":
            levels.append((text, []))
            continue
        if kind == "close" and len(levels) > 1:
            opening, inner = levels.pop()
            atoms, atomic = levels[-1][1], opening == "(?>"
            atoms.append(f"{'(?:' if atomic or opening == '(' else opening}{''.join(inner)})")
        elif kind == "quantifier" and atoms and atoms[-1] != "|" and before != "quantifier":
            atoms[-1], atomic = _repeated(atoms[-1], text)
        elif kind == "end":
            # The end of every line, to Oniguruma; behind what took all white space, the end of the text.
            if not pattern[: at - 1].endswith(r"\s++"):
                raise _cannot("'$' in the pre_tokenizer's pattern", r"only \s++$")
            atoms.append(r"\Z")
        elif (
            kind in ("name", "set")
            and any(level[0] == "(?i:" for level in levels)
            and re.search(r"\\[pP]\{\^?L[ult]\}", text)
        ):
            raise _cannot(f"{text} where case is ignored, in the pre_tokenizer's pattern", _KNOWN)
        elif kind in ("name", "set"):
            atoms.append(_characters(text))
        elif kind in ("escape", "plain", "or"):
            atoms.append(text)
        else:
            raise _cannot(f"{text!r} in the pre_tokenizer's pattern", _KNOWN)
        if atomic:
            atomics += 1
            atoms[-1] = f"(?:(?=(?P<atomic{atomics}>{atoms[-1]}))(?P=atomic{atomics}))"
    found = "".join(levels[0][1])
    try:
        re.compile(found)
    except (re.error, OverflowError, RecursionError) as e:
        raise _cannot(f"the pre_tokenizer's pattern ({e})", "what Python's re can run") from e
    if len(levels) > 1:
        raise _cannot("a group that is not closed in the pre_tokenizer's pattern", _KNOWN)
    return found


def _repeated(atom: str, quantifier: str) -> tuple[str, bool]:
    """(the atom repeated, whether it gives nothing back). An interval's + is no part of it: Oniguruma repeats the whole
    once more.
    """
    if quantifier.endswith("}+"):
        return f"(?:{atom}{quantifier[:-1]})+", False
    atomic = len(quantifier) == 2 and quantifier[-1] == "+"
    return atom + quantifier.removesuffix("+" if atomic else ""), atomic


def _characters(text: str) -> str:
    r"""A set, or a class outside of one, with stand-ins: [^\s\p{L}] …, \p{Lu}, \P{N}, \s, \S."""
    inside = text[0] == "["

    def members(found: re.Match[str]) -> str:
        name = found[3] or "s"
        negated = (found[1] == "P") != bool(found[2]) or found[4] == "S"
        if name not in CLASSES or (negated and inside):
            raise _cannot(f"{found[0]} in the pre_tokenizer's pattern", _KNOWN)
        return class_members(name) if inside else f"[{'^' * negated}{class_members(name)}]"

    if inside and ("&&" in text or not text.isascii()):
        raise _cannot(f"{text!r} in the pre_tokenizer's pattern", _KNOWN)
    return re.sub(r"\\([pP])\{(\^?)(\w+)\}|\\([sS])", members, text)


def unicode_ranges(names: Sequence[str]) -> dict[str, list[int]]:
    """Members of Unicode classes by Python's own tables: near enough without `tokenizers` at hand."""
    found: dict[str, list[int]] = {name: [] for name in names}
    for code in range(128, sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        name = "s" if category[0] == "Z" or code == 0x85 else category if category in found else category[0]
        if name in found:
            _extend(found[name], code)
    return found


def _extend(flat: list[int], code: int) -> None:
    if flat and flat[-1] == code - 1:
        flat[-1] = code
    else:
        flat += (code, code)


def _type(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


def _cannot(what: str, known: str) -> PromptError:
    return PromptError(f"tokenizer.json: {what} cannot be compiled for the runtime; supported: {known}")
