import dataclasses

import pytest
import torch
from PIL import Image

from cnx_deploy.data import Preprocessing, batches_from_folder, image_like_batches
from cnx_deploy.errors import CheckFailedError, InputError
from cnx_deploy.evaluation import evaluate
from cnx_deploy.model.deploy import DeploySpec
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner

NAMES = tuple("abcdefghij")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten classes of two images, 32 px."""
    root = tmp_path_factory.mktemp("classes")
    images = torch.cat(list(image_like_batches(20, 32, batch_size=20)))
    for index, image in enumerate(images):
        path = root / "val" / NAMES[index % 10] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(path)
    return root


@pytest.fixture
def runner(tiny_model):
    return reference_runner(tiny_model, DeploySpec(image_size=32))


def expected_ranks(model, folder) -> torch.Tensor:
    """Place of the label among the sorted logits, counted without the code under test."""
    pixels, labels, _ = next(batches_from_folder(folder, Preprocessing(32), 20))
    with torch.inference_mode():
        order = model(Preprocessing(32).normalise(pixels)).argsort(dim=1, descending=True)
    return (order == labels[:, None]).int().argmax(dim=1)


def test_top1_and_top5_are_those_of_sorted_logits(runner, tiny_model, folder):
    result = evaluate(runner, folder, Preprocessing(32))
    ranks = expected_ranks(tiny_model, folder)
    assert (result.count, result.correct_top1, result.correct_top5) == (20, (ranks == 0).sum(), (ranks < 5).sum())
    assert 0 < result.correct_top5 < 20
    assert result.top5_percent == 100 * result.correct_top5 / 20


def test_a_head_that_always_answers_one_class_is_right_on_that_class_only(tiny_model, folder):
    with torch.no_grad():
        tiny_model.head.weight.zero_()
        tiny_model.head.bias.copy_(torch.arange(10).flip(0))  # a first, j last
    result = evaluate(reference_runner(tiny_model, DeploySpec(image_size=32)), folder, Preprocessing(32))
    assert (result.top1_percent, result.top5_percent) == (10.0, 50.0)
    assert {each.name: (each.count, each.correct) for each in result.per_class} == {
        name: (2, 2 if name == "a" else 0) for name in NAMES
    }


def test_equal_logits_count_as_one_right_answer_not_ten(tiny_model, folder):
    with torch.no_grad():
        tiny_model.head.weight.zero_()
        tiny_model.head.bias.zero_()
    result = evaluate(reference_runner(tiny_model, DeploySpec(image_size=32)), folder, Preprocessing(32))
    assert (result.top1_percent, result.top5_percent) == (10.0, 50.0)


@pytest.mark.parametrize("batch_size", [1, 3, 20, 64])
def test_the_batch_size_does_not_change_the_result(runner, folder, batch_size):
    assert evaluate(runner, folder, Preprocessing(32), batch_size=batch_size) == evaluate(
        runner, folder, Preprocessing(32)
    )


def test_a_runner_of_one_fixed_batch_size_counts_every_image_once(runner, folder):
    free = evaluate(runner, folder, Preprocessing(32))
    runner.input_spec = dataclasses.replace(runner.input_spec, min_batch=8, max_batch=8)
    assert evaluate(runner, folder, Preprocessing(32), batch_size=64) == free


def test_uint8_and_float_runners_give_the_same_result(runner, tiny_model, folder):
    uint8 = deployed_runner(tiny_model, DeploySpec(image_size=32, input_kind="uint8"))
    assert evaluate(uint8, folder, Preprocessing(32)) == evaluate(runner, folder, Preprocessing(32))


def test_folders_are_matched_to_the_models_classes_by_name(tiny_model, folder):
    straight = evaluate(
        reference_runner(tiny_model, DeploySpec(image_size=32)), folder, Preprocessing(32), class_names=NAMES
    )
    with torch.no_grad():
        tiny_model.head.weight.copy_(tiny_model.head.weight.flip(0))
        tiny_model.head.bias.copy_(tiny_model.head.bias.flip(0))
    flipped = reference_runner(tiny_model, DeploySpec(image_size=32))
    assert evaluate(flipped, folder, Preprocessing(32), class_names=NAMES[::-1]) == straight
    assert evaluate(flipped, folder, Preprocessing(32), class_names=NAMES) != straight


def test_a_folder_the_model_does_not_know_is_refused(runner, folder):
    with pytest.raises(InputError, match=r"the classes j, which the model does not know"):
        evaluate(runner, folder, Preprocessing(32), class_names=(*NAMES[:-1], "z"))


def test_a_model_with_more_classes_than_folders_needs_their_names(runner, folder):
    root = folder.parent / "two"
    for name in "ab":
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(root / name / "0.png")
    with pytest.raises(InputError, match="10 classes, 2 were expected"):
        evaluate(runner, root, Preprocessing(32))
    assert evaluate(runner, root, Preprocessing(32), class_names=NAMES).count == 2


def test_images_without_labels_are_refused(runner, folder):
    with pytest.raises(InputError, match="without labels"):
        evaluate(runner, folder / "val" / "a", Preprocessing(32))


def test_another_image_size_than_the_runners_is_refused(runner, folder):
    with pytest.raises(InputError, match="32 pixels and the preprocessing makes 64"):
        evaluate(runner, folder, Preprocessing(64))


def test_logits_that_are_not_finite_fail(tiny_model, folder):
    with torch.no_grad():
        tiny_model.head.bias[3] = float("nan")
    broken = reference_runner(tiny_model, DeploySpec(image_size=32))
    with pytest.raises(CheckFailedError, match="not finite"):
        evaluate(broken, folder, Preprocessing(32))


def test_a_limit_evaluates_that_many_images_and_reports_them(runner, folder):
    told = []
    result = evaluate(
        runner,
        folder,
        Preprocessing(32),
        batch_size=4,
        limit=10,
        progress=lambda done, total: told.append((done, total)),
    )
    assert result.count == 10
    assert told == [(4, 10), (8, 10), (10, 10)]
    assert [each.count for each in result.per_class] == [1] * 10
