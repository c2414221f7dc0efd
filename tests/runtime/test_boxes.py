"""Boxes in answers: both families' spellings, what models get wrong, anything at all; the picture that is drawn."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lfm_runtime.boxes import Box, draw_boxes, parse_boxes
from lfm_runtime.commands.cli import main
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SIZE = (640, 480)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[{"label": "cat", "bbox": [0.5, 0.25, 1.0, 0.75]}]', [Box("cat", 320, 120, 640, 360)]),
        ('[{"image_id": 0, "bbox_2d": [540, 49, 1000, 774], "label": "cat"}]', [Box("cat", 345.6, 23.52, 640, 371.52)]),
        ('Here:\n```json\n[{"label": "a", "bbox": [0, 0, 500, 500]}]\n```', [Box("a", 0, 0, 320, 240)]),
        ('{"label": "a", "bbox": [0, 0, 1, 1]}', [Box("a", 0, 0, 640, 480)]),
        ('{"objects": [{"label": "a", "bbox": [0, 0, 1, 1]}]}', [Box("a", 0, 0, 640, 480)]),
        ('[{"bbox": [0.5, 0.5, 0.1, 0.1]}]', [Box("", 64, 48, 320, 240)]),
        ('[{"label": "a", "bbox": [-0.2, 0.0, 1.7, 1]}]', [Box("a", 0, 0, 1.7 / 1000 * 640, 0.48)]),
        ('[{"label": "a", "bbox_2d": [0, 0, 1500, 1200]}]', [Box("a", 0, 0, 640, 480)]),
        ('[{"label": "a", "bbox": [0, 0, 1, 1]}, {"label": "b", "bbox": [0, 0, 0.5', [Box("a", 0, 0, 640, 480)]),
        ('[{"label": "line", "bbox": [0.2, 0.3, 0.2, 0.9]}]', []),
        ('[{"label": "a", "bbox": [1, 2, 3]}, {"bbox": ["1", 2, 3, 4]}, {"bbox": [true, 0, 1, 1]}]', []),
        ('[{"image_id": 3, "bbox_2d": [0, 0, 9, 9], "label": "of no image"}]', []),
        ('[{"label": "a", "bbox": [1e999, 0, 1, 1]}]', []),
        ("image_index=0 page title [100,200,300,400]\nText.\n\n", [Box("page title", 64, 96, 192, 192)]),
        ("no boxes, [1, 2, 3, 4]", []),
        ("[]", []),
    ],
)
def test_what_models_write(text, wanted) -> None:
    found = parse_boxes(text, [SIZE])
    assert [(b.label, b.image) for b in found] == [(b.label, b.image) for b in wanted]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose((a.left, a.top, a.right, a.bottom), (b.left, b.top, b.right, b.bottom))


def test_boxes_of_several_images() -> None:
    text = '[{"image_id": 1, "bbox_2d": [0, 0, 500, 1000], "label": "b"}, {"image_id": 0, "bbox_2d": [0, 0, 9, 9]}]'
    assert parse_boxes(text, [SIZE, (100, 50)])[0] == Box("b", 0, 0, 50, 50, 1)


numbers = st.integers(-5, 1500) | st.floats(width=32)
objects = st.dictionaries(
    st.sampled_from(["bbox", "bbox_2d", "label", "image_id", "x"]),
    st.lists(numbers, max_size=5) | st.text(max_size=5) | st.integers(-2, 9),
    max_size=4,
)


@given(st.text() | st.lists(objects, max_size=4).map(json.dumps) | st.text('{}[]":,bo x0.1'))
def test_any_text_has_boxes_within_the_image_or_none(text) -> None:
    for box in parse_boxes(text, [SIZE, (1, 1)]):
        width, height = [SIZE, (1, 1)][box.image]
        assert 0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height


@given(st.lists(st.tuples(st.text(max_size=8), st.lists(st.integers(0, 999), min_size=4, max_size=4)), max_size=5))
def test_what_the_3b_is_asked_for_comes_back(boxes) -> None:
    text = json.dumps([{"image_id": 0, "bbox_2d": c, "label": label} for label, c in boxes])
    wanted = [label for label, (x1, y1, x2, y2) in boxes if x1 != x2 and y1 != y2]
    assert [box.label for box in parse_boxes(text, [(1000, 1000)])] == wanted


def test_the_picture_has_the_boxes() -> None:
    """The outline is where it should be, and nothing else is painted; labels stay on the picture."""
    white = Image.new("RGB", (400, 300), "white")
    drawn = np.array(draw_boxes(white, [Box("", 100, 50, 200, 150)]))
    painted = (drawn != 255).any(-1)
    rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (50, 150, 100, 200)
    assert not painted[60:140, 110:190].any()
    assert np.array(white).min() == 255
    for corner in (Box("a long label of it", 390, 0, 400, 10), Box("ä\n😀", 0, 290, 5, 300)):
        assert draw_boxes(white, [corner]).size == (400, 300)


def test_the_command(demo_bundle, photo, tmp_path, capsys) -> None:
    """A schema makes the demo model say boxes; the picture has the size of the photo, upright."""
    pytest.importorskip("llguidance")
    schema = tmp_path / "boxes.json"
    box = {"type": "object", "required": ["label", "bbox"], "additionalProperties": False, "properties": {
        "label": {"const": "cup"}, "bbox": {"const": [0.25, 0.25, 0.75, 0.5]}}}  # fmt: skip
    schema.write_text(json.dumps({"type": "array", "items": box, "minItems": 1, "maxItems": 1}))
    out = tmp_path / "out.png"
    words = ["run", str(demo_bundle), str(photo), "-p", "Detect the cup.", "--threads", "2", "--boxes", str(out)]
    assert main([*words, "--schema", str(schema), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    cut = ["run", str(demo_bundle), "-p", "x", "--schema", str(schema), "--max-new-tokens", "3", "--quiet"]
    assert main(cut) == 3
    assert "cut off after 3 tokens, before its JSON was whole; allow more" in capsys.readouterr().err
    width, height = Image.open(photo).size
    assert found["boxes"][0] | {"label": "cup", "left": width / 4, "bottom": height / 2} == found["boxes"][0]
    assert Image.open(out).size == (width, height)
    assert main([*words, "--quiet"]) == 0, "its own output is replaced"
    edited = Image.open(out)
    note = PngInfo()
    for key, value in edited.text.items():
        note.add_text(key, value)
    edited.putpixel((0, 0), (1, 2, 3))
    edited.save(out, pnginfo=note)
    assert main(words) == 2
    assert "did not write it" in capsys.readouterr().err, "an editor that keeps its text has been used on it"
    out.write_bytes(photo.read_bytes())
    assert main(words) == 2
    assert "did not write it" in capsys.readouterr().err
    assert main([*words, str(photo)]) == 2
    assert "name one" in capsys.readouterr().err
    assert main(["run", str(demo_bundle), "-p", "x", "--schema", str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err
    schema.write_text('{"not": {}}')
    assert main(["run", str(demo_bundle), "-p", "x", "--schema", str(schema)]) == 2
    assert "cannot be enforced" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_leaves_the_answer_whole(
    demo_bundle, photo, tmp_path, capsys, monkeypatch
) -> None:
    """The disk is full by then: the answer ends its line, the error is one of its own."""

    def full(path, _) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("lfm_runtime.formats.files.write_whole", full)
    words = ["run", str(demo_bundle), str(photo), "-p", "x", "--threads", "1", "--max-new-tokens", "2", "--quiet"]
    assert main([*words, "--boxes", str(tmp_path / "out.png")]) == 2
    said = capsys.readouterr()
    assert said.out.endswith("\n")
    assert said.err.startswith("lfm-edge: ")
    assert said.err.count("\n") == 1
