import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import create_transform

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import find_dataset, find_images, image_like_batches, runner_input
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


def test_odd_images_too_long_and_thin_to_resize_are_refused():
    with pytest.raises(InputError, match="resized to 2560000x256"):
        to_pixels(Image.new("L", (10_000, 1)), Preprocessing(224))


def test_preprocessing_survives_its_dictionary():
    preprocessing = Preprocessing(96, 0.9, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing
    bright = dataclasses.replace(preprocessing, white_level=4095)
    assert Preprocessing.from_dict(bright.to_dict()) == bright
    assert bright.to_dict().keys() - preprocessing.to_dict().keys() == {"white_level"}  # else written bytes would move


@pytest.mark.parametrize(
    "values",
    [
        {"image_size": 16}, {"image_size": [64, 16]}, {"image_size": "big"}, {"crop_ratio": 0.0}, {"crop_ratio": 1.5},
        {"white_level": 0}, {"white_level": -1.0}, {"white_level": float("inf")}, {"white_level": "white"},
        {"interpolation": "random"}, {"crop_mode": "stretch"},
        {"mean": [0.5, 0.5]}, {"mean": [0.5, 0.5, float("nan")]}, {"std": [0.2, 0.2, 0.0]}, {"resize": 256},
    ],
    ids=str,
)  # fmt: skip
def test_preprocessing_that_cannot_be_done_is_refused(values):
    with pytest.raises(InputError):
        Preprocessing.from_dict(values)


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


def test_what_is_no_image_is_counted_by_kind_and_what_is_one_is_taken_whatever_its_name(tmp_path):
    write_classes(tmp_path, {"a": 4, "b": 1, "c/deep": 1})
    for old, new in (("000.png", "000.PNG"), ("001.png", "001"), ("002.png", "002.xyz")):
        (tmp_path / "a" / old).rename(tmp_path / "a" / new)
    for name in ("notes.txt", "more.TXT", "png", "Python says hello", ".hidden", ".DS_Store", "._000.png", "Thumbs.db"):
        (tmp_path / "a" / name).write_text("P3 is no image")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "c" / "deep" / "film.mp4").write_bytes(bytes(64))
    (tmp_path / "read me").write_text("beside")
    images = find_images(tmp_path)
    assert [path.name for path in images.paths] == ["000.PNG", "001", "002.xyz", "003.png", "000.png", "000.png"]
    first, second, third = images.notes
    assert first.startswith(f"{tmp_path / 'a'}: 6 of 10 files left out: ")
    for kind in ("2 .txt (more.TXT)", "2 without suffix (Python says hello)", "1 hidden (.hidden)", "1 no plain file"):
        assert kind in first
    assert second == f"{tmp_path / 'c'}: 1 of 2 files left out: 1 .mp4 (film.mp4)."
    assert "beside its class folders: 1 of 1 files left out: 1 without suffix (read me)" in third


def test_many_folders_with_files_left_out_are_summed_up_in_one_line(tmp_path):
    write_classes(tmp_path, {f"{index:02}": 2 for index in range(12)})
    for folder in tmp_path.iterdir():
        (folder / "label.txt").write_text("1")
    (note,) = find_images(tmp_path).notes
    assert note == f"12 folders of {tmp_path}: 12 of 36 files left out: 12 .txt (00/label.txt)."


def test_hidden_files_and_folders_are_left_out(tmp_path):
    write_classes(tmp_path, {"a": 1, "b": 1, ".thumbnails": 1, "a/.cache": 1})
    picture(8, 8).save(tmp_path / "a" / "._000.png")  # what a Mac leaves on other file systems
    images = find_images(tmp_path)
    assert (images.class_names, len(images)) == (("a", "b"), 2)
    loose = find_images(tmp_path / "b")
    assert (loose.class_names, loose.labels, loose.label(0)) == ((), (), -1)
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
        ({"a": 3, "b": 0}, "images of 1 class; a classifier needs at least two"),
        ({"a": 1, "b": 1}, "None of the 2 classes has two images"),
        ({"train/a": 2, "train/b": 2}, "no val/"),
        ({"train/a": 2, "train/b": 2, "val": 2}, "val has 0 class folders"),
        ({"train/a": 2, "train/b": 2, "val/a": 0}, "val holds no images"),
        ({"val/a": 2, "test/a": 2}, "has test, val but no folder train"),
        ({"train/a": 2, "train/b": 2, "val/a": 2, "val/c": 2}, "val/ has the classes c, of which train/ has no images"),
        ({"train/a": 2, "train/b": 2, "val/a": 2, "val/c": 0}, "val/ has the classes c, of which train/ has no images"),
        ({"train/a": 2, "train/b": 2, "train/c": 0, "val/c": 2}, "the classes c, of which train/ has no images"),
    ],
    ids=str,
)
def test_a_folder_that_is_no_dataset_is_refused(tmp_path, folders, message):
    with pytest.raises(InputError, match=message):
        find_dataset(write_classes(tmp_path, folders))


# --- a class without images ------------------------------------------------------------------------------------------


def labels_by_folder(images):
    """The name that each image's label stands for, and the name of the folder it lies in."""
    names = [images.class_names[label] for label in images.labels]
    return set(zip(names, [path.parent.name for path in images.paths], strict=True))


def test_a_class_without_validation_images_keeps_its_place_among_the_others(tmp_path):
    write_classes(tmp_path, {**{f"train/{name}": 2 for name in "abcde"}, **{f"val/{name}": 1 for name in "abde"}})
    dataset = find_dataset(tmp_path)
    for images in (dataset.train, dataset.val, find_images(tmp_path)):
        assert images.class_names == tuple("abcde")
        assert all(name == folder for name, folder in labels_by_folder(images))
    assert dataset.val.labels == find_images(tmp_path).labels == (0, 1, 3, 4)
    (note,) = dataset.notes
    assert note.startswith("1 class has no validation images: c.")
    assert any("1 class has no images in" in note and note.count(": c.") for note in find_images(tmp_path).notes)
    alone = find_images(tmp_path / "val")  # what lies beside a folder that is named is not looked at
    assert alone.class_names == tuple("abde")


def test_an_empty_class_folder_is_a_class_of_which_nothing_is_learned(tmp_path):
    write_classes(tmp_path, {"a": 4, "b": 0, "c": 4, "d": 1})
    dataset = find_dataset(tmp_path)
    assert dataset.class_names == dataset.val.class_names == tuple("abcd")
    assert (set(dataset.train.labels), set(dataset.val.labels)) == ({0, 2, 3}, {0, 2})
    nothing, unmeasured = dataset.notes
    assert "1 class has no images, so that nothing is learned of them: b" in nothing
    assert "1 class has no validation images: d" in unmeasured
    assert (find_images(tmp_path).class_names, set(find_images(tmp_path).labels)) == (tuple("abcd"), {0, 2, 3})
    assert len(find_images(tmp_path).notes) == 1


def test_sound_folders_have_nothing_to_be_noted(tmp_path):
    write_classes(tmp_path, {f"{side}/{name}": 2 for side in ("train", "val") for name in "ab"})
    assert find_dataset(tmp_path).notes == find_images(tmp_path).notes == find_images(tmp_path).observed() == ()


def test_a_folder_of_training_images_alone_is_nothing_to_evaluate_on(tmp_path):
    with pytest.raises(InputError, match="nothing to evaluate on"):
        find_images(write_classes(tmp_path, {"train/a": 1, "train/b": 1}))
