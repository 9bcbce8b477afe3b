"""Images that are bombs, of refused formats, broken or odd: one clear error soon and cheaply, or the right pixels."""

import io
import os
import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from cnx_deploy.core.errors import InputError
from cnx_deploy.data import MAX_PIXELS, load_image, upright_rgb

SECONDS = 2.0
MEGABYTES = 50.0


def picture(width: int = 24, height: int = 20) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(side: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refused(path: Path, text: str) -> None:
    before, started = peak_megabytes(), time.perf_counter()
    with pytest.raises(InputError, match=text) as caught:
        upright_rgb(load_image(path))
    assert str(path) in str(caught.value)
    assert time.perf_counter() - started < SECONDS
    assert peak_megabytes() - before < MEGABYTES


@pytest.mark.parametrize("side", [9_500, 50_000])  # between Pillow's warning and its error, and above both
def test_decompression_bomb_png_is_refused_by_its_header(tmp_path, side):
    assert side * side > MAX_PIXELS
    (tmp_path / "bomb.png").write_bytes(png(side, chunk(b"IDAT", b"")))
    refused(tmp_path / "bomb.png", "(limit 89000000|decompression bomb)")


def test_decompression_bomb_png(tmp_path):
    """50,000 x 50,000 pixels, 7.5 GB as RGB, packed into some kilobytes of a real PNG."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(150_001)) for _ in range(1000)) + packer.flush()
    (tmp_path / "bomb.png").write_bytes(png(50_000, chunk(b"IDAT", rows)))
    assert (tmp_path / "bomb.png").stat().st_size < 200_000
    refused(tmp_path / "bomb.png", "cannot be read as an image")


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_decompression_bomb_png_in_a_text_or_a_profile(tmp_path, kind):
    """A quarter of a gigabyte in a chunk beside the pixels."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
    pixels = chunk(b"IDAT", zlib.compress(bytes(8 * 25)))
    (tmp_path / "bomb.png").write_bytes(png(8, chunk(kind, b"name\0\0" + packed), pixels))
    before, started = peak_megabytes(), time.perf_counter()
    try:
        assert upright_rgb(load_image(tmp_path / "bomb.png")).size == (8, 8)  # the profile is left out
    except InputError as error:
        assert "too large" in str(error)  # noqa: PT017 - either is right, for either kind
    assert (time.perf_counter() - started < SECONDS, peak_megabytes() - before < MEGABYTES) == (True, True)


FORMATS = {
    "FITS": b"SIMPLE  =                    T / conforms" + b" " * 2840,
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "text": b"no image at all\n",
    "PDF": b"%PDF-1.4\n%%EOF\n",
    "pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.",
    "ELF": b"\x7fELF" + bytes(60),
}


@pytest.mark.parametrize("name", FORMATS)
def test_disallowed_image_format(tmp_path, name):
    """Told by its content, whatever its name."""
    (tmp_path / "image.jpg").write_bytes(FORMATS[name])
    refused(tmp_path / "image.jpg", "expected a whole JPEG, PNG, WebP or BMP file")


@pytest.mark.parametrize("suffix", ["gif", "tiff", "pdf", "ico"])
def test_disallowed_image_format_that_pillow_itself_would_read(tmp_path, suffix):
    image = Image.new("F", (32, 32), float("nan")) if suffix == "tiff" else picture()  # pixels that are no numbers
    image.save(tmp_path / f"image.{suffix}")
    refused((tmp_path / f"image.{suffix}").rename(tmp_path / "image.jpg"), "cannot be read as an image")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_empty_and_truncated_image(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    for share in (0.0, 1, 8, 40, 0.5, 0.9):
        picture(64, 64).save(path)
        os.truncate(path, int(path.stat().st_size * share) if isinstance(share, float) else share)
        refused(path, "cannot be read as an image")


@pytest.mark.parametrize("orientation", range(10))
def test_odd_images_are_turned_as_pillow_turns_them(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture().save(tmp_path / "turned.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    found = upright_rgb(load_image(tmp_path / "turned.png"))
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert (found.size == (20, 24)) is (orientation in (5, 6, 7, 8))


def test_odd_images_whose_exif_cannot_be_packed_again_are_read(tmp_path):
    """A date that is a number: reading the orientation does not need it; packing the EXIF anew would fail on it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.ImageDescription] = "words"
    picture().save(tmp_path / "odd.jpg", exif=exif)
    content = (tmp_path / "odd.jpg").read_bytes()
    # The description's type becomes a signed integer that its bytes are not.
    place = content.index(b"\x01\x0e\x00\x02") if b"\x01\x0e\x00\x02" in content else content.index(b"\x0e\x01\x02\x00")
    (tmp_path / "odd.jpg").write_bytes(content[: place + 2] + b"\xff\xff" + content[place + 4 :])
    assert upright_rgb(load_image(tmp_path / "odd.jpg")).mode == "RGB"


def seeds() -> list[bytes]:
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
    ):
        stream = io.BytesIO()
        image.save(stream, kind, **how)
        made.append(stream.getvalue())
    return made


SEEDS = seeds()
EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=0, max_size=4), st.integers(0, 4)), max_size=8
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.sampled_from(SEEDS), edits=EDITS)
def test_bytes_changed_anywhere_give_an_image_or_one_error(tmp_path, seed, edits):
    content = bytearray(seed)
    for place, new, replaced in edits:
        at = int(place * len(content))
        content[at : at + replaced] = new
    path = tmp_path / "image.bin"
    path.write_bytes(content)
    try:
        image = upright_rgb(load_image(path))
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017 - both outcomes are right
    else:
        assert image.mode == "RGB"
