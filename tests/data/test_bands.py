"""Pictures of other channels than RGB: as timm makes them where it does, and bands as they are stored."""

import io

import numpy as np
import pytest
import tifffile
import timm.data
import torch
from PIL import Image

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import GivenImages, ImageFiles, InputSpec, find_images, picture_of, to_pixels
from cnx_deploy.data.preprocessing import normalise
from tests.data.test_decoding import png16

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (60, 90, 4), dtype=np.uint8)
FIVE = RANDOM.integers(0, 256, (40, 50, 5), dtype=np.uint8)
SIZES = ((60, 90), (33, 40), (200, 41))


def smooth(mode, size, seed=0):
    small = np.random.default_rng(seed).integers(
        0, 256, (7, 9, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8
    )
    return Image.fromarray(small.squeeze(), mode).resize(size[::-1], Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_pixels_of_grey_and_alpha_are_those_of_timm(mode, size, crop_mode):
    picture = smooth(mode, size)
    count = len(mode)
    preprocessing = Preprocessing(48, crop_mode=crop_mode).for_channels(count)
    theirs = timm.data.create_transform(
        (count, 48, 48), is_training=False, interpolation="bicubic", crop_pct=0.875, crop_mode=crop_mode,
        mean=preprocessing.mean, std=preprocessing.std,
    )(picture)  # fmt: skip
    ours = normalise(to_pixels(picture, preprocessing)[None], preprocessing)[0]
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    assert ours.shape == theirs.shape == (count, 48, 48)
    assert float(((ours - theirs) * std * 255).abs().max()) <= 1.001
    other = to_pixels(smooth(mode, size, seed=1), preprocessing)
    assert int((other.int() - to_pixels(picture, preprocessing).int()).abs().max()) > 20


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
@pytest.mark.parametrize(("count", "wanted"), [(1, "L"), (2, "LA"), (4, "RGBA")])
def test_pictures_of_every_mode_become_pillows_for_the_count_of_channels(mode, count, wanted):
    if mode in ("I;16", "I", "F"):
        values = (
            COLOUR[..., 0] / 255.0
            if mode == "F"
            else COLOUR[..., 0].astype(np.uint16 if ";" in mode else np.int32) * 257
        )
        picture, eight = (
            Image.fromarray(values.astype(np.float32) if mode == "F" else values),
            Image.fromarray(COLOUR[..., 0]),
        )
    else:
        picture = eight = Image.fromarray(COLOUR).convert(mode)
    made = picture_of(picture, None, count)
    expected = eight.convert("RGBA").convert(wanted) if mode in ("PA",) else eight.convert(wanted)
    assert (made.mode, made.size) == (wanted, (90, 60))
    assert np.array_equal(np.asarray(made), np.asarray(expected))


def test_a_picture_without_alpha_is_opaque_and_that_is_noted(tmp_path):
    Image.fromarray(COLOUR).convert("RGB").save(tmp_path / "plain.png")
    Image.fromarray(COLOUR).save(tmp_path / "clear.png")
    files = ImageFiles((tmp_path / "plain.png", tmp_path / "clear.png"))
    four = Preprocessing(32).for_channels(4)
    pixels = files.pixels(0, four)
    assert bool((pixels[..., 3] == 255).all())
    assert not bool((files.pixels(1, four)[..., 3] == 255).all())
    (note,) = files.observed()
    assert "without alpha are taken as opaque, 255: 1," in note
    assert "plain.png" in note
    files = ImageFiles((tmp_path / "plain.png", tmp_path / "clear.png"))
    files.pixels(0, Preprocessing(32))
    assert files.observed() == ()


def npy(values):
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def tiff(values, **words):
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **words)
    return stream.getvalue()


def pillow_pages(values):
    stream = io.BytesIO()
    first, *others = (Image.fromarray(values[..., at]) for at in range(values.shape[2]))
    first.save(stream, "TIFF", save_all=True, append_images=others)
    return stream.getvalue()


FIRST = FIVE.transpose(2, 0, 1)
STORED = {
    "npy, channels last": npy(FIVE),
    "npy, channels first": npy(FIRST.copy()),
    "tiff, contiguous": tiff(FIVE, photometric="minisblack", planarconfig="contig"),
    "tiff, planes": tiff(FIRST, photometric="minisblack", planarconfig="separate"),
    "tiff, deflated": tiff(FIVE, photometric="minisblack", planarconfig="contig", compression="zlib", predictor=True),
    "tiff, big endian": tiff(FIVE, photometric="minisblack", planarconfig="contig", byteorder=">"),
    "tiff, pages": tiff(FIRST, photometric="minisblack", planarconfig=None),
    "tiff, Pillow's pages": pillow_pages(FIVE),
}


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("name", ["five.npy", "five.tif", "five.dat"])
def test_five_bands_are_read_as_they_are_stored_whatever_the_name(tmp_path, how, name):
    (tmp_path / name).write_bytes(STORED[how])
    files = find_images(tmp_path)
    five = Preprocessing((40, 50), 1.0).for_channels(5)
    assert np.array_equal(files.pixels(0, five).numpy(), FIVE)
    four = Preprocessing((40, 50), 1.0).for_channels(4)
    with pytest.raises(InputError, match=r"5.*4 channels|4 bands|4 channels"):
        files.pixels(0, four)


def test_each_band_is_resized_as_pillow_resizes_grey():
    five = Preprocessing(32, 1.0, "bilinear", crop_mode="squash").for_channels(5)
    made = to_pixels(FIVE, five)
    for at in range(5):
        grey = Image.fromarray(np.ascontiguousarray(FIVE[..., at])).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.array_equal(made[..., at].numpy(), np.asarray(grey))
    border = Preprocessing(32, 1.0, crop_mode="border", mean=(0.0, 0.2, 0.4, 0.6, 1.0), std=(0.2,) * 5)
    assert to_pixels(FIVE, border)[0, 0].tolist() == [0, 51, 102, 153, 255]


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_deep_bands_come_to_eight_bits_by_the_rule_of_grey_files(tmp_path, dtype):
    twelve = FIVE.astype(np.int64) * 16
    level = 4095.0
    np.save(tmp_path / "deep.npy", twelve.astype(dtype))
    five = Preprocessing((40, 50), 1.0, white_level=level).for_channels(5)
    files = ImageFiles((tmp_path / "deep.npy",))
    expected = np.rint(twelve * 255.0 / level).astype(np.uint8)
    assert int(np.abs(files.pixels(0, five).numpy().astype(int) - expected).max()) == 0
    whole = Preprocessing((40, 50), 1.0).for_channels(5)
    if dtype != np.uint16:
        with pytest.raises(InputError, match="white-level"):
            files.pixels(0, whole)
    else:
        files = ImageFiles((tmp_path / "deep.npy",))
        assert int(files.pixels(0, whole).max()) == 15
        assert "nearly black" in " ".join(files.observed())


def test_a_small_white_level_is_of_eight_bits_too():
    preprocessing = Preprocessing((40, 50), 1.0, white_level=100).for_channels(5)
    expected = np.rint(FIVE.clip(max=100) * 255.0 / 100).astype(np.uint8)
    assert np.array_equal(GivenImages([FIVE]).pixels(0, preprocessing).numpy(), expected)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 13, 16])
