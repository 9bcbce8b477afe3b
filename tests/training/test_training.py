"""Training a classifier: every option has its effect on what is learned, and the weights to start from fit."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import cnx_deploy as cnx
from cnx_deploy.core.errors import CheckpointError, InputError
from cnx_deploy.core.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from cnx_deploy.core.system import cpu_count
from cnx_deploy.data import find_dataset
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import create_model, random_model
from cnx_deploy.training import Progress, TrainingSpec, initial_model, train
from cnx_deploy.training.classifier import ClassificationModule, averaged_model
from cnx_deploy.training.run import OWN_LICENCE
from cnx_deploy.training.spec import LATER_FIELDS
from tests.support.training_data import Weights, difference, rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def spec(colours, tiny_variant, tmp_path):
    return TrainingSpec(colours, tiny_variant, tmp_path / "runs", epochs=1, image_size=32, batch_size=8)


@pytest.fixture(scope="module")
def plain(colours, tiny_variant, tmp_path_factory) -> Weights:
    """What `spec` learns as it is."""
    folder = tmp_path_factory.mktemp("plain")
    return weights(TrainingSpec(colours, tiny_variant, folder, epochs=1, image_size=32, batch_size=8))


def weights(spec: TrainingSpec, initial=None, **changes) -> Weights:
    return load_file(train(dataclasses.replace(spec, **changes), initial).last)


def classifier(spec: TrainingSpec, **changes) -> ClassificationModule:
    """As training makes it, with weights that matter."""
    return ClassificationModule(random_model(spec.network, 2, seed=3), dataclasses.replace(spec, **changes), 8, {})


def one_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return pixels, torch.arange(8) % 2


def batch_loss(module: ClassificationModule) -> float:
    torch.manual_seed(0)
    return float(module.training_step(one_batch(), 0).detach())


@pytest.mark.parametrize(
    "change", [{}, pytest.param({"optimizer": "sgd", "learning_rate": 0.02}, marks=pytest.mark.slow)], ids=str
)
def test_training_learns_what_is_easy_to_learn(spec, change):
    result = train(dataclasses.replace(spec, **{"epochs": 6, "learning_rate": 5e-3, **change}))
    losses = [float(row["train_loss"]) for row in rows(result.run_dir)]
    assert losses[-1] < losses[0]
    assert result.best_top1_percent == 100.0
    assert load_checkpoint(result.best, spec.network).class_names == ("blue", "red")


@pytest.mark.parametrize(("batch_size", "accumulate"), [(5, 2), (7, 3)])
def test_accumulated_batches_learn_what_one_large_batch_does(spec, batch_size, accumulate):
    sgd = dataclasses.replace(spec, optimizer="sgd", learning_rate=0.05)
    whole = weights(sgd, batch_size=batch_size * accumulate)  # 24 images: a smaller last step
    parts = weights(sgd, batch_size=batch_size, accumulate=accumulate)
    assert difference(whole, parts) < 1e-5
    assert difference(whole, weights(sgd, batch_size=batch_size)) > 1e-3


def test_label_smoothing_is_in_the_training_loss(spec):
    smoothed = classifier(spec, label_smoothing=0.2)
    pixels, labels = one_batch()
    logits = smoothed.model(normalise(pixels, spec.preprocessing)).detach()
    shares = F.one_hot(labels, 2) * 0.8 + 0.1
    expected = -(shares * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert batch_loss(smoothed) == pytest.approx(float(expected), rel=1e-5)
    assert batch_loss(classifier(spec, label_smoothing=0.0)) != pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("change", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}], ids=str)
def test_mixing_is_in_the_training_loss(spec, change):
    assert abs(batch_loss(classifier(spec, **change)) - batch_loss(classifier(spec))) > 1e-3


def test_stochastic_depth_rises_over_the_blocks_and_drops_branches(spec, plain):
    model, seen = create_model(spec.network, 2), []
    model.register_forward_pre_hook(
        lambda network, images: seen.append([block.drop_path.p for stage in network.stage_blocks() for block in stage])
    )
    train(dataclasses.replace(spec, drop_path_rate=0.4), model)
    assert seen[0] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert difference(weights(spec, drop_path_rate=0.4), plain) > 1e-4


def test_a_new_head_is_scaled(spec):
    still = weights(spec, head_init_scale=0.001, learning_rate=1e-12, weight_decay=0.0)
    assert float(still["head.weight"].std()) == pytest.approx(2e-5, rel=0.2)  # of 0.02


def test_gradients_are_clipped(spec):
    one_step = {"optimizer": "sgd", "schedule": "constant", "weight_decay": 0.0, "learning_rate": 1.0, "batch_size": 24}
    model = random_model(spec.network, 2, seed=3)
    before = model.state_dict()

    def moved(**changes) -> float:
        after = weights(spec, model, **one_step, **changes)
        return float(sum(((after[name] - before[name]) ** 2).sum() for name in after)) ** 0.5

    assert moved(clip_norm=0.01) == pytest.approx(0.01, rel=1e-2)
    assert moved() > 0.1


def test_the_moving_average_follows_by_its_formula():
    linear = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        linear.weight.fill_(1.0)
    averaged = averaged_model(linear, 0.5)
    expected = 1.0
    for done, value in enumerate((2.0, 5.0, 3.0, 8.0)):
        with torch.no_grad():
            linear.weight.fill_(value)
        averaged.update_parameters(linear)
        decay = min(0.5, (1 + done) / (10 + done))
        expected = value if done == 0 else decay * expected + (1 - decay) * value
        assert float(averaged.module.weight) == pytest.approx(expected)
    assert not averaged.module.weight.requires_grad


def test_the_moving_average_is_judged_and_written_beside_the_weights(spec):
    result = train(dataclasses.replace(spec, ema_decay=0.99, epochs=2))
    assert difference(result.last, result.run_dir / "last-ema.safetensors") > 1e-5
    raw, ema = ([float(row[f"{kind}val_top1_percent"]) for row in rows(result.run_dir)] for kind in ("", "ema_"))
    assert all(row["ema_val_loss"] for row in rows(result.run_dir))
    assert result.best_top1_percent == max(*raw, *ema)
    assert max(raw) == max(ema) or result.best.name == ("best-ema" if max(ema) > max(raw) else "best") + ".safetensors"
    assert (result.run_dir / "best-ema.safetensors").is_file()
    load_checkpoint(result.run_dir / "last-ema.safetensors", spec.network)


def test_a_frozen_backbone_keeps_its_weights_and_the_head_learns(spec):
    model = random_model(spec.network, 2, seed=3)
    learned, before = weights(spec, model, freeze_backbone=True), model.state_dict()
    assert {name for name in learned if not torch.equal(learned[name], before[name])} == {"head.weight", "head.bias"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_mixed_precision_computes_in_half_and_keeps_the_weights_in_fp32(spec):
    model, seen = create_model(spec.network, 2), set()
    model.stages[0][0].pwconv1.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    learned = weights(spec, model, precision="bf16")
    assert torch.bfloat16 in seen
    assert {tensor.dtype for tensor in learned.values()} == {torch.float32}
    assert all(bool(tensor.isfinite().all()) for tensor in learned.values())


def test_channels_last_reaches_images_and_kernels(spec, plain):
    last = classifier(spec, channels_last=True)
    for tensor in (last.network_input(one_batch()[0]), last.model.downsample_layers[1][1].weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert not classifier(spec).network_input(one_batch()[0]).is_contiguous(memory_format=torch.channels_last)
    assert difference(weights(spec, channels_last=True), plain) < 1e-3


def test_compile_trains_what_torch_compile_makes(spec, plain, monkeypatch):
    calls = []

    def compile_by_hand(model):
        return lambda images: calls.append(len(images)) or model(images)

    monkeypatch.setattr(torch, "compile", compile_by_hand)
    assert difference(weights(spec, compile=True), plain) == 0.0
    assert calls == [8, 8, 8]


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(spec, plain):
    assert difference(weights(spec, compile=True), plain) < 1e-3


def test_a_run_holds_its_whole_configuration_and_deterministic_algorithms_are_on_only_while_it_trains(spec):
    seen = []

    class Look(Progress):
        def step(self, report):
            seen.append(torch.are_deterministic_algorithms_enabled())

    asked = dataclasses.replace(spec, deterministic=True, layer_decay=0.9, base_learning_rate=1e-3)
    result = train(asked, progress=Look())
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    written = json.loads((result.run_dir / "run.json").read_text())
    assert written["spec"]["layer_decay"] == 0.9
    assert written["resolved"]["learning_rate"] == pytest.approx(1e-3 * 8 / 256)
    assert set(TrainingSpec.__dataclass_fields__) - set(written["spec"]) - set(LATER_FIELDS) == {
        "data", "image_folder", "output_dir", "run_dir", "workers", "resume", "compile", "tensorboard",
        "deterministic", "launch", "class_names",
    }  # fmt: skip
    (row,) = rows(result.run_dir)
    assert float(row["images_per_second"]) > 0
    assert 0 <= float(row["data_wait_percent"]) <= 100


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"variant": "micro"}, "micro"),
        ({"optimizer": "adam"}, "adamw, sgd"),
        ({"schedule": "steps"}, "cosine, linear, step, constant"),
        ({"precision": "int8"}, "fp32, bf16, fp16"),
        ({"epochs": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"accumulate": 0}, "at least 1"),
        ({"image_size": 16}, "16x16"),
        ({"crop_ratio": 1.5}, "1.5"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"clip_norm": 0.0}, "above 0"),
        ({"clip_norm": float("inf")}, "finite"),
        ({"weight_decay": float("nan")}, "finite"),
        ({"head_init_scale": 0.0}, "above 0"),
        ({"warmup_epochs": 3.0}, "from 0 to the 1 epochs"),
        ({"final_learning_rate": 1.0}, "from 0 to the learning rate"),
        ({"drop_path_rate": 1.0}, r"in \[0, 1\)"),
        ({"label_smoothing": 1.0}, r"in \[0, 1\)"),
        ({"beta2": 1.0}, r"in \[0, 1\)"),
        ({"min_crop_area": 0.0}, r"in \(0, 1\]"),
        ({"layer_decay": 0.0}, r"in \(0, 1\]"),
        ({"ema_decay": 1.0}, r"in \(0, 1\)"),
        ({"randaugment_magnitude": 11.0}, "from 0 to 10"),
        ({"erasing_probability": 1.5}, "from 0 to 1"),
        ({"mixup_alpha": -1.0}, "at least 0"),
        ({"workers": -1}, "at least 0"),
        ({"learning_rate": 1e-3, "base_learning_rate": 1e-3}, "Both learning_rate"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused(spec, change, text):
    with pytest.raises(InputError, match=text):
        dataclasses.replace(spec, **change)


# --- weights to start from --------------------------------------------------------------------------------------------


def test_a_head_of_other_classes_takes_reset_head(spec, tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match=r"10 classes.*with 2"):
        train(spec, tiny_model)
    path = save_checkpoint(tmp_path / "ten.safetensors", tiny_model)
    with pytest.raises(CheckpointError, match="--reset-head"):
        initial_model(spec, checkpoint=path)
    loaded = initial_model(spec, checkpoint=path, reset_head=True)
    assert loaded.model.head.out_features == 2
    assert torch.equal(loaded.model.norm.weight, tiny_model.norm.weight)
    path = save_checkpoint(tmp_path / "two.safetensors", random_model(spec.network, 2), class_names=("cat", "dog"))
    with pytest.raises(CheckpointError, match=r"cat, dog.*blue, red"):
        initial_model(spec, checkpoint=path)


@pytest.mark.parametrize("names", [None, ("cat", "dog"), ("blue", "red")])
def test_init_keeps_a_head_of_the_same_classes_and_draws_another_for_others(spec, tmp_path, names):
    model = random_model(spec.network, 2 if names else 10, seed=3)
    path = save_checkpoint(tmp_path / "other.safetensors", model, class_names=names)
    loaded = initial_model(dataclasses.replace(spec, head_init_scale=0.5), init=path)
    assert torch.equal(loaded.model.norm.weight, model.norm.weight)
    head = loaded.model.head.weight.detach()
    if names == ("blue", "red"):
        assert torch.equal(head, model.head.weight)
    else:
        assert (len(head), float(head.std())) == (2, pytest.approx(0.01, rel=0.25))
        assert any("new head for 2 classes" in text for text in loaded.notes)


HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def other(spec, tmp_path):
    """Weights that were trained with a mean and deviation of a half, and bilinear images."""
    preprocessing = Preprocessing(64, mean=HALF, std=HALF, interpolation="bilinear")
    return save_checkpoint(
        tmp_path / "other.safetensors", random_model(spec.network, 2, seed=1), preprocessing=preprocessing
    )


@pytest.mark.parametrize(
    ("given", "mean", "std", "said"),
    [
        (
            {},
            HALF,
            HALF,
            "pixels have mean (0.5, 0.5, 0.5) and std (0.5, 0.5, 0.5) as the weights do (header)",
        ),
        ({"std": [0.2, 0.2, 0.2]}, HALF, (0.2, 0.2, 0.2), "std (0.5, 0.5, 0.5), interpolation bilinear; this run uses"),
        ({"mean": IMAGENET_MEAN, "std": IMAGENET_STD}, IMAGENET_MEAN, IMAGENET_STD, "were trained with mean (0.5, "),
    ],
    ids=["theirs", "their mean", "ours"],
)
def test_mean_and_deviation_are_those_of_the_weights_unless_options_say_otherwise(spec, other, given, mean, std, said):
    still = dataclasses.replace(spec, learning_rate=1e-12, weight_decay=0.0, **given)
    loaded = initial_model(still, init=other)
    assert any(said in note for note in loaded.notes)
    result = train(still, loaded)
    written = json.loads((result.run_dir / "run.json").read_text())
    assert (written["preprocessing"]["mean"], written["preprocessing"]["std"]) == (list(mean), list(std))
    assert load_checkpoint(result.best).preprocessing == Preprocessing(32, mean=mean, std=std)
    images = find_dataset(spec.data).val
    for values, is_run in (((mean, std), True), ((mean, (0.1, 0.1, 0.1)), False), (((0.0, 0.0, 0.0), std), False)):
        preprocessing = Preprocessing(32, mean=values[0], std=values[1])
        pixels = torch.stack([images.pixels(at, preprocessing) for at in range(len(images))])
        with torch.inference_mode():
            loss = F.cross_entropy(loaded.model(normalise(pixels, preprocessing)), torch.tensor(images.labels))
        (row,) = rows(result.run_dir)
        assert (abs(float(row["val_loss"]) - float(loss)) < 1e-4) is is_run
    with pytest.raises(InputError, match="preprocessing"):
        train(dataclasses.replace(still, resume=True, mean=(0.1, 0.1, 0.1)), loaded)


def test_weights_of_imagenets_mean_leave_the_records_as_they_are(spec, tmp_path):
    model = random_model(spec.network, 2, seed=1)
    path = save_checkpoint(tmp_path / "usual.safetensors", model, preprocessing=Preprocessing(64), licence=OWN_LICENCE)
    loaded = initial_model(spec, init=path)
    assert not any("mean" in note for note in loaded.notes)
    started, given = (train(dataclasses.replace(spec, run_dir=tmp_path / name), source)
                      for name, source in (("started", loaded), ("given", loaded.model)))  # fmt: skip
    for name in ("run.json", "last.safetensors"):
        assert (started.run_dir / name).read_bytes() == (given.run_dir / name).read_bytes()


def test_the_python_api_starts_from_weights_keeps_their_licence_and_tells_what_they_bring(spec, tmp_path):
    path, told = tmp_path / "a.safetensors", []
    save_checkpoint(
        path, random_model(spec.network, 2), preprocessing=Preprocessing(64, std=HALF), licence="CC-BY-NC-4.0"
    )
    words = {"epochs": 1, "image_size": 32, "learning_rate": 1e-12, "output_dir": str(tmp_path / "runs")}
    result = cnx.train(str(spec.data), "tiny-test", init=str(path), class_weights="balanced", note=told.append, **words)
    loaded = load_checkpoint(result.last)
    assert (loaded.weights.licence, loaded.preprocessing.std) == ("CC-BY-NC-4.0", HALF)
    assert difference(result.last, path) < 1e-6
    assert any("std (0.5, 0.5, 0.5) as the weights do" in text for text in told)
    assert any("Class weights: from 1 (" in text for text in told)


def test_how_evaluation_images_are_made_is_recorded_with_the_weights(spec):
    for mean in (0.5, [0.5, 0.5, 0.5], HALF):
        assert dataclasses.replace(spec, mean=mean).preprocessing.mean == HALF
    given = {"mean": HALF, "std": HALF, "interpolation": "bilinear", "crop_mode": "border"}
    result = train(dataclasses.replace(spec, **given))
    assert load_checkpoint(result.best).preprocessing == Preprocessing(32, **given)
    written = json.loads((result.run_dir / "run.json").read_text())["spec"]
    assert {name: written[name] for name in given} == json.loads(json.dumps(given))


@pytest.mark.parametrize("source", ["checkpoint", "init"])
def test_the_chosen_weights_of_a_file_are_started_from(spec, tmp_path, source):
    plain, averaged = (random_model(spec.network, 2, seed=seed) for seed in (1, 2))
    torch.save({"model": plain.state_dict(), "model_ema": averaged.state_dict()}, tmp_path / "both.pth")
    for words, expected in (({}, plain), ({"ema": True}, averaged), ({"entry": "model_ema"}, averaged)):
        loaded = initial_model(spec, **{source: tmp_path / "both.pth"}, **words)
        assert torch.equal(loaded.model.norm.weight, expected.norm.weight)
    with pytest.raises(InputError, match="no weights to choose from"):
        initial_model(spec, ema=True)


def test_sources_that_do_not_fit_are_refused(spec, tmp_path):
    path = save_checkpoint(tmp_path / "atto.safetensors", random_model("atto", 2))
    with pytest.raises(CheckpointError, match="does not fit"):
        initial_model(spec, init=path)
    with pytest.raises(InputError, match="expected one of"):
        initial_model(spec, init=path, checkpoint=path)
    with pytest.raises(InputError, match="no head to reset"):
        initial_model(spec, reset_head=True)
    assert initial_model(spec) is None


@pytest.mark.slow
def test_atto_learns_the_digits_to_98_percent_in_ten_epochs(tmp_path):
    digits = tmp_path / "digits"
    subprocess.run([sys.executable, ROOT / "scripts" / "make_digits.py", digits], check=True, capture_output=True)
    torch.set_num_threads(cpu_count())
    result = train(TrainingSpec(digits, "atto", tmp_path / "runs", epochs=10, image_size=64, flip=False))
    assert result.best_top1_percent >= 98.0
