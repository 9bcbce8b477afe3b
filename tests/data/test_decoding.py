"""Files of every format and depth become the pixels that other libraries and plain arithmetic give."""

import io
import shutil
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features
from torchvision.transforms import v2

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import GivenImages, ImageFiles, InputSpec, find_images, load_image, upright
from cnx_deploy.data import pixels as pixels_module
from cnx_deploy.data.image_files import is_image_file
from cnx_deploy.data.pixels import FORMATS
from cnx_deploy.data.preprocessing import to_pixels

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (24, 20, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (24, 20)).astype(np.uint16)
TWELVE = (DEEP >> 4).astype(np.uint16)
"""12 bits in 16: up to 4095."""


def picture(mode: str = "RGB", seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)).convert(mode)


def pixels_of(path: Path, white_level: float | None = None) -> np.ndarray:
    """(H, W, 3) uint8 as training takes them."""
    return np.asarray(ImageFiles((path,)).image(0, white_level))


def observed(path: Path, white_level: float | None = None) -> tuple[str, ...]:
    files = ImageFiles((path,))
    files.image(0, white_level)
    return files.observed()


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def tiff(values: np.ndarray, *, order: str = "<", photometric: int = 1, bits: int | None = None) -> bytes:
    """An uncompressed TIFF of one strip, written out by the specification (TIFF 6.0, section 2)."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    content = values.astype(values.dtype.newbyteorder(order)).tobytes() if bits is None else packed_twelve(values)
    height, width = values.shape
    entries = [
        (256, width), (257, height), (258, bits or 8 * values.dtype.itemsize), (259, 1), (262, photometric), (273, 8),
        (277, 1), (278, height), (279, len(content)), (339, kind),
    ]  # fmt: skip
    directory = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in entries)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(content))
    return start + content + struct.pack(f"{order}H", len(entries)) + directory + bytes(4)


def packed_twelve(values: np.ndarray) -> bytes:
    """Two values of 12 bits in three bytes."""
    first, second = values[:, 0::2].astype(int), values[:, 1::2].astype(int)
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8).tobytes()


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits, written out by the specification: grey, grey with alpha, colour or colour with alpha."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- formats ----------------------------------------------------------------------------------------------------------

WRITTEN = {
    "JPEG": {}, "PNG": {}, "WEBP": {}, "WEBP lossless": {"lossless": True}, "BMP": {}, "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"}, "TIFF jpeg": {"compression": "jpeg"}, "GIF": {}, "PPM": {}, "AVIF": {},
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jpg", ".PNG", ".jfif", ".xyz", ""])
@pytest.mark.parametrize("how", WRITTEN)
def test_a_file_is_told_by_its_content_and_is_what_torchvision_loads(tmp_path: Path, how: str, suffix: str) -> None:
    kind = how.split()[0]
    if not features.check("avif") and kind == "AVIF":
        pytest.skip("this Pillow reads no AVIF")
    path = tmp_path / "class" / f"image{suffix}"
    path.parent.mkdir()
    picture().save(path, kind, **WRITTEN[how])
    assert find_images(tmp_path).paths == (path,)
    with Image.open(path) as image:  # as torchvision.datasets.folder.pil_loader and timm open a file
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels_of(path), expected)
    if how not in ("JPEG", "WEBP", "TIFF jpeg", "GIF", "AVIF"):  # these lose something
        assert np.array_equal(expected, COLOURS)


def test_jfif_and_jpe_are_suffixes_of_jpeg_and_a_camera_s_several_pictures_are_the_first(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (40, 30), "white"), Image.new("RGB", (40, 30), "black")
    first.save(tmp_path / "camera.jpe", "MPO", save_all=True, append_images=[second])
    assert pixels_of(tmp_path / "camera.jpe").min() > 250
    assert observed(tmp_path / "camera.jpe") == ()
    assert find_images(tmp_path).paths == (tmp_path / "camera.jpe",)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken_and_said_so(tmp_path: Path, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    frames = [picture("L", seed=seed) for seed in (0, 1)]
    for name, more in (("moving", frames[1:]), ("still", [])):
        frames[0].save(tmp_path / name, kind, save_all=True, append_images=more, **options)
        assert np.array_equal(pixels_of(tmp_path / name), three(np.asarray(frames[0])))
        assert not np.array_equal(pixels_of(tmp_path / name), three(np.asarray(frames[1])))
    (note,) = observed(tmp_path / "moving")
    assert note.startswith("1 files hold several frames or pages")
    assert str(tmp_path / "moving") in note
    assert observed(tmp_path / "still") == ()


@pytest.mark.parametrize("name", ["P3 is a text", "Python", "GIF8", "BM", "II*", "RIFF....WEBP", "%PDF-1.4", ""])
def test_text_that_begins_as_an_image_is_none(tmp_path: Path, name: str) -> None:
    assert not is_image_file(str(put(tmp_path / "file", name.encode() + b"\n and more"[: 20 * bool(name)])))
    assert not is_image_file(str(tmp_path))


def test_what_cannot_be_read_is_refused_by_name_and_with_the_formats_that_can(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.png"):
        load_image(tmp_path / "nowhere.png")
    picture().save(tmp_path / "image.ico")
    with pytest.raises(InputError, match=f"image.ico cannot be read .* {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"):
        load_image(tmp_path / "image.ico")


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "LA", "1", "P", "YCbCr", "PA", "RGBa", "HSV"])
def test_odd_images_of_every_mode_become_pillows_rgb(mode: str) -> None:
    image = picture("RGBA").convert(mode) if mode == "RGBa" else picture(mode)
    expected = np.asarray((image.convert("RGBA") if mode in ("RGBa", "PA") else image).convert("RGB"))
    assert np.array_equal(np.asarray(upright(image)), expected)


def test_lab_becomes_what_its_colour_profile_says(tmp_path: Path) -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.applyTransform(picture(), ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    image.save(tmp_path / "lab.tif")
    expected = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    assert np.array_equal(pixels_of(tmp_path / "lab.tif"), np.asarray(expected))
    assert np.abs(pixels_of(tmp_path / "lab.tif").astype(int) - COLOURS).mean() < 3  # 8 bits of LAB hold so much


def test_odd_images_with_palette_and_transparency_keep_their_colours(tmp_path: Path) -> None:
    image = picture("P")
    for name, options in (("a.png", {"transparency": bytes([0] * 128 + [255] * 128)}), ("b.gif", {"transparency": 3})):
        image.save(tmp_path / name, **options)
        assert np.array_equal(pixels_of(tmp_path / name), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("photometric", [0, 1])
def test_grey_whose_zero_is_white_is_turned_at_every_depth(tmp_path: Path, photometric: int) -> None:
    for values, level in ((DEEP >> 8).astype(np.uint8), 255), (DEEP, 65535), ((DEEP / 65535).astype(np.float32), 1):
        grey = np.rint(values.astype(float) * 255 / level)
        found = pixels_of(put(tmp_path / "grey.tif", tiff(values, photometric=photometric)))[..., 0].astype(int)
        assert np.abs(found - (255 - grey if photometric == 0 else grey)).max() <= 1


# --- depth ------------------------------------------------------------------------------------------------------------


def saved_grey(path: Path, values: np.ndarray) -> Path:
    if path.suffix == ".png":
        Image.fromarray(values).save(path)
        return path
    return put(path, tiff(values, order=">" if "big" in path.name else "<"))


FILES = ("grey.png", "grey.tif", "big.tif")


@pytest.mark.parametrize("name", FILES)
def test_sixteen_bits_keep_their_upper_byte_as_pillow_keeps_of_colour(tmp_path: Path, name: str) -> None:
    path = saved_grey(tmp_path / name, DEEP)
    assert np.array_equal(pixels_of(path), three(DEEP >> 8))
    assert np.array_equal(pixels_of(path, 65535), three(DEEP >> 8))
    assert observed(path) == ()
    Image.open(io.BytesIO(png16(np.repeat(DEEP[..., None], 3, axis=2)))).save(tmp_path / "colour.png")
    assert np.array_equal(pixels_of(tmp_path / "colour.png"), three(DEEP >> 8))


@pytest.mark.parametrize("name", FILES)
def test_twelve_bits_in_sixteen_are_noted_and_a_white_level_gives_all_of_them(tmp_path: Path, name: str) -> None:
    path = saved_grey(tmp_path / name, TWELVE)
    assert len(np.unique(pixels_of(path))) == 16
    (note,) = observed(path)
    for part in (f"reach {TWELVE.max()} at most, where white is 65535", str(path), "--white-level 4095"):
        assert part in note
    expected = np.array([[round(int(value) * 255 / 4095) for value in row] for row in TWELVE])
    assert np.array_equal(pixels_of(path, 4095), three(expected))
    assert observed(path, 4095) == ()
    (clipped,) = observed(path, 4000)
    assert f"above the white level 4000 are clipped; the largest is {TWELVE.max()}" in clipped


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_a_white_level_takes_all_sixteen_bits_of_colour(tmp_path: Path, channels: int) -> None:
    values = RNG.integers(0, 4096, (24, 20, channels)).astype(np.uint16)
    path = put(tmp_path / "colour.png", png16(values))
    colours = values[..., :3] if channels > 2 else np.repeat(values[..., :1], 3, axis=2)
    assert np.array_equal(pixels_of(path, 4095), np.rint(colours * 255.0 / 4095))
    assert np.array_equal(pixels_of(path), colours >> 8)
    assert "--white-level 4095" in observed(path)[0]
    assert observed(path, 4095) == ()


def test_a_turned_image_of_sixteen_bits_is_turned_with_a_white_level_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    values = np.repeat(TWELVE[..., None], 3, axis=2)
    content = png16(values)
    chunk = b"eXIf" + exif.tobytes()[6:]
    inserted = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path = put(tmp_path / "turned.png", content[:33] + inserted + content[33:])
    expected = np.rot90(np.rint(values * 255.0 / 4095), -1)
    assert np.array_equal(pixels_of(path, 4095), expected)
    assert pixels_of(path).shape == expected.shape != values.shape


def test_one_white_level_serves_a_folder_of_every_depth(tmp_path: Path) -> None:
    """It is of files that can hold it: what has 8 bits keeps its own white."""
    eight = (TWELVE >> 4).astype(np.uint8)
    Image.fromarray(eight).save(tmp_path / "8.png")
    saved_grey(tmp_path / "12.png", TWELVE)
    put(tmp_path / "12.tif", tiff(TWELVE, bits=12))
    assert np.array_equal(pixels_of(tmp_path / "8.png", 4095), three(eight))
    expected = three(np.rint(TWELVE * 255.0 / 4095))
    assert np.array_equal(pixels_of(tmp_path / "12.tif"), expected)  # a file that says it has 12 bits needs no option
    assert np.array_equal(pixels_of(tmp_path / "12.png", 4095), expected)
    assert np.array_equal(pixels_of(tmp_path / "8.png", 100), three(np.rint(np.minimum(eight, 100) * 255.0 / 100)))
    assert "above the white level 100 are clipped" in observed(tmp_path / "8.png", 100)[0]


@pytest.mark.parametrize("order", ["<", ">"])
def test_floats_are_scaled_by_one_or_by_the_white_level_and_else_refused(tmp_path: Path, order: str) -> None:
    values = (DEEP / np.float32(65535)).astype(np.float32)
    path = put(tmp_path / "float.tif", tiff(values, order=order))
    reference = v2.functional.to_dtype(torch.from_numpy(values), torch.uint8, scale=True).numpy()  # cuts v * 255.999
    assert np.array_equal(pixels_of(path), three(np.rint(values * 255)))
    assert np.abs(pixels_of(path)[..., 0].astype(int) - reference).max() <= 1
    put(path, tiff(values * np.float32(4000), order=order))
    with pytest.raises(InputError, match=r"float\.tif holds values from .* expected at most 1\. .*--white-level"):
        pixels_of(path)
    assert np.abs(pixels_of(path, 4000).astype(int) - three(np.rint(values * 255)).astype(int)).max() <= 1


@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf")])
def test_values_that_are_no_brightness_are_refused_whatever_is_white(tmp_path: Path, bad: float) -> None:
    values = np.full((4, 4), 0.5, dtype=np.float32)
    values[1, 2] = bad
    for level in (None, 1.0, 1000.0):
        with pytest.raises(InputError, match="expected finite values from 0"):
            pixels_of(put(tmp_path / "float.tif", tiff(values)), level)


def test_integers_of_32_bits_are_those_of_16_or_have_a_white_level(tmp_path: Path) -> None:
    path = put(tmp_path / "int.tif", tiff(DEEP.astype(np.int32)))
    assert np.array_equal(pixels_of(path), three(DEEP >> 8))
    put(path, tiff(DEEP.astype(np.int32) * 10))
    with pytest.raises(InputError, match="expected at most 65535"):
        pixels_of(path)
    assert np.array_equal(pixels_of(path, 655350), three(np.rint(DEEP * 2550.0 / 655350)))


def test_a_small_white_level_is_applied_once_to_arrays_and_colours_and_floats_are_told_of_one(
    tmp_path: Path,
) -> None:
    values = (DEEP >> 9)[..., None].repeat(3, axis=2)  # to 127
    expected = np.rint(np.minimum(values, 100) * 255.0 / 100)
    colours = pixels_of(put(tmp_path / "colour.png", png16(values)), 100)
    assert np.array_equal(colours, expected)
    preprocessing = Preprocessing(32, white_level=100)
    by_file = ImageFiles((tmp_path / "colour.png",)).pixels(0, preprocessing)
    assert torch.equal(GivenImages([values.astype(np.float32)]).pixels(0, preprocessing), by_file)
    unit = put(tmp_path / "float.tif", tiff((DEEP / 65535).astype(np.float32)))
    assert "--white-level 1 (white_level)" in observed(unit, 4095)[0]


def test_a_dark_image_is_noted_once_a_source_by_the_brightest_of_them_also_among_bright_ones(tmp_path: Path) -> None:
    dim, black = (TWELVE // 2).astype(np.uint16), np.zeros_like(TWELVE)
    paths = tuple(saved_grey(tmp_path / f"{at}.png", values) for at, values in enumerate((dim, TWELVE, DEEP, black)))
    for chosen, start in (((0, 1), "Images with"), ((0, 1, 2), "Some images with"), ((2, 3), None)):
        files = ImageFiles(tuple(paths[at] for at in chosen))
        for _ in range(2):
            list(files.batches(Preprocessing(32), InputSpec("uint8", 32)))
        assert len(files.observed()) == (start is not None)
        for note in files.subset([0]).observed():  # a part of a source is of that source
            assert note.startswith(f"{start} more than 8 bits reach {TWELVE.max()} at most")
            assert str(paths[1]) in note


@pytest.mark.parametrize("level", [None, 4095.0])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.float64])
def test_arrays_and_tensors_follow_the_rule_of_files(tmp_path: Path, dtype: type, level: float | None) -> None:
    values = TWELVE if dtype == np.uint16 else (TWELVE if level else TWELVE / 4095).astype(dtype)
    by_file = put(tmp_path / "grey.tif", tiff(values.astype(np.float32) if dtype != np.uint16 else values))
    preprocessing = Preprocessing(32, white_level=level)
    colours = np.repeat(values[..., None], 3, axis=2)
    given = GivenImages([values, colours, torch.from_numpy(colours.copy()).permute(2, 0, 1)])
    expected = to_pixels(load_image(by_file, level), preprocessing)
    for index in range(3):
        assert torch.equal(given.pixels(index, preprocessing), expected)
    assert len(given.observed()) == (dtype == np.uint16 and level is None)
    with pytest.raises(InputError, match="finite values from 0"):
        GivenImages([-values.astype(np.float32)]).pixels(0, preprocessing)


# --- bytes, and the file by itself ------------------------------------------------------------------------------------


def test_the_bytes_of_a_file_give_the_pixels_of_its_path(tmp_path: Path) -> None:
    deep = put(tmp_path / "deep.png", png16(np.full((40, 50, 3), 3000, np.uint16)))
    picture().save(tmp_path / "a.jpg")
    np.save(tmp_path / "b.npy", np.asarray(picture()))
    for path, white in ((tmp_path / "a.jpg", None), (tmp_path / "b.npy", None), (deep, 4095.0)):
        preprocessing = Preprocessing(32, white_level=white)
        assert torch.equal(to_pixels(path.read_bytes(), preprocessing), to_pixels(path, preprocessing))


def test_bytes_that_are_no_image_are_refused_and_a_header_that_lies_allocates_nothing(tmp_path: Path) -> None:
    huge = np.lib.format.magic(1, 0)
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000, 90000, 3)}"
    lie = huge + struct.pack("<H", len(text) + 1) + text + b"\n" + b"\0" * 64
    for content, said in ((b"", "The file cannot be read"), (b"text", "The file cannot be read"), (lie, "and has")):
        with pytest.raises(InputError, match=said):
            to_pixels(content, Preprocessing(32))


def test_a_copy_of_the_file_makes_the_same_pixels_without_the_package(tmp_path: Path) -> None:
    source = Path(pixels_module.__file__)
    shutil.copy(source, tmp_path / "pixels.py")
    picture().save(tmp_path / "a.jpg")
    script = (
        "import sys; sys.modules['cnx_deploy'] = sys.modules['torch'] = None; import pixels, types, numpy as np;"
        "p = types.SimpleNamespace(image_size=32, crop_ratio=0.875, crop_mode='center', interpolation='bicubic',"
        "white_level=None, fill=(0, 0, 0), in_chans=3);"
        "np.save('out.npy', pixels.pixels_of_file(open('a.jpg', 'rb').read(), p))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=60)
    made = torch.from_numpy(np.load(tmp_path / "out.npy"))
    assert torch.equal(made, to_pixels(tmp_path / "a.jpg", Preprocessing(32)))


def test_several_threads_decode_at_once_without_warnings() -> None:
    both, before = threading.Barrier(2), list(warnings.filters)

    def inside(number: int) -> None:
        with pixels_module.quiet():
            both.wait(5)
            warnings.warn("of a thread that decodes", stacklevel=1)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(inside, range(2)))
    assert warnings.filters == before
