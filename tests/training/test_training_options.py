"""Every option of the recipe has its effect on the run."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file

from cnx_deploy.cli.train import train as train_command
from cnx_deploy.core.errors import CheckpointError, InputError, MissingRequirementError
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import create_model, random_model
from cnx_deploy.training import Silence, TrainingSpec, initial_model, train
from cnx_deploy.training.loop import Classifier, _averaged
from cnx_deploy.training.run import _model_to_train
from cnx_deploy.training.sampling import EpochBatches
from tests.support.training_data import write_colours


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small only wait for a second thread, for seconds when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("colours"))


@pytest.fixture
def spec(colours, tiny_variant, tmp_path):
    return TrainingSpec(colours, tiny_variant, tmp_path / "runs", epochs=1, image_size=32, batch_size=8)


def weights(spec: TrainingSpec, name: str = "last", initial=None) -> dict[str, torch.Tensor]:
    return load_file(train(spec, initial).run_dir / f"{name}.safetensors")


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def classifier(spec: TrainingSpec, count: int = 8) -> Classifier:
    """As training makes it, with weights that matter, its sums ready."""
    made = Classifier(random_model(spec.network, 2, seed=3), spec, EpochBatches(count, spec.batch_size, seed=0))
    made._reset("train", "val", "ema")
    return made


def one_batch(spec: TrainingSpec) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return pixels, torch.arange(8) % 2


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (5, 2), (7, 3)])
def test_accumulated_batches_learn_what_one_large_batch_does(spec, batch_size, accumulate):
    sgd = dataclasses.replace(spec, optimizer="sgd", learning_rate=0.05, epochs=2)
    whole = weights(dataclasses.replace(sgd, batch_size=batch_size * accumulate))  # 24 images: a smaller last step
    parts = weights(dataclasses.replace(sgd, batch_size=batch_size, accumulate=accumulate))
    alone = weights(dataclasses.replace(sgd, batch_size=batch_size))
    assert difference(whole, parts) < 1e-5
    assert difference(whole, alone) > 1e-3


def test_label_smoothing_is_in_the_training_loss(spec):
    smoothed = classifier(dataclasses.replace(spec, label_smoothing=0.2))
    pixels, labels = one_batch(spec)
    logits = smoothed.model(normalise(pixels, spec.preprocessing)).detach()
    shares = F.one_hot(labels, 2) * 0.8 + 0.1
    expected = -(shares * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert float(smoothed.training_step((pixels, labels), 0).detach()) == pytest.approx(float(expected), rel=1e-5)
    plain = classifier(dataclasses.replace(spec, label_smoothing=0.0))
    assert float(plain.training_step((pixels, labels), 0).detach()) != pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("change", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}], ids=str)
def test_mixing_is_in_the_training_loss(spec, change):
    pixels, labels = one_batch(spec)

    def loss(**changes) -> float:
        torch.manual_seed(0)
        return float(classifier(dataclasses.replace(spec, **changes)).training_step((pixels, labels), 0).detach())

    assert abs(loss(**change) - loss()) > 1e-3


def test_stochastic_depth_rises_over_the_blocks_and_drops_branches(spec):
    dropped = dataclasses.replace(spec, drop_path_rate=0.4)
    model = _model_to_train(dropped, None, 2)
    rates = [block.drop_path.p for stage in model.stage_blocks() for block in stage]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert difference(weights(dropped), weights(spec)) > 1e-4


def test_a_new_head_is_scaled(spec):
    scaled = dataclasses.replace(spec, head_init_scale=0.001, learning_rate=1e-12, weight_decay=0.0)
    assert float(weights(scaled)["head.weight"].std()) == pytest.approx(2e-5, rel=0.2)
    plain = dataclasses.replace(scaled, head_init_scale=1.0)
    assert float(weights(plain)["head.weight"].std()) == pytest.approx(2e-2, rel=0.2)


def test_gradients_are_clipped(spec):
    sgd = dataclasses.replace(
        spec, optimizer="sgd", schedule="constant", weight_decay=0.0, learning_rate=1.0, batch_size=24
    )
    model = random_model(spec.network, 2, seed=3)
    before = model.state_dict()

    def moved(**changes) -> float:
        after = weights(dataclasses.replace(sgd, **changes), initial=model)
        return float(sum(((after[name] - before[name]) ** 2).sum() for name in after)) ** 0.5

    assert moved(clip_norm=0.01) == pytest.approx(0.01, rel=1e-2)
    assert moved() > 0.1


def test_the_moving_average_follows_by_its_formula():
    linear = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        linear.weight.fill_(1.0)
    averaged = _averaged(linear, 0.5)
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
    last, averaged = (load_file(result.run_dir / f"{name}.safetensors") for name in ("last", "last-ema"))
    assert difference(last, averaged) > 1e-5
    assert (result.run_dir / "best-ema.safetensors").is_file()
    assert all(row["ema_val_loss"] and row["ema_val_top1_percent"] for row in rows(result.run_dir))
    model = load_checkpoint(result.run_dir / "last-ema.safetensors", spec.network).model
    assert not torch.equal(model.head.weight, load_checkpoint(result.last, spec.network).model.head.weight)


def test_a_run_with_a_moving_average_resumes_to_the_same_average(spec, tmp_path):
    with_average = dataclasses.replace(spec, ema_decay=0.9, epochs=2)
    whole = weights(dataclasses.replace(with_average, run_dir=tmp_path / "whole"), "last-ema")

    class Stop(Silence):
        def end_epoch(self, record, is_best):
            raise InterruptedError

    cut = dataclasses.replace(with_average, run_dir=tmp_path / "cut")
    with pytest.raises(InterruptedError):
        train(cut, progress=Stop())
    assert difference(whole, weights(dataclasses.replace(cut, resume=True), "last-ema")) == 0.0


def test_the_best_weights_are_the_averages_where_those_are_better(spec):
    slow = dataclasses.replace(spec, ema_decay=0.99, epochs=2)
    result = train(slow)
    ema = max(float(row["ema_val_top1_percent"]) for row in rows(result.run_dir))
    raw = max(float(row["val_top1_percent"]) for row in rows(result.run_dir))
    assert result.best_top1_percent == max(ema, raw)
    assert result.best.name == ("best-ema.safetensors" if ema > raw else "best.safetensors") or ema == raw


def test_a_frozen_backbone_keeps_its_weights_and_the_head_learns(spec):
    model = random_model(spec.network, 2, seed=3)
    found = weights(dataclasses.replace(spec, freeze_backbone=True), initial=model)
    before = model.state_dict()
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_mixed_precision_computes_in_half_and_keeps_the_weights_in_fp32(spec):
    model = create_model(spec.network, 2)
    seen = set()
    model.stages[0][0].pwconv1.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    found = weights(dataclasses.replace(spec, precision="bf16"), initial=model)
    assert torch.bfloat16 in seen
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains in FP16")
def test_fp16_without_a_gpu_is_refused_rather_than_replaced(spec):
    with pytest.raises(MissingRequirementError, match="bf16"):
        train(dataclasses.replace(spec, precision="fp16"))


def test_channels_last_reaches_images_and_kernels(spec):
    last = classifier(dataclasses.replace(spec, channels_last=True))
    images = last._images(one_batch(spec)[0])
    kernel = last.model.downsample_layers[1][1].weight
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not classifier(spec)._images(one_batch(spec)[0]).is_contiguous(memory_format=torch.channels_last)
    assert difference(weights(dataclasses.replace(spec, channels_last=True)), weights(spec)) < 1e-3


def test_compile_trains_what_torch_compile_makes(spec, monkeypatch):
    calls = []

    def compile_by_hand(model):
        return lambda images: calls.append(len(images)) or model(images)

    monkeypatch.setattr(torch, "compile", compile_by_hand)
    compiled = weights(dataclasses.replace(spec, compile=True))
    assert calls == [8, 8, 8]
    assert difference(compiled, weights(spec)) == 0.0


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(spec):
    assert difference(weights(dataclasses.replace(spec, compile=True)), weights(spec)) < 1e-3


def test_deterministic_algorithms_are_asked_for_while_training_and_not_after(spec):
    seen = []

    class Look(Silence):
        def step(self, report):
            seen.append(torch.are_deterministic_algorithms_enabled())

    train(dataclasses.replace(spec, deterministic=True), progress=Look())
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_tensorboard_gets_every_epochs_figures(spec):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(dataclasses.replace(spec, tensorboard=True, epochs=2))
    events = EventAccumulator(str(result.run_dir / "tensorboard")).Reload()
    found = [event.value for event in events.Scalars("epoch/val_loss")]
    assert found == pytest.approx([float(row["val_loss"]) for row in rows(result.run_dir)], rel=1e-4)
    assert events.Scalars("step/learning_rate")


def test_without_tensorboard_the_error_names_the_extra(spec, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingRequirementError, match=r"cnx-deploy\[tensorboard\]"):
        train(dataclasses.replace(spec, tensorboard=True))


def test_the_table_says_how_fast_images_came(spec):
    row = rows(train(spec).run_dir)[0]
    assert float(row["images_per_second"]) > 0
    assert 0 <= float(row["data_wait_percent"]) <= 100


def test_the_run_holds_the_whole_configuration(spec):
    result = train(dataclasses.replace(spec, layer_decay=0.9, base_learning_rate=1e-3))
    written = json.loads((result.run_dir / "run.json").read_text())
    assert written["spec"]["layer_decay"] == 0.9
    assert written["resolved"]["learning_rate"] == pytest.approx(1e-3 * 8 / 256)
    assert set(TrainingSpec.__dataclass_fields__) - set(written["spec"]) == {
        "data", "output_dir", "run_dir", "workers", "resume", "compile", "tensorboard", "deterministic", "launch",
    }  # fmt: skip


def test_init_keeps_a_head_of_the_same_classes(spec, tmp_path):
    model = random_model(spec.network, 2, seed=3)
    path = save_checkpoint(tmp_path / "two.safetensors", model, class_names=("blue", "red"))
    loaded = initial_model(spec, init=path)
    assert torch.equal(loaded.model.head.weight, model.head.weight)


@pytest.mark.parametrize("names", [None, ("cat", "dog")])
def test_init_draws_a_new_head_for_other_classes_and_says_so(spec, tmp_path, names):
    model = random_model(spec.network, 2 if names else 10, seed=3)
    path = save_checkpoint(tmp_path / "other.safetensors", model, class_names=names)
    loaded = initial_model(dataclasses.replace(spec, head_init_scale=0.5), init=path)
    assert torch.equal(loaded.model.norm.weight, model.norm.weight)
    assert loaded.model.head.out_features == 2
    assert float(loaded.model.head.weight.detach().std()) == pytest.approx(0.01, rel=0.25)
    assert any("new head for 2 classes" in text for text in loaded.notes)


def test_init_of_another_variant_is_refused(spec, tmp_path):
    path = save_checkpoint(tmp_path / "atto.safetensors", random_model("atto", 2))
    with pytest.raises(CheckpointError, match="does not fit"):
        initial_model(spec, init=path)


def test_two_sources_of_weights_are_refused(spec, tmp_path):
    with pytest.raises(InputError, match="expected one of"):
        initial_model(spec, init=tmp_path / "a", checkpoint=tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"accumulate": 0}, "at least 1"),
        ({"layer_decay": 0.0}, r"in \(0, 1\]"),
        ({"ema_decay": 1.0}, r"in \(0, 1\)"),
        ({"clip_norm": 0.0}, "above 0"),
        ({"head_init_scale": 0.0}, "above 0"),
        ({"randaugment_magnitude": 11.0}, "from 0 to 10"),
        ({"erasing_probability": 1.5}, "from 0 to 1"),
        ({"mixup_alpha": -1.0}, "at least 0"),
        ({"schedule": "step"}, "cosine, constant"),
        ({"final_learning_rate": 1.0}, "at most the learning rate"),
        ({"beta2": 1.0}, r"in \[0, 1\)"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused(spec, change, text):
    with pytest.raises(InputError, match=text):
        dataclasses.replace(spec, **change)


@pytest.mark.slow
def test_the_command_draws_curves_and_takes_every_option(colours, tmp_path):
    arguments = [
        str(colours), "--variant", "atto", "--recipe", "fine-tune", "--image-size", "32", "--epochs", "2",
        "--batch-size", "12", "--accumulate", "2", "--learning-rate", "1e-3", "--run-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    done = CliRunner().invoke(train_command, arguments)
    assert done.exit_code == 0, done.stderr
    svg = (tmp_path / "run" / "curves.svg").read_text()
    assert svg.startswith("<?xml")
    assert "average" in done.stderr
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (written["spec"]["recipe"], written["spec"]["layer_decay"]) == ("fine-tune", 0.9)


def test_dataset_bad_files_are_left_out_of_training_and_said(tmp_path):
    colours = write_colours(tmp_path / "colours", train=20)
    (colours / "train" / "red" / "3.png").write_bytes(b"no image")
    arguments = [str(colours), "--variant", "atto", "--image-size", "32", "--epochs", "1", "--run-dir"]
    done = CliRunner().invoke(train_command, [*arguments, str(tmp_path / "run")])
    assert done.exit_code == 0, done.stderr
    assert "1 of 48 images cannot be read and are left out" in done.stderr
    assert "3.png" in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["train_images"] == 39


def test_the_command_warns_of_uneven_classes(tmp_path):
    colours = write_colours(tmp_path / "colours", train=22)
    for index in range(2, 22):
        (colours / "train" / "red" / f"{index}.png").unlink()
    arguments = [str(colours), "--variant", "atto", "--image-size", "32", "--epochs", "1", "--run-dir"]
    done = CliRunner().invoke(train_command, [*arguments, str(tmp_path / "run")])
    assert "largest to smallest 11.0:1" in done.stderr
    assert "Warning: The classes are uneven" in done.stderr
