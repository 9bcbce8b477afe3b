"""What lies beside foreign weights, beside what timm and transformers themselves make of it."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg, save_for_hf
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from transformers import (
    BitImageProcessorPil,
    ConvNextImageProcessorPil,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ViTImageProcessorPil,
)

from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from cnx_deploy.core.variants import find_variant
from cnx_deploy.data.preprocessing import normalise, to_pixels
from cnx_deploy.model.checkpoint import ModelRequest, load_checkpoint
from cnx_deploy.model.pretrained import PRETRAINED_TAGS
from cnx_deploy.model.source_config import config_within, timm_config, transformers_processor
from tests.conftest import TINY_TEST
from tests.support.foreign_models import randomise, timm_model
from tests.support.pictures import smooth_pictures

NAMES = ["tench", "great white shark", "Küche", "naïve café"]
INDEX_OF_NAME = {name: NAMES.index(name) for name in sorted(NAMES)}
SIZES = ((300, 200), (201, 301), (64, 64), (77, 130), (500, 120), (50, 41), (96, 95), (640, 427), (33, 333), (256, 341),
         (129, 131), (31, 29))  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Of the smallest network, with four classes, as timm names them."""
    return timm_model(TINY_TEST, 4).state_dict()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return smooth_pictures(SIZES)


def test_every_published_tag_is_preprocessed_as_timm_does_it(pictures):
    compared: dict[Preprocessing, list[str]] = {}
    for tag in PRETRAINED_TAGS:
        written = get_pretrained_cfg(tag).to_dict(remove_source=True)
        read = timm_config({"architecture": tag.partition(".")[0], "pretrained_cfg": written}, "config.json")
        compared.setdefault(Preprocessing(**read.preprocessing), []).append(tag)
    for preprocessing, tags in compared.items():
        transform = create_transform(
            **resolve_data_config(pretrained_cfg=get_pretrained_cfg(tags[0]).to_dict()), normalize=False
        )
        for picture in pictures[:4]:
            difference = to_pixels(picture, preprocessing).permute(2, 0, 1).int() - transform(picture).int()
            assert int(difference.abs().max()) <= 1, tags
    assert sum(len(tags) for preprocessing, tags in compared.items() if preprocessing.crop_mode == "squash") == 6


