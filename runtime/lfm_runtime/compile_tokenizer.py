"""tokenizer.json → Vocabulary. Used by export, which then checks the result against `tokenizers`, and by the runtime for
folders that come without a prompt.json. Everything the compiled form cannot express is a PromptError that names it.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from lfm_runtime.errors import PromptError
from lfm_runtime.tokenizer import CLASSES, Vocabulary, byte_alphabet

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CharacterRanges = Callable[[], tuple[list[int], list[int], list[int]]]


def compile_tokenizer(spec: Mapping[str, Any], ranges: CharacterRanges) -> Vocabulary:
    """`spec` is the parsed tokenizer.json; `ranges` gives letters, numbers and spaces as flat inclusive ranges.

    Raises:
        PromptError: naming the part that is not byte-level BPE as we know it.
    """
    model = spec.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise _cannot(f"model type {model.get('type')!r}", "byte-level BPE")
    for key, neutral in (("dropout", None), ("unk_token", None), ("continuing_subword_prefix", None),
                         ("end_of_word_suffix", None), ("byte_fallback", False)):  # fmt: skip
        if model.get(key) not in (neutral, None, "", False):
            raise _cannot(f"model.{key} {model[key]!r}", "none")
    if spec.get("normalizer") is not None:
        raise _cannot(f"normalizer {_type(spec['normalizer'])}", "none")
    if _type(spec.get("decoder")) != "ByteLevel":
        raise _cannot(f"decoder {_type(spec.get('decoder'))}", "ByteLevel")

    vocab: dict[str, int] = model["vocab"]
    added = spec.get("added_tokens") or []
    size = 1 + max([*vocab.values(), *(t["id"] for t in added)], default=-1)
    tokens: list[str | None] = [None] * size
    for token, i in vocab.items():
        tokens[i] = token
    for entry in added:
        for flag in ("lstrip", "rstrip", "single_word"):
            if entry.get(flag):
                raise _cannot(f"added token {entry['content']!r} with {flag}", "none")
        tokens[entry["id"]] = entry["content"]
    if missing := [c for c in byte_alphabet() if c not in vocab]:
        raise _cannot(f"a vocabulary without {len(missing)} of the 256 bytes ({missing[0]!r} …)", "all of them")
    letters, numbers, spaces = ranges()
    return Vocabulary(
        tokens=tokens,
        merges=_merges(model["merges"], vocab),
        ignore_merges=bool(model.get("ignore_merges", False)),
        splits=_splits(spec.get("pre_tokenizer")),
        added=[[t["content"] for t in added if not t.get("normalized")], [t["content"] for t in added if t.get("normalized")]],
        special=sorted(t["id"] for t in added if t.get("special")),
        letters=letters,
        numbers=numbers,
        spaces=spaces,
    )


def _merges(merges: list[Any], vocab: Mapping[str, int]) -> list[int]:
    flat: list[int] = []
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        try:
            flat += (vocab[left], vocab[right], vocab[left + right])
        except KeyError as e:
            raise PromptError(f"tokenizer.json: merge {left!r} + {right!r} is not in the vocabulary ({e})") from e
    return flat


def _splits(pre: Mapping[str, Any] | None) -> list[str]:
    steps = [pre] if pre else []
    if _type(pre) == "Sequence" and pre:
        steps = pre["pretokenizers"]
    patterns: list[str] = []
    byte_level = False
    for step in steps:
        kind = _type(step)
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step["pattern"]
            patterns.append(translate_pattern(pattern["Regex"]) if "Regex" in pattern else re.escape(pattern["String"]))
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(translate_pattern(r"\p{N}"))
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            byte_level = True
            if step.get("use_regex", True):
                patterns.append(translate_pattern(GPT2_SPLIT))
        else:
            raise _cannot(f"pre_tokenizer {kind} {({k: v for k, v in step.items() if k != 'type'})}", "Split, Digits, ByteLevel")
    if not byte_level:
        raise _cannot("a pre_tokenizer without ByteLevel", "byte-level BPE")
    return patterns


def translate_pattern(pattern: str) -> str:
    """An Oniguruma pattern over Unicode classes → the same for `re` over stand-in characters."""
    out: list[str] = []
    inside = False
    at = 0
    while at < len(pattern):
        rest = pattern[at:]
        if match := re.match(r"\\p\{(\w+)\}|\\([sS])", rest):
            name = match[1] or match[2]
            if name not in CLASSES and not (name == "S" and not inside):
                raise _cannot(f"{match[0]} in the pre_tokenizer's pattern", r"\p{L}, \p{N}, \s, \S")
            if name == "S":
                out.append(f"[^{CLASSES['s']}]")
            else:
                out.append(CLASSES[name] if inside else f"[{CLASSES[name]}]")
            at += match.end()
        elif rest[0] == "\\":
            if len(rest) > 1 and rest[1].isalnum() and rest[1] not in "rnt":
                raise _cannot(f"{rest[:2]} in the pre_tokenizer's pattern", r"\p{L}, \p{N}, \s, \S, \r, \n, \t")
            out.append(rest[:2])
            at += 2
        else:
            # Oniguruma reads these otherwise than `re` does, or `re` of Python 3.10 does not read them at all.
            if (not inside and (rest[0] in "^$" or rest.startswith("(?>"))) or (inside and (rest[0] == "[" or rest.startswith("&&"))):
                raise _cannot(f"{rest[:3]!r} in the pre_tokenizer's pattern", "plain groups and character classes without anchors")
            inside = (inside or rest[0] == "[") and not (inside and rest[0] == "]")
            if not rest[0].isascii():
                raise _cannot(f"the character {rest[0]!r} in the pre_tokenizer's pattern", "ASCII")
            if re.match(r"[*+?}]\+", rest):
                raise _cannot("a possessive quantifier in the pre_tokenizer's pattern", "greedy ones")
            out.append(rest[0])
            at += 1
    try:
        re.compile("".join(out))
    except re.error as e:
        raise _cannot(f"the pre_tokenizer's pattern ({e})", "what Python's re can run") from e
    return "".join(out)


def unicode_ranges() -> tuple[list[int], list[int], list[int]]:
    """Letters, numbers and spaces by Python's own Unicode tables: near enough without `tokenizers` at hand."""
    letters: list[int] = []
    numbers: list[int] = []
    spaces: list[int] = []
    for code in range(128, sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category[0] in "LN":
            _extend(letters if category[0] == "L" else numbers, code)
        elif category[0] == "Z" or code == 0x85:
            _extend(spaces, code)
    return letters, numbers, spaces


def _extend(flat: list[int], code: int) -> None:
    if flat and flat[-1] == code - 1:
        flat[-1] = code
    else:
        flat += (code, code)


def _type(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


def _cannot(what: str, known: str) -> PromptError:
    return PromptError(f"tokenizer.json: {what} cannot be compiled for the runtime; it knows {known}")
