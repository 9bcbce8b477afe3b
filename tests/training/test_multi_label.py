"""Several labels an image are learned, measured and given thresholds that the weights keep."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from cnx_deploy.core.errors import CheckpointError, InputError
from cnx_deploy.data import find_dataset
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.training import TrainingSpec, balance_lines, initial_model, spec_from_recipe, train
from cnx_deploy.training.multi_label import MultiLabelModule
from tests.support.labelled_digits import write_digits
from tests.support.training_data import InterruptIn, difference, rows, table
from tests.training.test_runs import words_for

MULTI = {
    "task": "multi-label",
    "image_size": 32,
    "batch_size": 30,
    "min_crop_area": 1.0,
    "crop_ratio": 1.0,
    "flip": False,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def spec(digits, tiny_variant, tmp_path) -> TrainingSpec:
    return spec_from_recipe(digits, tiny_variant, output_dir=tmp_path / "runs", epochs=1, **MULTI)


@pytest.fixture(scope="module")
def run(digits, tiny_variant, tmp_path_factory):
    """Enough epochs to learn something, with a moving average."""
    words = {**MULTI, "epochs": 8, "learning_rate": 5e-3, "ema_decay": 0.9, "loss": "asymmetric"}
    return train(spec_from_recipe(digits, tiny_variant, output_dir=tmp_path_factory.mktemp("runs"), **words))


def scores_of(checkpoint, digits):
    """Probabilities and labels of the validation images, computed plainly."""
    loaded, val = load_checkpoint(checkpoint), find_dataset(digits, multi_label=True).val
    made = loaded.preprocessing
    pixels = torch.stack([val.pixels(at, made) for at in range(len(val))]).permute(0, 3, 1, 2) / 255.0
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (made.mean, made.std))
    with torch.inference_mode():
        logits = loaded.model.forward_outputs((pixels - mean) / std, ("logits",))["logits"]
    return logits.sigmoid().double().numpy(), torch.stack([val.target(at) for at in range(len(val))]).numpy()


def test_several_labels_are_learned_and_the_weights_keep_thresholds_and_names(run, digits):
    epochs = rows(run.run_dir)
    assert float(epochs[-1]["train_loss"]) < float(epochs[0]["train_loss"])
    assert run.best_map_percent > 85 > 100 * np.mean([0.5, 0.3, 0.4, 0.4])
    for name, column in (("best", "val_map_percent"), ("best-ema", "ema_val_map_percent")):
        loaded = load_checkpoint(run.run_dir / f"{name}.safetensors")
        assert (loaded.model.task.name, loaded.class_names) == ("multi-label", ("above six", "even", "hole", "prime"))
        scores, labels = scores_of(run.run_dir / f"{name}.safetensors", digits)
        best = max(epochs, key=lambda row: (float(row[column]), -float(row[column.replace("map_percent", "loss")])))
        found = 100 * sk.average_precision_score(labels, scores)
        assert found == pytest.approx(float(best[column]), abs=0.01)
        given = scores >= np.array(loaded.model.task.thresholds)
        assert 100 * sk.f1_score(labels, given, average="micro") == pytest.approx(
            float(best[column.replace("map", "f1")]), abs=0.01
        )
        for at in range(4):
            precision, recall, _ = sk.precision_recall_curve(labels[:, at], scores[:, at])
            best_f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-9)).max()
            assert sk.f1_score(labels[:, at], given[:, at]) >= best_f1 - 1e-9
    assert len(set(load_checkpoint(run.best).model.task.thresholds)) == 4


def test_a_request_for_several_labels_stands_otherwise_than_one_for_classes(spec, digits, tiny_variant):
    assert (spec.loss, spec.label_smoothing) == ("bce", 0.0)
    fine = spec_from_recipe(digits, "tiny", "fine-tune", task="multi-label", label_smoothing=0.05)
    assert (fine.label_smoothing, fine.mixup_alpha) == (0.05, 0.8)
    assert spec_from_recipe(digits, tiny_variant).to_dict().keys().isdisjoint({"task", "gamma_neg", "negative_clip"})
    resolved = dataclasses.replace(spec, loss="asymmetric", gamma_pos=0.0).resolved()
    assert [resolved[name] for name in ("gamma_neg", "gamma_pos", "negative_clip")] == [4.0, 0.0, 0.05]
    for change, message in (
        ({"loss": "cross-entropy"}, "trained with the loss bce or asymmetric, not with cross-entropy"),
        ({"gamma_neg": 2.0}, "gamma_neg is 2.0 and the loss is bce"),
        ({"loss": "asymmetric", "negative_clip": 1.0}, r"negative_clip must be in \[0, 1\)"),
        ({"loss": "asymmetric", "gamma_neg": -1.0}, "gamma_neg must be at least 0"),
        ({"sampling": "balanced"}, "an image of the task multi-label has several labels"),
        ({"task": "classification"}, "trained with the loss cross-entropy or focal, not with bce"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(spec, **change)


def module_of(spec: TrainingSpec, **changes) -> MultiLabelModule:
    model = random_model(spec.network, 4, seed=3, task="multi-label")
    return MultiLabelModule(model, dataclasses.replace(spec, **changes), 8, {})


@pytest.mark.parametrize(
    "change",
    [{"loss": "asymmetric"}, {"loss": "asymmetric", "gamma_pos": 3.0}, {"loss": "asymmetric", "negative_clip": 0.4},
     {"label_smoothing": 0.2}, {"mixup_alpha": 5.0}, {"cutmix_alpha": 5.0}],
    ids=str,
)  # fmt: skip
def test_each_option_of_the_loss_changes_what_is_learned(spec, change):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 32, 32, 3), generator=generator, dtype=torch.uint8)
    batch = (pixels, torch.randint(0, 2, (8, 4), generator=generator).float())

    def loss(**changes) -> float:
        torch.manual_seed(0)
        return float(module_of(spec, **changes).training_step(batch, 0).detach())

    assert abs(loss() - loss(**change)) > 1e-3
    assert loss() == loss()
    module = module_of(spec)
    logits = module.model.forward_outputs(module.network_input(pixels), ("logits",))["logits"]
    expected = (
        torch.nn.functional.binary_cross_entropy_with_logits(logits, batch[1], reduction="none").sum(dim=1).mean()
    )
    assert loss() == pytest.approx(float(expected.detach()), rel=1e-5)


def test_balanced_weights_are_negatives_to_positives_of_each_label_up_to_a_limit(spec, digits):
    balanced = dataclasses.replace(spec, class_weights="balanced")
    dataset = find_dataset(digits, multi_label=True)
    result = train(balanced, dataset=dataset)
    held = torch.stack([dataset.train.target(at) for at in range(len(dataset.train))])
    expected = ((len(held) - held.sum(dim=0)) / held.sum(dim=0)).tolist()
    written = json.loads((result.run_dir / "run.json").read_text())["weight_by_class"]
    assert list(written.values()) == pytest.approx(expected)
    assert load_checkpoint(result.last).training == {"class_weights": "balanced", "loss": "bce"}
    rare = dataclasses.replace(
        dataset.train, label_sets=((0,), *((1,),) * (len(dataset.train) - 1)), class_names=("a", "b", "c", "d")
    )
    (line,) = balance_lines(balanced, dataclasses.replace(dataset, train=rare))
    assert "to 100, the limit, for 1 of 4 labels" in line
    assert not list(balance_lines(spec, dataset))


def test_weights_of_a_classifier_start_several_labels_with_a_head_of_their_own(spec, tiny_variant, tmp_path):
    path = save_checkpoint(tmp_path / "classifier.safetensors", random_model(tiny_variant, 10))
    with pytest.raises(CheckpointError, match="has 10 classes, and 4 were asked for"):
        initial_model(spec, checkpoint=path)
    loaded = initial_model(spec, init=path)
    assert (loaded.model.task.name, loaded.head_is_new) == ("multi-label", True)
    with pytest.raises(CheckpointError, match="of the task classification, and multi-label is to be trained"):
        train(spec, random_model(tiny_variant, 4))
    result = train(spec, loaded)
    kept = load_checkpoint(result.last).model
    assert difference(kept.stages[0].state_dict(), loaded.model.stages[0].state_dict()) < 0.1


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(spec):
    two = dataclasses.replace(spec, epochs=2)
    whole = train(two)
    part = train(dataclasses.replace(two, run_dir=spec.output_dir / "part"), progress=InterruptIn(2))
    assert part.interrupted
    resumed = train(dataclasses.replace(two, run_dir=part.run_dir, resume=True))
    assert difference(whole.last, resumed.last) == 0.0
    assert table(whole.run_dir) == table(resumed.run_dir)


def test_headers_with_thresholds_that_are_none_are_refused(tiny_variant, tmp_path):
    model = random_model(tiny_variant, 4, task="multi-label")
    kept = save_checkpoint(tmp_path / "kept.safetensors", model, thresholds=[0.1, 0.2, 0.3, 0.4])
    assert load_checkpoint(kept).model.task.thresholds == (0.1, 0.2, 0.3, 0.4)
    again = save_checkpoint(tmp_path / "again.safetensors", load_checkpoint(kept).model)
    assert again.read_bytes() == kept.read_bytes()
    assert load_checkpoint(kept, num_classes=3, reset_head=True).model.task.thresholds is None
    assert load_checkpoint(save_checkpoint(tmp_path / "plain.safetensors", model)).model.task.thresholds is None
    for wrong in ([0.5] * 3, [0.0, 0.5, 0.5, 0.5], [1.5] * 4):
        path = save_checkpoint(tmp_path / "wrong.safetensors", model, thresholds=wrong)
        with pytest.raises(Exception, match="thresholds that are not one probability a label"):
            load_checkpoint(path)


@pytest.mark.slow
def test_two_processes_learn_and_measure_what_one_does(spec, tmp_path):
    """25 validation images: one process has one more than the other."""
    sgd = {"optimizer": "sgd", "learning_rate": 0.05, "ema_decay": 0.9, "epochs": 2, "batch_size": 24}
    spec = dataclasses.replace(spec, data=write_digits(tmp_path / "digits", count=100), **sgd)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command, name in (([sys.executable], "one"), (torchrun, "two")):
        words = [*command, *words_for(dataclasses.replace(spec, run_dir=tmp_path / name), tmp_path)]
        subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)
    for first, second in zip(table(tmp_path / "one"), table(tmp_path / "two"), strict=True):
        assert [float(value) for value in second.values()] == pytest.approx(list(map(float, first.values())), rel=1e-3)
    one, two = (load_checkpoint(tmp_path / name / "last.safetensors").model.task.thresholds for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)
