from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import find_dataset, find_images, image_like_batches, load_image, runner_input
from cnx_deploy.data.preprocessing import normalise, to_pixels


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    side = max(width, height)
    pixels = next(image_like_batches(1, side, batch_size=1, seed=seed))[0, :height, :width]
    return Image.fromarray(pixels.numpy())


def write_classes(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(8, 8, seed=index).save(root / name / f"{index:03}.png")
    return root


@pytest.mark.parametrize("size", [(224, 224), (640, 427), (427, 641), (97, 303), (50, 1400)])
@pytest.mark.parametrize(("image_size", "crop_ratio"), [(224, 0.875), (288, 0.95), (64, 1.0)])
def test_preprocess_parity_pixels_are_timms(size, image_size, crop_ratio):
    image = picture(*size)
    reference = create_transform(image_size, interpolation="bicubic", crop_pct=crop_ratio, normalize=False)(image)
    pixels = to_pixels(image, Preprocessing(image_size, crop_ratio))
    difference = pixels.permute(2, 0, 1).int() - reference.int()
    assert difference.abs().max() <= 1


def test_preprocess_parity_normalised_pixels_are_timms():
    image, preprocessing = picture(320, 240), Preprocessing()
    reference = create_transform(224, interpolation="bicubic", crop_pct=0.875)(image)
    normalised = normalise(to_pixels(image, preprocessing)[None], preprocessing)[0]
    torch.testing.assert_close(normalised, reference, atol=1.01 / 255 / min(preprocessing.std), rtol=0)


def test_normalise_gives_the_same_for_uint8_and_float_batches():
    pixels = next(image_like_batches(2, 32, batch_size=2))
    preprocessing = Preprocessing(32)
    from_float = normalise(runner_input(pixels, "float"), preprocessing)
    torch.testing.assert_close(normalise(pixels, preprocessing), from_float, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "LA", "1", "P"])
def test_odd_images_of_every_mode_become_pillows_rgb(mode):
    image = picture(32, 32).convert(mode)
    pixels = to_pixels(image, Preprocessing(32, 1.0))
    assert np.array_equal(pixels.numpy(), np.asarray(image.convert("RGB")))


def test_odd_images_with_palette_and_transparency_keep_their_colours(tmp_path):
    image = picture(64, 64).convert("P")
    image.save(tmp_path / "palette.png", transparency=bytes([0] * 128 + [255] * 128))
    pixels = to_pixels(load_image(tmp_path / "palette.png"), Preprocessing(64, 1.0))
    assert np.array_equal(pixels.numpy(), np.asarray(image.convert("RGB")))


def test_odd_images_of_16_bit_grey_keep_their_upper_byte(tmp_path):
    values = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = to_pixels(load_image(tmp_path / "deep.png"), Preprocessing(32, 1.0))
    assert np.array_equal(pixels[..., 1].numpy(), values >> 8)


def test_odd_images_too_long_and_thin_to_resize_are_refused():
    with pytest.raises(InputError, match="resized to 2560000x256"):
        to_pixels(Image.new("L", (10_000, 1)), Preprocessing(224))


def test_preprocessing_survives_its_dictionary():
    preprocessing = Preprocessing(96, 0.9, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing


@pytest.mark.parametrize(
    "values",
    [
        {"image_size": 100}, {"image_size": "big"}, {"crop_ratio": 0.0}, {"crop_ratio": 1.5}, {"interpolation": "box"},
        {"mean": [0.5, 0.5]}, {"mean": [0.5, 0.5, float("nan")]}, {"std": [0.2, 0.2, 0.0]}, {"resize": 256},
    ],
    ids=str,
)  # fmt: skip
def test_preprocessing_that_cannot_be_done_is_refused(values):
    with pytest.raises(InputError):
        Preprocessing.from_dict(values)


def test_the_four_formats_are_read_and_a_missing_file_is_refused_by_name(tmp_path):
    for suffix in ("jpg", "png", "webp", "bmp"):
        picture(40, 30).save(tmp_path / f"image.{suffix}")
        assert load_image(tmp_path / f"image.{suffix}").size == (40, 30)
    with pytest.raises(InputError, match=r"nowhere\.png"):
        load_image(tmp_path / "nowhere.png")


def test_a_cameras_multi_picture_jpeg_is_read_as_its_first_picture(tmp_path):
    first, second = Image.new("RGB", (40, 30), "white"), Image.new("RGB", (40, 30), "black")
    first.save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=[second])
    assert np.asarray(load_image(tmp_path / "camera.jpg")).min() > 250


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_disallowed_image_format_of_an_animation(tmp_path, suffix):
    path = tmp_path / f"moving.{suffix}"
    picture(40, 30).save(path, save_all=True, append_images=[picture(40, 30, seed=1)], duration=100)
    with pytest.raises(InputError, match="animation"):
        load_image(path)


