"""Pictures out of a stream of bytes: the files that Pillow wrote, whatever is between them and however it is cut."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lfm_serve.cameras.splitting import NoPictureError, pictures
from PIL import Image

MOST = 1 << 20


def picture(seed: int, kind: str, size: tuple[int, int] = (40, 24)) -> bytes:
    """A file as cameras write them: JPEG baseline, progressive, with restart markers, with a thumbnail in EXIF; PNG."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8))
    file, how = io.BytesIO(), {}
    if kind == "exif":
        small = io.BytesIO()
        image.resize((16, 16)).save(small, "JPEG")
        how = {"exif": b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x00\x00" + small.getvalue()}
    elif kind == "restart":
        how = {"restart_marker_blocks": 1}
    elif kind == "progressive":
        how = {"progressive": True}
    image.save(file, "PNG" if kind == "png" else "JPEG", **how)
    return file.getvalue()


FILES = [picture(n, kind) for n, kind in enumerate(("png", "jpeg", "exif", "restart", "progressive"))]


def cut(content: bytes, at: list[int]) -> Iterator[bytes]:
    ends = sorted({min(n, len(content)) for n in at} | {len(content)})
    return (content[a:b] for a, b in zip([0, *ends], ends, strict=False) if b > a)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from(FILES), st.binary(max_size=40)), min_size=1, max_size=5),
    st.lists(st.integers(0, 20_000), max_size=30),
)
def test_files_come_out_as_they_went_in(parts, at) -> None:
    """With anything between them that does not begin like a picture."""
    parts = [(file, between.replace(b"\xff\xd8\xff", b"").replace(b"\x89PNG", b"")) for file, between in parts]
    content = b"".join(between + file for file, between in parts)
    assert list(pictures(cut(content, at), most=MOST)) == [file for file, _ in parts]


@pytest.mark.parametrize("file", FILES)
def test_a_picture_is_there_with_its_last_byte(file) -> None:
    """The next one may come in an hour."""

    def chunks() -> Iterator[bytes]:
        yield file[:-1]
        yield file[-1:]
        pytest.fail("more was asked for")

    assert next(pictures(chunks(), most=MOST)) == file


@pytest.mark.parametrize("cut_off", FILES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_what_is_cut_off_does_no_harm_for_long(cut_off, share) -> None:
    """At worst as many bytes of the next ones are skipped as a segment may have, 64 KiB."""
    good = [picture(10 + n, "jpeg") for n in range(60)]
    broken = cut_off[: int(share * len(cut_off))]
    found = list(pictures(iter([broken, *good]), most=1 << 17))
    left = max((n for n in range(len(good)) if sum(map(len, good[:n])) <= 1 << 16), default=0) + 1
    assert found[-len(good) + left :] == good[left:]
    assert all(content in good for content in found[1:])


@settings(max_examples=200)
@given(st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]))
def test_anything_ends(garbage, begin) -> None:
    for content in pictures(iter([begin + garbage]), most=1 << 12):
        assert content[:1] in (b"\xff", b"\x89")


@pytest.mark.parametrize("begin", [b"", b"\xff\xd8\xff\xda\x00\x02", b"\x89PNG\r\n\x1a\n"])
def test_no_picture_without_end_is_kept(begin) -> None:
    def chunks() -> Iterator[bytes]:
        yield begin
        while True:
            yield bytes(1 << 12)

    with pytest.raises(NoPictureError):
        list(pictures(chunks(), most=1 << 14))
