"""What the user hands in: images, prompts, recipes, settings. Good input is read as meant; bad input is said in one
line.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lfm_package.estimate import count_images
from lfm_quantize.calibrate.samples import BUILT_IN, named, read_questions, split_off
from lfm_quantize.graph import QuantizeError
from lfm_quantize.recipe import BLOCKS, Recipe, Rule
from lfm_quantize.rounding import METHODS, Precision
from lfm_quantize.search import Choice, choose
from lfm_quantize.settings import Settings
from lfm_serve.captions.images import find

PHOTOS = Path(__file__).resolve().parents[2] / "demo" / "photos"


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    shutil.copy(PHOTOS / "coffee.jpg", folder / "a.jpg")
    shutil.copy(PHOTOS / "rocket.jpg", folder / "more" / "b.JPG")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_a_folder_of_images(images) -> None:
    questions, skipped = read_questions(images, None)
    assert [(q.image.name, q.text, q.answer) for q in questions] == [
        ("a.jpg", BUILT_IN[0], None),
        ("b.JPG", BUILT_IN[2], None),
    ]
    assert [path.name for path in skipped] == ["broken.png"]  # broken.png; notes.txt is not taken for an image


def test_hidden_images_are_not_taken_and_broken_links_are_told(images) -> None:
    """As `caption` does."""
    (images / ".thumbs").mkdir()
    shutil.copy(images / "a.jpg", images / ".thumbs" / "t.jpg")
    shutil.copy(images / "a.jpg", images / "._a.jpg")
    (images / "gone.jpg").symlink_to(images / "nowhere")
    questions, skipped = read_questions(images, None)
    assert [q.image.name for q in questions] == ["a.jpg", "b.JPG"]
    assert [path.name for path in skipped] == ["broken.png", "gone.jpg"]
    assert "does not exist" in skipped[images / "gone.jpg"]
    assert count_images([images]) == 4
    said: list[str] = []
    assert [Path(path).name for path in find([str(images)], recursive=True, match=(), warn=said.append)] == [
        *("a.jpg", "broken.png", "gone.jpg", "b.JPG")
    ]


def test_why_images_are_left_out_is_told(tmp_path) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    with pytest.raises(
        QuantizeError, match=r"no usable image: a\.heic could not be opened \(HEIC .* the Python package pillow-heif"
    ):
        read_questions(tmp_path, None)
    (tmp_path / "b.png").write_bytes(b"no")
    shutil.copy(PHOTOS / "coffee.jpg", tmp_path / "c.jpg")
    assert named(read_questions(tmp_path, None)[1]).startswith("a.heic, b.png could not be opened (the first: HEIC")


def test_several_places(images) -> None:
    """As a shell gives them: photos/*.jpg; an image that is named twice is taken once."""
    one, other = images / "a.jpg", images / "more" / "b.JPG"
    assert [q.image for q in read_questions([one, other], None)[0]] == [one, other]
    assert [q.image for q in read_questions([other, images], None)[0]] == [other, one]


def test_prompts_one_a_line(images, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("What is it?\n\nWhere?\n")
    questions, _ = read_questions(images, tmp_path / "prompts.txt")
    assert [q.text for q in questions] == [
        "What is it?",
        "What is it?",
    ]  # dealt out in turn, the broken image's among them


def test_jsonl_and_lists(images, tmp_path) -> None:
    lines = [
        {"image": "a.jpg", "question": "What?", "answer": "coffee", "task": "name"},
        {"image": "more/b.JPG", "question": "And?"},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    questions, skipped = read_questions(images, tmp_path / "q.jsonl")
    assert [(q.image, q.answer, q.task) for q in questions] == [
        (images / "a.jpg", "coffee", "name"),
        (images / "more" / "b.JPG", None, "all"),
    ]
    assert not skipped
    (images / "list.txt").write_text("a.jpg\nmore/b.JPG\nmissing.png\n")
    questions, skipped = read_questions(images / "list.txt", None)
    assert [q.image.name for q in questions] == ["a.jpg", "b.JPG"]
    assert [path.name for path in skipped] == ["missing.png"]


BAD = {
    "no folder": (lambda d: read_questions(d / "nowhere", None), "does not exist"),
    "no images": (lambda d: read_questions(d, None), "has no usable image"),
    "only broken ones": (
        lambda d: ((d / "x.png").write_bytes(b"x"), read_questions(d, None)),
        "x.png could not be opened",
    ),
    "neither image nor list": (
        lambda d: ((d / "x.bin").write_bytes(bytes(range(256))), read_questions(d / "x.bin", None)),
        "x.bin has no usable image: x.bin could not be opened",
    ),
    "questions for paths": (
        lambda d: ((d / "p.jsonl").write_text('{"image": "x.png"}'), read_questions(d / "p.jsonl", None)),
        "p.jsonl holds questions, not paths; give it as --prompts",
    ),
    "questions for paths, by another name": (
        lambda d: ((d / "p").write_text('{"image": "x.png"}'), read_questions(d / "p", None)),
        "p holds questions, not paths; give it as --prompts",
    ),
    "JSON that is neither": (
        lambda d: ((d / "s.json").write_text('{"type": "object"}'), read_questions(d / "s.json", None)),
        "s.json holds JSON, not paths; name a folder of images",
    ),
    "empty prompts": (lambda d: ((d / "p").write_text(""), read_questions(PHOTOS, d / "p")), "is empty"),
    "binary prompts": (lambda d: read_questions(PHOTOS, PHOTOS / "coffee.jpg"), "cannot be read as text"),
    "a JSON array": (
        lambda d: ((d / "p.json").write_text('[{"image": "x.png"}]'), read_questions(PHOTOS, d / "p.json")),
        "is a JSON array; write one object a line",
    ),
    "a wrong path": (
        lambda d: (
            (d / "p.jsonl").write_text('{"image": "nowhere.png", "question": "What?"}'),
            read_questions(PHOTOS, d / "p.jsonl"),
        ),
        "p.jsonl, line 1: nowhere.png is not in",
    ),
    "missing prompts": (lambda d: read_questions(PHOTOS, d / "p"), "p is missing; check the path"),
    "broken JSONL": (
        lambda d: (
            (d / "p").write_text('{"image": "coffee.jpg", "question": "?"}\n{"image"'),
            read_questions(PHOTOS, d / "p"),
        ),
        "line 2",
    ),
    "JSONL without an end": (
        lambda d: ((d / "p.jsonl").write_text('{"image": ' + "[" * 50_000), read_questions(PHOTOS, d / "p.jsonl")),
        "line 1",
    ),
    "JSONL with a typing error": (
        lambda d: (
            (d / "p").write_text('{"image": "coffee.jpg", "question": "?", "anwser": "1"}'),
            read_questions(PHOTOS, d / "p"),
        ),
        "line 1: unknown key 'anwser'; did you mean 'answer'?",
    ),
    "paths in a .jsonl": (
        lambda d: ((d / "p.jsonl").write_text("coffee.jpg\n"), read_questions(PHOTOS, d / "p.jsonl")),
        'p.jsonl, line 1: no JSON object with "image" and "question"',
    ),
    "JSONL about no image": (
        lambda d: (
            (d / "x.txt").write_text("x"),
            (d / "p.jsonl").write_text('{"image": "x.txt", "question": "?"}'),
            read_questions(None, d / "p.jsonl"),
        ),
        "p.jsonl, line 1 has no usable image: x.txt could not be opened (",
    ),
    "JSONL without question": (
        lambda d: ((d / "p").write_text('{"image": "coffee.jpg"}'), read_questions(PHOTOS, d / "p")),
        "line 1",
    ),
    "an answer that is a list": (
        lambda d: (
            (d / "p").write_text('\n\n{"image": "coffee.jpg", "question": "?", "answer": ["blue"]}'),
            read_questions(PHOTOS, d / "p"),
        ),
        'line 3: answer is ["blue"], not a text in quotes',
    ),
    "a task that is a number": (
        lambda d: (
            (d / "p").write_text('{"image": "coffee.jpg", "question": "?", "task": 3}'),
            read_questions(PHOTOS, d / "p"),
        ),
        "line 1: task is 3, not a text",
    ),
    "JSONL with a list": (
        lambda d: ((d / "p").write_text('{"image": ["a"], "question": "?"}'), read_questions(PHOTOS, d / "p")),
        "line 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calibration_data(case, tmp_path) -> None:
    asking, says = BAD[case]
    with pytest.raises(QuantizeError) as caught:
        asking(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_editors_of_windows(tmp_path) -> None:
    """They put a mark before the text, and end lines with CR LF; JSON's texts may hold U+2028."""
    line = '{"image": "coffee.jpg", "question": "What\u2028is it?", "answer": "a cup"}\r\n'
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + (2 * line).encode())
    first, second = read_questions(PHOTOS, tmp_path / "p.jsonl")[0]
    assert (first.text, first.answer, second.place) == ("What\u2028is it?", "a cup", f"{tmp_path}/p.jsonl, line 2")
    (tmp_path / "p.txt").write_bytes("\ufeffWhat is it?\r\nWhere?\r\n".encode())
    assert {q.text for q in read_questions(PHOTOS, tmp_path / "p.txt")[0]} == {"What is it?", "Where?"}
    (tmp_path / "list.txt").write_bytes(f"\ufeff{PHOTOS}/coffee.jpg\r\n".encode())
    assert [q.image for q in read_questions(tmp_path / "list.txt", None)[0]] == [PHOTOS / "coffee.jpg"]


def test_images_are_on_one_side_only(images) -> None:
    (images / "broken.png").unlink()
    questions, _ = read_questions(images, None)
    left, right = split_off(questions * 3, 0.5, seed=1)
    assert {q.image for q in left}.isdisjoint(q.image for q in right)
    assert len(left) == len(right) == 3
    assert split_off(questions[:1], 0.5, seed=1) == (questions[:1], [])


# ----------------------------------------------------------------------------------------------------------- recipe


precisions = st.one_of(
    st.just(Precision(32)),
    st.builds(Precision, st.just(8), st.just(0), st.sampled_from(sorted(METHODS))),
    st.builds(Precision, st.just(4), st.sampled_from(BLOCKS), st.sampled_from(sorted(METHODS)), st.booleans()),
)


@given(st.lists(st.builds(Rule, st.text("abc.*_0", min_size=1, max_size=12), precisions), min_size=1, max_size=6))
def test_recipe_round_trip(tmp_path_factory, rules) -> None:
    """What is written is read again, with the same answers for any name."""
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_text(Recipe(tuple(rules)).to_toml())
    again = Recipe.read(path)
    for name in ("a.b", "abc", "c_0.a", "", "zzz"):
        a, b = again.precision(name), Recipe(tuple(rules)).precision(name)
        assert (a.bits, a.block, a.zero_points) == (b.bits, b.block, b.zero_points)
        assert a.bits == 32 or a.method == b.method


def test_first_rule_decides_and_keep_comes_first() -> None:
    recipe = Recipe((Rule("text.0.*", Precision(8)), Rule("text.*", Precision(4, 64))))
    assert [recipe.precision(n).bits for n in ("text.0.w", "text.1.w", "head")] == [8, 4, 32]
    assert recipe.keeping(["*.w"]).precision("text.0.w").bits == 32
    with pytest.raises(QuantizeError, match=r"pattern 'vision\.\*' matches no layer"):
        recipe.keeping(["vision.*"]).check(["text.0.w", "text.1.w"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[layer]", "cannot be read as a recipe"),
        ("a = " + "[" * 50_000, "cannot be read as a recipe"),
        ("layers = 3", "is not a recipe"),
        ("layer = 3", "is not a recipe"),
        ('[[layer]]\npattern = "*"', "pattern (text) and bits are needed"),
        ('[[layer]]\npattern = "*"\nbits = 5', "layer 1: bits 5; allowed: 4, 8, 32"),
        ('[[layer]]\npattern = "*"\nbits = 4\nblock = 48', "block 48; allowed: 32, 64, 128, 256"),
        ('[[layer]]\npattern = "*"\nbits = 8\nblock = 32', "block and zero_points have an effect only with bits = 4"),
        ('[[layer]]\npattern = "*"\nbits = 8\nmethod = "magic"', "unknown method 'magic'; allowed: rtn, clipped, gptq"),
        ('[[layer]]\npattern = "*"\nbits = 8\nbitz = 3', "unknown key 'bitz'"),
        ('[[layer]]\npattern = "*.attention"\nbits = 4', "layer 1: attention is computed in 8 bits or in fp32"),
        ('[[layer]]\npatern = "*"\nbits = 8', "layer 1: unknown key 'patern'"),
        ('[[layer]]\npattern = "*"\nbits = 4\nzero_points = 3', "zero_points is true or false"),
    ],
)
def test_bad_recipe(text, says, tmp_path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(QuantizeError) as caught:
        Recipe.read(tmp_path / "r.toml")
    assert says in str(caught.value)


def test_a_quick_run_takes_a_floor_and_searches_nothing() -> None:
    settings = Settings("int4", (Path("c"),), floor=0.2, quick=True)
    settings.check()
    assert not settings.searches()
    assert settings.kl_floor() == 0.2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"variant": "int3"}, "unknown variant 'int3'; allowed: fp16, int8, int4, int8-static"),
        ({"variant": "int4", "method": "magic"}, "unknown method"),
        ({"variant": "fp16", "method": "rtn"}, "have no effect on fp16"),
        ({"variant": "int4", "method": "gptq"}, "--method gptq needs --calibration"),
        ({"variant": "int4", "quick": True}, "--quick has no effect without --calibration"),
        ({"variant": "int8-static"}, "int8-static needs --calibration"),
        ({"variant": "int4", "prompts": Path("p")}, "--prompts has no effect without --calibration"),
        ({"variant": "int4", "floor": 0.1}, "--floor needs --calibration"),
        ({"variant": "int4", "calibration": (Path("c"),), "floor": float("inf")}, "KL divergence above 0"),
        ({"variant": "int4", "calibration": (Path("c"),), "max_size": float("inf")}, "--max-size inf is impossible"),
        (
            {"variant": "int4", "floor": -1, "calibration": (Path("c"),)},
            "--floor needs --calibration and a KL divergence above 0",
        ),
        ({"variant": "int8", "max_size": 5, "calibration": (Path("c"),)}, "--max-size searches precisions"),
        ({"variant": "int4", "recipe": Path("r"), "method": "rtn"}, "--method has no effect beside --recipe"),
    ],
)
def test_quantize_settings_without_effect_are_refused(settings, says) -> None:
    with pytest.raises(QuantizeError) as caught:
        Settings(**settings).check()
    assert says in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- search


def ladder(name: str, *steps: tuple[int, float]) -> list[Choice]:
    return [
        Choice(name, Precision(8 if i == 0 else 4, 0 if i == 0 else 32), size, kl, 0.0)
        for i, (size, kl) in enumerate(steps)
    ]


def test_search_spends_bytes_where_they_buy_most() -> None:
    """Against trying every combination."""
    choices = [
        ladder("a", (100, 0.0), (60, 0.02), (50, 0.08)),
        ladder("b", (100, 0.0), (60, 0.001), (50, 0.002)),
        ladder("c", (10, 0.0), (6, 0.5)),
    ]
    for budget in (210, 165, 160, 120):
        found = choose(choices, 0.1, budget)
        picked = [next(c for c in rungs if c.precision.bits == found.precision(c.name).bits) for rungs in choices]
        best = min(
            sum(c.kl for c in combo) for combo in itertools.product(*choices) if sum(c.bytes for c in combo) <= budget
        )
        if budget != 120:  # a greedy walk along the hull is exact where it meets the budget, near it elsewhere
            assert sum(c.kl for c in picked) <= best + 0.02
    with pytest.raises(QuantizeError, match="--max-size cannot be met"):
        choose(choices, 0.1, 50)


def test_search_for_a_floor_is_the_smallest_that_keeps_it() -> None:
    choices = [
        ladder("a", (100, 0.0), (50, 0.03)),
        ladder("b", (100, 0.0), (50, 0.03)),
        ladder("c", (100, 0.0), (50, 0.2)),
    ]
    bits = [choose(choices, floor, None).precision(n).bits for floor in (0.01, 0.05, 0.1, 1.0) for n in "abc"]
    assert bits == [8, 8, 8, 4, 8, 8, 4, 4, 8, 4, 4, 4]


def test_every_variant_but_fp32_has_a_maker() -> None:
    from lfm_profiles import VARIANTS
    from lfm_quantize.quantize import MAKERS

    assert set(MAKERS) == set(VARIANTS) - {"fp32"}