SMALL = {"size": {"shortest_edge": 64}}
PROCESSORS: dict[str, Any] = {
    "convnext cropped": ConvNextImageProcessorPil(**SMALL),
    "convnext of an odd ratio": ConvNextImageProcessorPil(size={"shortest_edge": 96}, crop_pct=0.93, resample=2),
    "convnext squashed": ConvNextImageProcessorPil(size={"shortest_edge": 384}, image_mean=[0.4, 0.5, 0.6]),
    "without normalisation": ConvNextImageProcessorPil(**SMALL, do_normalize=False),
    "from -1 to 1": ConvNextImageProcessorPil(
        **SMALL, rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3
    ),
    "not rescaled": ConvNextImageProcessorPil(**SMALL, do_rescale=False, image_mean=[127.0] * 3, image_std=[64.0] * 3),
    "vit": ViTImageProcessorPil(size={"height": 96, "width": 96}),
    "not square": ViTImageProcessorPil(size={"height": 64, "width": 96}),
    "bit": BitImageProcessorPil(size={"shortest_edge": 74}, crop_size={"height": 64, "width": 64}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_normalised_as_the_processor_of_transformers_does_it(pictures, name, tmp_path):
    PROCESSORS[name].save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    preprocessing = Preprocessing(**transformers_processor(written, "preprocessor_config.json"))
    for picture in pictures:
        theirs = PROCESSORS[name](picture, return_tensors="pt")["pixel_values"][0]
        ours = normalise(to_pixels(picture, preprocessing)[None], preprocessing)[0]
        step = 1 / 255 / min(preprocessing.std)
        assert float((ours - theirs).abs().max()) <= 1.001 * step, picture.size


def test_a_configuration_of_timm_for_images_that_are_not_square_is_followed(pictures):
    written = {"input_size": (3, 64, 96), "crop_pct": 0.9, "interpolation": "bicubic"}
    for crop_mode in ("center", "squash", "border"):
        config = {"architecture": "convnextv2_atto", "pretrained_cfg": {**written, "crop_mode": crop_mode}}
        preprocessing = Preprocessing(**timm_config(config, "config.json").preprocessing)
        transform = create_transform(**resolve_data_config(pretrained_cfg=config["pretrained_cfg"]), normalize=False)
        for picture in pictures:
            difference = to_pixels(picture, preprocessing).permute(2, 0, 1).int() - transform(picture).int()
            assert int(difference.abs().max()) <= 1, (crop_mode, picture.size)


def test_a_changed_field_of_the_processor_changes_what_is_read():
    processor = PROCESSORS["convnext cropped"].to_dict()
    base = transformers_processor(processor, "x")
    for change in ({"crop_pct": 0.5}, {"resample": 0}, {"image_mean": [0.1] * 3}, {"size": {"shortest_edge": 96}},
                   {"do_normalize": False}, {"rescale_factor": 0.01}):  # fmt: skip
        assert transformers_processor({**processor, **change}, "x") != base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"do_pad": True}, "do_pad"),
        ({"size": {"longest_edge": 64}}, "longest_edge"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"resample": 9}, "resample 9"),
        ({"image_mean": []}, "a number for each channel"),
        ({"do_center_crop": True, "crop_size": 32}, "one size"),
    ],
)
def test_a_processor_that_cannot_be_followed_is_refused_by_its_field(change, message):
    with pytest.raises(InputError, match=message):
        transformers_processor({**PROCESSORS["convnext cropped"].to_dict(), **change}, "preprocessor_config.json")


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("transformers")
    labels = dict(enumerate(NAMES))
    config = ConvNextV2Config(
        depths=[2, 2, 6, 2], hidden_sizes=[40, 80, 160, 320], id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )  # fmt: skip
    model = randomise(ConvNextV2ForImageClassification(config).eval())
    model.save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 64}, image_mean=[0.5] * 3, image_std=[0.4] * 3).save_pretrained(
        folder
    )
    return folder, model


def test_a_folder_of_transformers_gives_weights_names_and_preprocessing(transformers_folder, pictures):
    folder, model = transformers_folder
    for path in (folder, folder / "model.safetensors"):
        loaded = load_checkpoint(path)
        assert loaded.class_names == tuple(NAMES)
        assert loaded.preprocessing == Preprocessing(64, 0.875, "bicubic", (0.5,) * 3, (0.4,) * 3, "center-floor")
        assert "assumed" not in loaded.origins.values()
        assert loaded.origins["mean"] == "preprocessor_config.json"
    pixels = torch.stack([to_pixels(picture, loaded.preprocessing) for picture in pictures[:2]])
    processor = ConvNextImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        ours = loaded.model(normalise(pixels, loaded.preprocessing))
        theirs = model(**processor(pictures[:2], return_tensors="pt")).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def test_a_folder_of_timm_gives_names_and_preprocessing(tmp_path):
    model = randomise(
        timm.create_model("convnextv2_atto", num_classes=4, pretrained_cfg_overlay={"crop_mode": "squash"})
    )
    save_for_hf(model, str(tmp_path), model_config={"num_classes": 4, "label_names": NAMES})
    loaded = load_checkpoint(tmp_path)
    assert loaded.class_names == tuple(NAMES)
    assert loaded.preprocessing.crop_mode == "squash"
    assert set(loaded.origins.values()) == {"config.json"}


def test_a_foreign_file_alone_says_nothing_and_every_field_is_assumed(tmp_path, weights):
    torch.save(weights, tmp_path / "model.pth")
    loaded = load_checkpoint(tmp_path / "model.pth")
    assert (loaded.preprocessing, loaded.class_names) == (Preprocessing(), None)
    assert set(loaded.origins.values()) == {"assumed"}
    assert "mean (0.485, 0.456, 0.406)" in (loaded.preprocessing.assumption(loaded.origins) or "")


