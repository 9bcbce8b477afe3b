import csv
import dataclasses
import shutil

import pytest
import torch
from PIL import Image

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CheckFailedError, InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import batches_from_folder, image_like_batches
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from cnx_deploy.verification.evaluation import Evaluation, PredictionWriter, evaluate

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


def counts(result: Evaluation):
    """What rounding does not change where no two logits are equal."""
    return result.count, result.correct_top1, result.correct_top5, result.per_class, set(result.confusion)


def expected_ranks(model, folder) -> torch.Tensor:
    """Place of the label among the sorted logits, counted without the code under test."""
    pixels, labels, _ = next(batches_from_folder(folder, Preprocessing(32), 20))
    with torch.inference_mode():
        order = model(normalise(pixels, Preprocessing(32))).argsort(dim=1, descending=True)
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
    found = evaluate(runner, folder, Preprocessing(32), batch_size=batch_size)
    usual = evaluate(runner, folder, Preprocessing(32))
    assert counts(found) == counts(usual)
    assert [each.path for each in found.worst] == [each.path for each in usual.worst]
    assert found.mean_nll == pytest.approx(usual.mean_nll, rel=1e-6)
    assert found.calibration.expected_error == pytest.approx(usual.calibration.expected_error, rel=1e-6)


def test_a_runner_of_one_fixed_batch_size_counts_every_image_once(runner, folder):
    free = evaluate(runner, folder, Preprocessing(32))
    runner.input_spec = dataclasses.replace(runner.input_spec, min_batch=8, max_batch=8)
    fixed = evaluate(runner, folder, Preprocessing(32), batch_size=64)
    assert counts(fixed) == counts(free)
    assert sum(each.count for each in fixed.calibration.bins) == 20


def test_uint8_and_float_runners_give_the_same_result(runner, tiny_model, folder):
    uint8 = deployed_runner(tiny_model, DeploySpec(image_size=32, input_kind="uint8"))
    assert counts(evaluate(uint8, folder, Preprocessing(32))) == counts(evaluate(runner, folder, Preprocessing(32)))


def test_folders_are_matched_to_the_models_classes_by_name(tiny_model, folder):
    straight = evaluate(
        reference_runner(tiny_model, DeploySpec(image_size=32)), folder, Preprocessing(32), class_names=NAMES
    )
    with torch.no_grad():
        tiny_model.head.weight.copy_(tiny_model.head.weight.flip(0))
        tiny_model.head.bias.copy_(tiny_model.head.bias.flip(0))
    flipped = reference_runner(tiny_model, DeploySpec(image_size=32))
    named = evaluate(flipped, folder, Preprocessing(32), class_names=NAMES[::-1])
    assert counts(named) == counts(straight)
    assert [each.name for each in named.per_class] == list(NAMES)
    assert counts(evaluate(flipped, folder, Preprocessing(32), class_names=NAMES)) != counts(straight)


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
    found = evaluate(runner, root, Preprocessing(32), class_names=NAMES)
    assert (found.count, [each.name for each in found.per_class]) == (2, ["a", "b"])
    assert sum(cell.count for cell in found.confusion) == 2


def test_images_without_labels_are_refused(runner, folder):
    with pytest.raises(InputError, match="without labels"):
        evaluate(runner, folder / "val" / "a", Preprocessing(32))


def test_another_image_size_than_the_runners_is_refused(runner, folder):
    with pytest.raises(InputError, match="32 pixels and the preprocessing makes 64"):
        evaluate(runner, folder, Preprocessing(64))


def test_nan_inf_input_whose_logits_are_not_finite_fails_an_evaluation(tiny_model, folder):
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


def test_dataset_bad_files_are_named_by_an_evaluation(runner, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    broken = tmp_path / "copy" / "val" / "c" / "2.png"
    broken.write_bytes(broken.read_bytes()[:100])
    told = []
    found = evaluate(
        runner,
        tmp_path / "copy",
        Preprocessing(32),
        batch_size=4,
        progress=lambda done, total: told.append((done, total)),
    )
    assert (found.count, [image.path for image in found.broken]) == (19, [str(broken)])
    assert "cannot be read" in found.broken[0].reason
    assert {each.name: each.count for each in found.per_class} == {name: 1 if name == "c" else 2 for name in NAMES}
    assert told[-1] == (20, 20)
    found = evaluate(runner, tmp_path / "copy", Preprocessing(32), batch_size=1)  # a batch of none but the broken one
    assert (found.count, len(found.broken)) == (19, 1)


def test_a_folder_of_broken_images_alone_is_refused(runner, tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_text("no image")
    with pytest.raises(InputError, match=r"No image of .* \(10\) can be read: .*a/0\.png"):
        evaluate(runner, tmp_path, Preprocessing(32))


def test_a_csv_file_is_evaluated_on_its_validation_rows_as_a_folder_of_them_is(runner, folder):
    paths = sorted((folder / "val").glob("*/*.png"))
    rows = [f"{path.relative_to(folder).as_posix()},{path.parent.name},val" for path in paths]
    extra = Image.new("RGB", (32, 32))
    extra.save(folder / "extra.png")
    (folder / "data.csv").write_text("\n".join(["path,label,split", *rows, "extra.png,a,train"]))
    from_file = evaluate(runner, folder / "data.csv", Preprocessing(32))
    assert counts(from_file) == counts(evaluate(runner, folder, Preprocessing(32)))


def test_every_outcome_is_told_in_order_and_written(runner, folder, tmp_path):
    with PredictionWriter(tmp_path / "out" / "predictions.csv", folder) as writer:
        found = evaluate(runner, folder, Preprocessing(32), class_names=NAMES, batch_size=7, each=writer.add)
    with (tmp_path / "out" / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["path"] for row in rows] == [str(path) for path in sorted((folder / "val").glob("*/*.png"))]
    assert all(row["label"] == row["path"].split("/")[-2] for row in rows)
    assert sum(row["predicted"] == row["label"] for row in rows) == found.correct_top1
    best = [[row["predicted"], *(row[f"predicted_{place}"] for place in range(2, 6))] for row in rows]
    assert sum(row["label"] in names for row, names in zip(rows, best, strict=True)) == found.correct_top5
    confidences = [[float(row["confidence"]), *(float(row[f"confidence_{n}"]) for n in range(2, 6))] for row in rows]
    assert all(1 > sum(row) > 0.5 and row == sorted(row, reverse=True) for row in confidences)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.csv"]


def test_predictions_of_an_evaluation_that_fails_leave_what_was_there(tmp_path):
    target = tmp_path / "predictions.csv"
    target.write_text("before")
    with pytest.raises(InputError), PredictionWriter(target, tmp_path):
        raise InputError("stop")
    assert (target.read_text(), len(list(tmp_path.iterdir()))) == ("before", 1)


def test_predictions_over_the_data_itself_or_under_another_suffix_are_refused(tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("path,label\n")
    with pytest.raises(InputError, match="the data itself"):
        PredictionWriter(tmp_path / "." / "data.csv", data)
    with pytest.raises(InputError, match=r"suffix \.csv"):
        PredictionWriter(tmp_path / "data.txt", data)


def test_a_reference_runs_on_the_device_of_its_model(tiny_model):
    # No GPU: torch's device of shapes without data refuses operands on two devices as a GPU does.
    moved = reference_runner(tiny_model.to("meta"), DeploySpec(image_size=32))
    logits = moved.run(torch.empty(2, 3, 32, 32, device="meta"))
    assert (logits.device.type, logits.shape) == ("meta", (2, 10))
