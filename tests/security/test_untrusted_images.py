"""Images that are bombs, of refused formats, broken or odd: one clear error soon and cheaply, or the right pixels."""

import io
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from cnx_deploy.core.errors import InputError
from cnx_deploy.data import MAX_PIXELS, load_image, upright
from tests.support.lies import MEGABYTES, QUICK, SECONDS, peak_megabytes, put, refused, result_or_error


def picture(width: int = 24, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(side: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def packed_zeros(count: int) -> bytes:
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(count >> 20)) + packer.flush()


def check_refused(path: Path, text: str = "expected a whole JPEG, PNG, ") -> None:
    refused(lambda: upright(load_image(path)), InputError, str(path), text)


@pytest.mark.parametrize(
    ("side", "rows", "text"),
    [
        (9_500, b"", "limit 89000000"),  # between Pillow's warning and its error
        (50_000, b"", "decompression bomb"),
        (50_000, packed_zeros(16 << 20), "decompression bomb"),  # 7.5 GB as RGB
    ],
    ids=["large", "huge", "with pixels"],
)
def test_decompression_bomb_png_is_refused_by_its_header(side: int, rows: bytes, text: str, tmp_path: Path) -> None:
    assert side * side > MAX_PIXELS
    check_refused(put(tmp_path / "bomb.png", png(side, chunk(b"IDAT", rows))), text)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_decompression_bomb_png_in_a_text_or_a_profile(kind: bytes, tmp_path: Path) -> None:
    """A quarter of a gigabyte in a chunk beside the pixels: left out, or too large."""
    pixels = chunk(b"IDAT", zlib.compress(bytes(8 * 25)))
    path = put(tmp_path / "bomb.png", png(8, chunk(kind, b"name\0\0" + packed_zeros(256 << 20)), pixels))
    before, started = peak_megabytes(), time.process_time()
    image = result_or_error(lambda: upright(load_image(path)), InputError)
    assert image is None or image.size == (8, 8)
    assert (time.process_time() - started < SECONDS, peak_megabytes() - before < MEGABYTES) == (True, True)


@pytest.mark.parametrize(
    "content",
    [b"SIMPLE  =                    T / conforms" + b" " * 2840, b"%PDF-1.4\n%%EOF\n", b"\x7fELF" + bytes(60)],
    ids=["FITS", "PDF", "ELF"],
)
def test_disallowed_image_format_is_told_by_its_content(content: bytes, tmp_path: Path) -> None:
    check_refused(put(tmp_path / "image.jpg", content))


@pytest.mark.parametrize("suffix", ["pdf", "ico", "tga", "eps"])
def test_disallowed_image_format_that_pillow_itself_would_read(suffix: str, tmp_path: Path) -> None:
    picture().save(tmp_path / f"image.{suffix}")
    check_refused((tmp_path / f"image.{suffix}").rename(tmp_path / "image.jpg"))


def test_pixels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    Image.new("F", (32, 32), float("nan")).save(tmp_path / "image.tiff")
    check_refused(tmp_path / "image.tiff", "expected finite values")


def test_decompression_bomb_tiff_is_refused_by_its_header_and_pages_in_a_ring_end(tmp_path: Path) -> None:
    def directory(width: int, height: int, following: int) -> bytes:
        tags = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 64))
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        return struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)

    start = b"II*\0" + struct.pack("<I", 72) + bytes(64)
    check_refused(put(tmp_path / "bomb.tif", start + directory(9_500, 9_500, 0)), "limit 89000000")
    check_refused(put(tmp_path / "huge.tif", start + directory(1 << 30, 1 << 30, 0)), "decompression bomb")
    ring = put(tmp_path / "ring.tif", start + directory(8, 8, 72))
    assert upright(load_image(ring)).size == (8, 8)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff", "gif", "ppm", "avif"])
def test_empty_and_truncated_image(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    for share in (0.0, 40, 0.9):
        picture(64, 64).save(path)
        os.truncate(path, int(path.stat().st_size * share) if isinstance(share, float) else share)
        check_refused(path)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_odd_images_are_turned_as_pillow_turns_them(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"turned.{suffix}"
    for orientation in range(10):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        picture().save(path, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(path))
        found = upright(load_image(path))
        assert np.array_equal(np.asarray(found), np.asarray(expected)), orientation
        assert (found.size == (20, 24)) is (orientation in (5, 6, 7, 8))


def test_odd_images_whose_exif_cannot_be_packed_again_are_read(tmp_path: Path) -> None:
    """A description whose type is none: reading the orientation does not need it; packing the EXIF anew would fail."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.ImageDescription] = "words"
    picture().save(tmp_path / "odd.jpg", exif=exif)
    content = (tmp_path / "odd.jpg").read_bytes()
    place = max(content.find(b"\x01\x0e\x00\x02"), content.find(b"\x0e\x01\x02\x00"))
    assert place > 0
    put(tmp_path / "odd.jpg", content[: place + 2] + b"\xff\xff" + content[place + 4 :])
    assert upright(load_image(tmp_path / "odd.jpg")).size == (20, 24)


def seeds() -> list[bytes]:
    """Small images of every kind that is read."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.DateTime] = "2020:01:01"
    made = []
    for image, kind, how in (
        (picture(), "JPEG", {"exif": exif}),
        (picture(), "JPEG", {"progressive": True}),
        (picture().convert("CMYK"), "JPEG", {}),
        (picture(), "PNG", {"exif": exif}),
        (picture().convert("P"), "PNG", {"transparency": 0}),
        (picture().convert("I;16"), "PNG", {}),
        (picture(), "WEBP", {"exif": exif}),
        (picture(), "WEBP", {"lossless": True}),
        (picture().convert("P"), "BMP", {}),
        (picture(), "TIFF", {"exif": exif}),
        (picture().convert("I;16"), "TIFF", {"compression": "tiff_lzw"}),
        (picture().convert("F"), "TIFF", {}),
        (picture(), "TIFF", {"compression": "jpeg"}),
        (picture(), "GIF", {"save_all": True, "append_images": [picture().rotate(90)]}),
        (picture(), "PPM", {}),
        (picture().convert("I"), "PPM", {}),
        (picture(), "AVIF", {}),
    ):
        stream = io.BytesIO()
        image.save(stream, kind, **how)
        made.append(stream.getvalue())
    return made


SEEDS = seeds()
EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=0, max_size=4), st.integers(0, 4)), max_size=8
)


@settings(QUICK, max_examples=300)
@given(seed=st.sampled_from(SEEDS), edits=EDITS)
def test_bytes_changed_anywhere_give_an_image_or_one_error(tmp_path: Path, seed: bytes, edits: Any) -> None:
    content = bytearray(seed)
    for place, new, replaced in edits:
        at = int(place * len(content))
        content[at : at + replaced] = new
    path = put(tmp_path / "image.bin", bytes(content))
    image = result_or_error(lambda: upright(load_image(path)), InputError)
    assert image is None or image.mode == "RGB"