def test_a_configuration_of_another_network_is_not_read(tmp_path, weights):
    torch.save(weights, tmp_path / "model.pth")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "id2label": {"0": "a"}}))
    assert set(load_checkpoint(tmp_path / "model.pth").origins.values()) == {"assumed"}


def test_names_for_another_number_of_classes_are_left_out_and_it_is_said(tmp_path):
    torch.save({"state_dict": timm_model(TINY_TEST, 5).state_dict(), "classes": NAMES}, tmp_path / "model.pth")
    loaded = load_checkpoint(tmp_path / "model.pth")
    assert loaded.class_names is None
    assert any("4 class names are left out" in note for note in loaded.notes)


def test_a_new_head_has_no_names_of_the_old_one(tmp_path, weights):
    torch.save({"state_dict": weights, "classes": NAMES}, tmp_path / "model.pth")
    assert load_checkpoint(tmp_path / "model.pth").class_names == tuple(NAMES)
    assert load_checkpoint(tmp_path / "model.pth", reset_head=True).class_names is None


def test_what_cannot_be_followed_stops_who_makes_images_and_not_who_reads_weights(tmp_path, weights):
    args = argparse.Namespace(crop_pct=1.2, interpolation="random")
    torch.save({"state_dict": weights, "args": args}, tmp_path / "model.pth")
    loaded = load_checkpoint(tmp_path / "model.pth")
    assert loaded.model.num_classes == 4
    with pytest.raises(InputError, match=r"crop_ratio must be in \(0, 1\], got 1\.2.*--crop-ratio"):
        loaded.told_of_images()
    told = ModelRequest(
        checkpoint=tmp_path / "model.pth", image_size=64, crop_ratio=0.9, crop_mode="center", interpolation="bicubic",
        mean=0.5, std=(0.2, 0.3, 0.4),
    )  # fmt: skip
    assert told.load(print)[1] == Preprocessing(64, 0.9, "bicubic", (0.5,) * 3, (0.2, 0.3, 0.4))


@pytest.mark.parametrize("values", [{"input_size": "x"}, {"input_size": (3, 8, 8)}, {"crop_pct": "much"}])
def test_odd_arguments_of_the_official_script_are_refused(values):
    args = argparse.Namespace(imagenet_default_mean_and_std=True, **values)
    with pytest.raises(InputError, match=r"image size|crop_pct"):
        config_within({"args": args}, "model.pth")


@pytest.mark.parametrize("change", [{"rescale_factor": 0}, {"rescale_factor": -1}, {"resample": 3.0}])
def test_values_of_a_processor_that_mean_nothing_are_refused(change):
    with pytest.raises(InputError, match=next(iter(change))):
        transformers_processor({**PROCESSORS["convnext cropped"].to_dict(), **change}, "preprocessor_config.json")


def test_entries_that_are_no_names_are_passed_over():
    entries = {"classes": 5, "class_names": None, "class_to_idx": INDEX_OF_NAME}
    assert config_within(entries, "model.pth").class_names == tuple(NAMES)
    assert config_within({"classes": {"train": 10, "val": 20}}, "model.pth").class_names is None