def test_arrays_and_tensors_are_bands(count):
    values = RANDOM.integers(0, 256, (40, 50, count), dtype=np.uint8)
    preprocessing = Preprocessing((40, 50), 1.0).for_channels(count)
    tensor = torch.from_numpy(values).permute(2, 0, 1)
    given = GivenImages([values, values.transpose(2, 0, 1), tensor, values.squeeze() if count == 1 else values])
    for index in range(4):
        assert np.array_equal(given.pixels(index, preprocessing).numpy(), values)
    (batch,) = given.batches(preprocessing, InputSpec("float", (40, 50), in_chans=count))
    assert batch.images.shape == (4, count, 40, 50)


@pytest.mark.parametrize(
    ("given", "count", "text"),
    [(COLOUR, 5, "takes 5 channels"), (Image.fromarray(COLOUR), 5, "picture of 4 channels"),
     (torch.zeros(4, 40, 40), 5, r"\(5, H, W\)"), (np.zeros((40, 40, 5), bool), 5, "integers or floats"),
     (np.zeros((0, 40, 5)), 5, "integers or floats"), (np.full((40, 40, 5), np.nan), 5, "finite"),
     (-np.ones((40, 40, 5)), 5, "from 0"), (["a"], 4, "got list"), (FIVE, 3, "takes 3 channels"),
     (np.zeros((2, 3, 40, 40)), 5, "takes 5 channels")],
)  # fmt: skip
def test_what_does_not_have_the_networks_channels_is_refused(given, count, text):
    with pytest.raises(InputError, match=text):
        to_pixels(given, Preprocessing(32).for_channels(count))


def test_arrays_on_disk_are_listed_where_they_are_images_and_else_left_out_by_kind(tmp_path):
    np.save(tmp_path / "a.npy", FIVE)
    np.save(tmp_path / "features.npy", np.zeros(512, np.float32))
    np.save(tmp_path / "names.npy", np.array([["a"] * 3] * 3, dtype=object)[None], allow_pickle=True)
    np.save(tmp_path / "mask.npy", np.zeros((40, 50), bool))
    images = find_images(tmp_path)
    assert [path.name for path in images.paths] == ["a.npy"]
    assert "3 of 4 files left out: 3 .npy" in images.notes[0]


def test_damaged_files_of_bands_are_refused_by_name(tmp_path):
    for name, content in (
        ("cut.npy", STORED["npy, channels last"][:-1]),
        ("cut.tif", STORED["tiff, contiguous"][:300]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            to_pixels(tmp_path / name, Preprocessing(32).for_channels(5))
    header = np.lib.format.header_data_from_array_1_0(FIVE) | {"shape": (1 << 20, 1 << 20, 5)}
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    (tmp_path / "huge.npy").write_bytes(stream.getvalue())
    with pytest.raises(InputError, match=r"huge\.npy"):
        to_pixels(tmp_path / "huge.npy", Preprocessing(32).for_channels(5))


def test_a_turned_file_of_bands_is_turned(tmp_path):
    (tmp_path / "turned.tif").write_bytes(
        tiff(FIVE, photometric="minisblack", planarconfig="contig", extratags=[(274, "H", 1, 6, True)])
    )
    five = Preprocessing((50, 40), 1.0).for_channels(5)
    assert np.array_equal(to_pixels(tmp_path / "turned.tif", five).numpy(), np.rot90(FIVE, -1))


def test_sixteen_bits_of_alpha_stay_with_a_white_level(tmp_path):
    deep = COLOUR.astype(np.uint16) * 16
    (tmp_path / "deep.png").write_bytes(png16(deep))
    made = np.asarray(picture_of(tmp_path / "deep.png", 4095, 4))
    assert np.array_equal(made[..., 3], deep[..., 3] >> 8)
    assert np.array_equal(made[..., :3], np.rint(deep[..., :3] * 255.0 / 4095))