def test_class_folders_are_split_by_the_same_share_of_each_class(tmp_path):
    dataset = find_dataset(write_classes(tmp_path, {"b": 10, "a": 20}), val_share=0.2)
    assert dataset.class_names == ("a", "b")
    assert (dataset.val.labels.count(0), dataset.val.labels.count(1)) == (4, 2)
    assert not set(dataset.val.paths) & set(dataset.train.paths)
    assert len(dataset.val.paths) + len(dataset.train.paths) == 30
    assert find_dataset(tmp_path, seed=3) == find_dataset(tmp_path, seed=3)
    assert find_dataset(tmp_path, seed=3).val != find_dataset(tmp_path, seed=4).val


@pytest.mark.parametrize("validation", ["val", "validation", "valid", "test", "Val"])
@pytest.mark.parametrize("training", ["train", "Train"])
def test_train_and_validation_folders_are_taken_as_they_are(tmp_path, training, validation):
    write_classes(tmp_path / training, {"a": 3, "b": 2})
    write_classes(tmp_path / validation, {"a": 1, "b": 2})
    if validation == "val":
        write_classes(tmp_path / "test", {"a": 1, "b": 1})  # val is taken before it
    dataset = find_dataset(tmp_path)
    assert (dataset.train.labels, dataset.val.labels) == ((0, 0, 0, 1, 1), (0, 1, 1))
    assert {path.parts[-3] for path in dataset.val.paths} == {validation}


def test_a_class_has_the_images_below_its_folder_at_any_depth_in_a_fixed_order(tmp_path):
    write_classes(tmp_path, {"a": 1, "a/2020": 2, "a/2020/may/first": 1, "b/deep": 2})
    images = find_images(tmp_path)
    assert images.class_names == ("a", "b")
    assert [path.relative_to(tmp_path).as_posix() for path in images.paths] == [
        "a/000.png", "a/2020/000.png", "a/2020/001.png", "a/2020/may/first/000.png", "b/deep/000.png", "b/deep/001.png",
    ]  # fmt: skip
    assert images.labels == (0, 0, 0, 0, 1, 1)


def test_suffixes_may_be_in_upper_case_and_other_files_are_no_images(tmp_path):
    write_classes(tmp_path, {"a": 2, "b": 1})
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "000.PNG")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "png").write_text("no suffix")
    assert [path.name for path in find_images(tmp_path).paths] == ["000.PNG", "001.png", "000.png"]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    write_classes(tmp_path, {"a": 1, "b": 1, ".thumbnails": 1, "a/.cache": 1})
    picture(8, 8).save(tmp_path / "a" / "._000.png")  # what a Mac leaves on other file systems
    images = find_images(tmp_path)
    assert (images.class_names, len(images)) == (("a", "b"), 2)
    loose = find_images(tmp_path / "b")
    assert (loose.class_names, loose.labels, loose.label(0)) == ((), (), -1)
    (tmp_path / "b" / "000.png").rename(tmp_path / "b" / ".000.png")
    with pytest.raises(InputError, match="no images for the class b"):
        find_images(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        find_dataset(tmp_path / "nowhere")


def test_links_to_folders_are_followed_once(tmp_path):
    write_classes(tmp_path / "classes", {"a": 1, "b": 1})
    write_classes(tmp_path / "elsewhere", {"more": 2})
    (tmp_path / "classes" / "a" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "classes" / "a" / "back").symlink_to(tmp_path / "classes" / "a")
    assert find_images(tmp_path / "classes").labels == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({}, "holds no images"),
        ({"a": 3}, "at least two"),
        ({"a": 3, "b": 0}, "no images for the class b"),
        ({"a": 3, "b": 1}, "class b has one image"),
        ({"train/a": 2, "train/b": 2}, "no val/"),
        ({"val/a": 2, "test/a": 2}, "has test, val but no folder train"),
        ({"train/a": 2, "train/b": 2, "val/a": 2, "val/c": 2}, "only one has b, c"),
    ],
    ids=str,
)
def test_a_folder_that_is_no_dataset_is_refused(tmp_path, folders, message):
    with pytest.raises(InputError, match=message):
        find_dataset(write_classes(tmp_path, folders))