def test_the_arguments_of_timms_training_script_are_honoured():
    args = argparse.Namespace(model="convnextv2_atto", img_size=96, crop_pct=None, crop_mode="border", mean=[0.5] * 3,
                              std=None, interpolation="bilinear")  # fmt: skip
    read = config_within({"args": args}, "model.pth")
    assert read.preprocessing == {
        "image_size": 96,
        "crop_mode": "border",
        "interpolation": "bilinear",
        "mean": (0.5,) * 3,
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"input_size": 224, "crop_pct": None}, Preprocessing(224, 0.875)),
        ({"input_size": 384, "crop_pct": None}, Preprocessing(384, 1.0, crop_mode="squash")),
        ({"input_size": 256, "crop_pct": 0.9}, Preprocessing(256, 0.9)),
    ],
)  # fmt: skip
def test_the_arguments_of_the_official_script_are_honoured(values, expected):
    args = argparse.Namespace(imagenet_default_mean_and_std=True, **values)
    assert Preprocessing(**config_within({"args": args}, "x").preprocessing) == expected
    other = argparse.Namespace(imagenet_default_mean_and_std=False, **values)
    assert config_within({"args": other}, "x").preprocessing["mean"] == (0.5, 0.5, 0.5)
    assert (expected.mean, expected.std) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(
    ("resize", "crop", "interpolation"), [(256, 224, "bilinear"), (236, 224, "bicubic"), (73, 73, "bilinear")]
)
def test_the_arguments_of_torchvisions_script_make_the_pixels_of_its_preset(pictures, resize, crop, interpolation):
    args = argparse.Namespace(
        model="convnext_tiny", val_resize_size=resize, val_crop_size=crop, train_crop_size=176,
        interpolation=interpolation, model_ema=True, weights=None, mixup_alpha=0.2,
    )  # fmt: skip
    read = config_within({"args": args}, "checkpoint.pth")
    preprocessing = Preprocessing(**read.preprocessing)
    preset = Compose([Resize(resize, InterpolationMode(interpolation)), CenterCrop(crop), PILToTensor()])
    for picture in pictures[:6]:
        difference = to_pixels(picture, preprocessing).permute(2, 0, 1).int() - preset(picture).int()
        assert int(difference.abs().max()) <= 1, picture.size
    assert (preprocessing.mean, preprocessing.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert set(read.origins.values()) == {"the checkpoint's args"}
    assert len(read.origins) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_resize_size": 200}, "val_resize_size 200"), ({"val_crop_size": "224"}, "val_crop_size '224'"),
        ({"val_resize_size": None}, "val_resize_size None"),
    ],
)  # fmt: skip
def test_sizes_of_torchvisions_script_that_make_no_picture_are_refused_by_name(change, message):
    args = argparse.Namespace(**{"val_resize_size": 256, "val_crop_size": 224, **change})
    with pytest.raises(InputError, match=message):
        config_within({"args": args}, "checkpoint.pth")


@pytest.mark.parametrize(
    ("entries", "origin"),
    [
        ({"meta": {"dataset_meta": {"classes": tuple(NAMES)}}}, "meta.dataset_meta.classes"),
        ({"meta": {"CLASSES": NAMES}}, "meta.CLASSES"),
        ({"hyper_parameters": {"class_to_idx": INDEX_OF_NAME}}, "hyper_parameters.class_to_idx"),
        ({"hyper_parameters": {"id2label": dict(enumerate(NAMES))}}, "hyper_parameters.id2label"),
        ({"class_names": NAMES}, "class_names"),
    ],
)  # fmt: skip
def test_class_names_are_found_among_a_checkpoints_entries(entries, origin):
    read = config_within(entries, "model.pth")
    assert read.class_names == tuple(NAMES)
    assert read.origins == {"class_names": f"the checkpoint's {origin}"}


def test_classes_that_are_not_numbered_from_zero_are_refused():
    with pytest.raises(InputError, match="indices are not 0 to 1"):
        config_within({"class_to_idx": {"cat": 1, "dog": 2}}, "model.pth")


def test_a_configuration_that_is_no_json_is_corrupt(tmp_path, weights):
    torch.save(weights, tmp_path / "model.pth")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptArtifactError, match=r"config\.json"):
        load_checkpoint(tmp_path / "model.pth")


def test_a_licence_is_read_where_timms_configuration_states_it(tmp_path):
    torch.save(timm_model(find_variant("tiny-test")).state_dict(), tmp_path / "model.pth")
    assert "unknown" in load_checkpoint(tmp_path / "model.pth", "tiny-test").weights.licence
    for content, licence in (
        (
            {"architecture": "convnextv2_atto", "pretrained_cfg": {"license": "cc-by-nc-4.0"}},
            "cc-by-nc-4.0 (config.json)",
        ),
        ({"architecture": "convnextv2_atto", "license": "mit"}, "mit (config.json)"),
        ({"model_type": "bert", "license": "mit"}, None),
        ({"architecture": "convnextv2_atto", "pretrained_cfg": {"license": 3}}, None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        found = load_checkpoint(tmp_path / "model.pth", "tiny-test").weights.licence
        assert found == licence if licence else "unknown" in found
