"""Classes of uneven size: weights in the loss, balanced sampling and the focal loss, and what a run records of them."""

import json
from collections import Counter
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

import cnx_deploy as cnx
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.manifest import manifest_from_json
from cnx_deploy.data import find_dataset
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.checkpoint import load_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.training import Launch, TrainingRecord, TrainingSpec, balance_lines, train
from cnx_deploy.training.class_balance import class_weights, named_weights
from cnx_deploy.training.classifier import ClassificationModule
from cnx_deploy.training.distributed import EpochBatches
from cnx_deploy.training.spec import LATER_FIELDS
from tests.support.training_data import InterruptIn, difference, rows, table

NAMES = ("cat", "dog", "eel", "fox")
LABELS = [0] * 12 + [1] * 3 + [3]  # no eel


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    """48 dark and 6 light images of grey noise whose levels overlap, and 20 and 8 for validation. Shared."""
    root, draw = tmp_path_factory.mktemp("shades"), np.random.default_rng(0)
    for split, name, level, count in (
        ("train", "dark", 110, 48), ("train", "light", 135, 6), ("val", "dark", 110, 20), ("val", "light", 135, 8),
    ):  # fmt: skip
        folder = root / split / name
        folder.mkdir(parents=True)
        for index in range(count):  # levels at equal steps of probability
            grey = NormalDist(level, 20).inv_cdf((index + 0.5) / count)
            pixels = draw.normal(grey, 10, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture
def spec(shades, tiny_variant, tmp_path):
    return TrainingSpec(shades, tiny_variant, tmp_path / "runs", epochs=4, image_size=32, batch_size=9)


def of(**changes) -> TrainingSpec:
    return TrainingSpec("images", "atto", **changes)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_balanced_weights_are_scikit_learns_and_a_class_without_images_has_none():
    present = np.unique(LABELS)
    expected = dict(zip(present, compute_class_weight("balanced", classes=present, y=LABELS), strict=True))
    weights = class_weights(of(class_weights="balanced"), NAMES, LABELS)
    assert weights == pytest.approx([expected.get(at, 0.0) for at in range(4)])
    assert np.mean([weights[label] for label in LABELS]) == pytest.approx(1.0)
    assert class_weights(of(), NAMES, LABELS) is None


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_given_weights_count_by_their_ratio_with_a_mean_of_one_over_the_images_drawn(factor):
    given = {name: factor * weight for name, weight in zip(NAMES, (1, 2, 5, 6), strict=True)}
    weights = class_weights(of(class_weights=given), NAMES, LABELS)
    assert np.array(weights) / weights[0] == pytest.approx([1, 2, 5, 6])
    assert np.mean([weights[label] for label in LABELS]) == pytest.approx(1.0)
    drawn = class_weights(of(class_weights=given, sampling="balanced"), NAMES, LABELS)
    assert np.mean([drawn[at] for at in (0, 1, 3)]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "cat=1\ndog = 2.5\n\na=b=3\n"),
        ("a.csv", 'class,weight\ncat,1\ndog,2.5\n"a=b",3\n'),
        ("a.csv", "\ufeffcat,1\r\ndog,2.5\r\na=b,3\r\n"),
        ("a.json", '{"cat": 1, "dog": 2.5, "a=b": 3}'),
    ],
)
def test_a_file_of_weights_is_read(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert named_weights(tmp_path / name) == {"cat": 1.0, "dog": 2.5, "a=b": 3.0}
    assert of(class_weights=str(tmp_path / name)).class_weights == {"cat": 1.0, "dog": 2.5, "a=b": 3.0}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("absent.txt", None, "cannot be read as class weights"),
        ("a.txt", b"cat 1\n", "Expected is one of none, balanced, or a file: lines NAME=WEIGHT"),
        ("a.txt", b"cat=1\ncat=2\n", "a class is there twice"),
        ("a.txt", b"cat=\xff\n", "cannot be read"),
        ("a.txt", b"cat=nan\n", "finite numbers of at least 0, got nan for 'cat'"),
        ("a.txt", b"cat=-1\n", "got -1.0 for 'cat'"),
        ("a.csv", b"cat,1,2\n", "cannot be read"),
        ("a.json", b'{"cat": "1"}', "cannot be read"),
        ("a.json", b'{"cat": 1, "cat": 2}', "cannot be read"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason):
        named_weights(tmp_path / name)


def test_weights_of_other_classes_or_of_none_are_refused():
    with pytest.raises(InputError, match="they lack eel, fox and also have cow"):
        class_weights(of(class_weights={"cat": 1.0, "dog": 1.0, "cow": 1.0}), NAMES, LABELS)
    with pytest.raises(InputError, match="0 for every class"):
        class_weights(of(class_weights={"cat": 0, "dog": 0, "eel": 1, "fox": 0}), NAMES, LABELS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"class_weights": "balanced", "sampling": "balanced"}, "both balanced: either alone"),
        ({"class_weights": "even"}, "'even' cannot be read as class weights"),
        ({"class_weights": {"cat": True}}, "got True for 'cat'"),
        ({"focal_gamma": 2.0}, "Add --loss focal"),
        ({"loss": "focal", "focal_gamma": -1.0}, "focal_gamma must be at least 0"),
        ({"loss": "hinge"}, "cross-entropy, focal"),
        ({"sampling": "even"}, "shuffle, balanced"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_or_are_none_are_refused(change, reason):
    with pytest.raises(InputError, match=reason):
        of(**change)


# --- in the loss of a step --------------------------------------------------------------------------------------------

LARGE_BATCH = (
    torch.randint(0, 256, (12, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
    torch.tensor([0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0]),
)
WEIGHTS = (0.6, 3.0)


def module_of(tiny_variant, **changes) -> ClassificationModule:
    spec = TrainingSpec("images", tiny_variant, image_size=32, **{"batch_size": 12, **changes})
    weights = WEIGHTS if spec.class_weights != "none" else None
    labels = LARGE_BATCH[1].tolist()
    return ClassificationModule(random_model(tiny_variant, 2, seed=3), spec, 12, {}, labels=labels, weights=weights)


def step_loss(module: ClassificationModule, images: slice = slice(None), number: int = 0) -> float:
    torch.manual_seed(0)
    return float(module.training_step(tuple(part[images] for part in LARGE_BATCH), number).detach())


def test_a_step_over_batches_and_processes_weighs_each_image_as_one_large_batch_does(tiny_variant):
    given = {"class_weights": "balanced", "loss": "focal"}
    whole = step_loss(module_of(tiny_variant, **given))
    batches = module_of(tiny_variant, batch_size=4, accumulate=3, **given)
    parts = [step_loss(batches, slice(4 * at, 4 * at + 4), at) for at in range(3)]
    assert sum(parts) / 3 == pytest.approx(whole, rel=1e-5)  # Lightning's division
    ranks = [module_of(tiny_variant, batch_size=6, launch=Launch(rank, 2), **given) for rank in range(2)]
    dealt = [step_loss(module, slice(rank, None, 2)) for rank, module in enumerate(ranks)]
    assert sum(dealt) / 2 == pytest.approx(whole, rel=1e-5)  # DDP's mean
    # torch's mean for classes divides by the weights of its own batch.
    module = module_of(tiny_variant)
    logits = module.model(module.network_input(LARGE_BATCH[0])).detach()
    pairs = [(logits, LARGE_BATCH[1]), *zip(logits.split(4), LARGE_BATCH[1].split(4), strict=True)]
    joint, *means = (float(F.cross_entropy(*pair, torch.tensor(WEIGHTS))) for pair in pairs)
    assert sum(means) / 3 != pytest.approx(joint, rel=0.01)


@pytest.mark.parametrize("mixing", [{}, {"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}], ids=str)
def test_weights_reach_hard_and_mixed_targets(tiny_variant, mixing):
    words = {"label_smoothing": 0.0, **mixing}
    module = module_of(tiny_variant, class_weights="balanced", **words)
    torch.manual_seed(0)
    images, targets = module.mix(module.network_input(LARGE_BATCH[0]), LARGE_BATCH[1])
    expected = F.cross_entropy(module.model(images), targets, torch.tensor(WEIGHTS), reduction="none").mean()
    assert step_loss(module) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert step_loss(module_of(tiny_variant, **words)) != pytest.approx(float(expected.detach()), rel=0.02)


def test_gamma_reaches_the_training_loss_and_not_the_validations(tiny_variant):
    losses = [step_loss(module_of(tiny_variant, loss="focal", focal_gamma=gamma)) for gamma in (0.0, 1.0, 2.0)]
    assert losses[0] == pytest.approx(step_loss(module_of(tiny_variant)), rel=1e-6)
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] == step_loss(module_of(tiny_variant, loss="focal"))
    plain, focal = (module_of(tiny_variant, **words) for words in ({}, {"loss": "focal", "class_weights": "balanced"}))
    for module in (plain, focal):
        module.on_validation_epoch_start()
        module.validation_step(LARGE_BATCH, 0)
    assert torch.equal(plain.sums["val"], focal.sums["val"])


# --- sampling ---------------------------------------------------------------------------------------------------------


def drawn(epoch: int = 0, **words) -> list[tuple[int, int]]:
    sampler = EpochBatches(len(LABELS), 5, **{"seed": 0, "labels": LABELS, **words})
    sampler.set_epoch(epoch)
    return [item for batch in sampler for item in batch]


def test_each_class_is_drawn_equally_often_and_each_image_of_a_class_too():
    for epoch in range(20):
        indices = [index for index, _ in drawn(epoch)]
        assert len(indices) == len(LABELS)
        by_class, by_image = Counter(LABELS[index] for index in indices), Counter(indices)
        assert sorted(by_class.values()) == [5, 5, 6]
        for label in set(LABELS):
            counts = [by_image[index] for index, own in enumerate(LABELS) if own == label]
            assert max(counts) - min(counts) <= 1
    plain = Counter(LABELS[index] for index, _ in drawn(labels=None))
    assert plain == Counter(LABELS)


def test_repeated_images_are_augmented_anew_and_epochs_reach_every_image_of_a_large_class():
    items = drawn()
    assert len({seed for _, seed in items}) == len(items)
    assert drawn() == items
    assert [drawn(1), drawn(seed=1)] != [items, items]
    assert {index for epoch in range(20) for index, _ in drawn(epoch)} == set(range(len(LABELS)))
    assert [LABELS[index] for index, _ in items] != sorted(LABELS[index] for index, _ in items)  # not class by class


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_balanced_draws_of_one(processes):
    shares = [EpochBatches(16, 4, seed=0, labels=LABELS, launch=Launch(rank, processes)) for rank in range(processes)]
    counted = [
        item for share in shares for number, batch in enumerate(share) for item in batch[: share.own_count(number)]
    ]
    assert sorted(counted) == sorted(drawn())


# --- runs -------------------------------------------------------------------------------------------------------------


def recalls(result, data) -> list[float]:
    """Recall in percent of dark and of light validation images."""
    loaded, images = load_checkpoint(result.last), find_dataset(data).val
    pixels = torch.stack([images.pixels(at, loaded.preprocessing) for at in range(len(images))])
    with torch.inference_mode():
        named = loaded.model(normalise(pixels, loaded.preprocessing)).argmax(dim=1)
    labels = torch.tensor(images.labels)
    return [100 * float((named[labels == label] == label).float().mean()) for label in (0, 1)]


@pytest.fixture(scope="module")
def plain(shades, tiny_variant, tmp_path_factory):
    """What the classes as they are give. Shared."""
    folder = tmp_path_factory.mktemp("plain")
    return train(TrainingSpec(shades, tiny_variant, folder, epochs=4, image_size=32, batch_size=9))


@pytest.mark.parametrize(
    "change", [{"class_weights": "balanced"}, {"sampling": "balanced"}, {"class_weights": "balanced", "loss": "focal"}],
    ids=str,
)  # fmt: skip
def test_the_rare_class_is_found_with_weights_and_with_balanced_sampling(spec, plain, change):
    result = train(replace(spec, **change))
    dark, light = recalls(result, spec.data)
    assert recalls(plain, spec.data)[1] < 30
    assert light > 60
    assert dark > 50
    row = rows(result.run_dir)[-1]
    assert float(row["val_recall_percent"]) == pytest.approx((dark + light) / 2, abs=1e-3)
    assert float(row["val_top1_percent"]) == pytest.approx((20 * dark + 8 * light) / 28, abs=1e-3)
    assert "val_recall_percent" not in rows(plain.run_dir)[-1]


def test_the_best_weights_are_those_of_the_highest_mean_recall(spec):
    def record(epoch, top1, recall):
        return TrainingRecord(epoch, 1.0, 1.0, top1, 100.0, None, None, 1e-3, 1.0, 1.0, 0.0, recall)

    assert record(1, 90.0, 50.0).rank < record(2, 80.0, 75.0).rank
    assert record(1, 90.0, None).rank > record(2, 80.0, None).rank
    result = train(replace(spec, class_weights="balanced", ema_decay=0.9, epochs=2))
    known = rows(result.run_dir)
    assert known[-1].keys() >= {"val_recall_percent", "ema_val_recall_percent"}
    ranked = [float(row[f"{kind}val_recall_percent"]) for row in known for kind in ("", "ema_")]
    assert result.best_recall_percent == max(ranked)
    assert "mean recall" in result.summary()


def test_a_resumed_run_draws_the_same_images(spec):
    cut = replace(spec, epochs=2, sampling="balanced")
    whole = train(replace(cut, run_dir=spec.output_dir / "whole"))
    assert train(cut, progress=InterruptIn(2)).epochs_run == 1
    resumed = train(replace(cut, resume=True))
    assert table(resumed.run_dir) == table(whole.run_dir)
    assert difference(resumed.last, whole.last) == 0.0
    with pytest.raises(InputError, match="started otherwise: sampling balanced then, shuffle now"):
        train(replace(cut, resume=True, sampling="shuffle", run_dir=resumed.run_dir))


@pytest.mark.slow
def test_records_have_the_options_off_their_default_alone(spec, plain):
    given = {"class_weights": {"dark": 1.0, "light": 8.0}, "loss": "focal"}
    result = train(replace(spec, epochs=1, **given))
    before, after = (json.loads((run.run_dir / "run.json").read_text()) for run in (plain, result))
    assert not before["spec"].keys() & LATER_FIELDS.keys()
    assert "weight_by_class" not in before
    assert after["spec"].keys() & LATER_FIELDS.keys() == {"class_weights", "loss"}
    assert after["resolved"]["focal_gamma"] == 2.0
    assert after["weight_by_class"]["light"] == pytest.approx(8 * after["weight_by_class"]["dark"])
    assert load_checkpoint(plain.best).training == {}
    assert load_checkpoint(result.best).training == {**given, "focal_gamma": 2.0}
    words = {"checkpoint": result.best, "image_size": 32, "precision": "fp32", "no_verify": True}
    manifest = cnx.export("tiny-test", output_dir=result.run_dir / "export", **words).manifest
    assert manifest.model.training == {**given, "focal_gamma": 2.0}
    assert manifest_from_json(manifest.to_json().encode()).model == manifest.model
    usual = replace(manifest, model=replace(manifest.model, training={}))
    assert "training" not in json.loads(usual.to_json())["model"]


def test_what_weights_and_sampling_come_to_is_said(shades, tiny_variant):
    dataset, spec = find_dataset(shades), TrainingSpec(shades, tiny_variant)
    assert list(balance_lines(spec, dataset)) == []
    (weights, best), (drawing, _) = (
        balance_lines(replace(spec, **change), dataset)
        for change in ({"class_weights": "balanced"}, {"sampling": "balanced"})
    )
    assert "from 0.562 (dark) to 4.5 (light)" in weights
    assert "mean recall" in best
    assert "27 images of each of 2 classes" in drawing
    assert "from 0.56 times (dark) to 4.5 times (light)" in drawing
    empty = replace(dataset, class_names=("dark", "light", "none"))
    assert "for none." in list(balance_lines(replace(spec, class_weights="balanced"), empty))[1]
