"""What a file gives is chosen: scores, embeddings, maps, class maps; and features need no head."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import cnx_deploy as cnx
from cnx_deploy.bench.peers import timm_twin
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError, ParityError
from cnx_deploy.core.gates import GATES, OutputSpec
from cnx_deploy.core.variants import Variant
from cnx_deploy.data import image_like_batches
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.deploy import deploy_form
from cnx_deploy.model.tasks import pooled
from cnx_deploy.model.tasks.base import find_task
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.verification.explain import grad_cam
from cnx_deploy.verification.metrics import LabelledResult
from cnx_deploy.verification.parity import comparable, differences, verdicts
from tests.conftest import Command

SIZE = (96, 64)
EVERY = ("logits", "probabilities", "top5", "embedding", "unit-embedding", "maps", "class-maps")
OPTIONS: dict[str, Any] = {"image_size": SIZE, "num_classes": 10, "batch": (1, 2, 4)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[cnx.Artifact]:
    """Everything that a classifier can give, in FP32 and FP16, at 96x64 pixels."""
    folder = tmp_path_factory.mktemp("outputs")
    words = {"outputs": EVERY, "output_dir": folder, "no_verify": True, **OPTIONS}  # `verify` is called below
    return cnx.export("tiny-test", precision=("fp32", "fp16"), **words)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of each of two classes."""
    folder = tmp_path_factory.mktemp("photos")
    for index, image in enumerate(image_like_batches(8, 100, batch_size=1)):
        (folder / f"class-{index % 2}").mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"class-{index % 2}" / f"{index}.png")
    return folder


@pytest.fixture
def command(request: pytest.FixtureRequest) -> Command:
    """The command line, under another name than the package's."""
    return request.getfixturevalue("cnx")


def normalised(spec: DeploySpec, images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (images - mean) / std


def by_timm(model: ConvNeXtV2, images: Tensor) -> dict[str, Tensor]:
    """Every output from timm's model of the same weights, and the class maps from its feature map, written out."""
    twin = timm_twin(model).to(images.dtype)
    last, stages = twin.forward_intermediates(images)
    pooled_map = last.mean(dim=(2, 3))
    embedding = twin.forward_head(last, pre_logits=True)
    logits = twin.head.fc(embedding)
    best = logits.softmax(dim=1).topk(5)
    maps = torch.empty(len(images), logits.shape[1], *last.shape[2:], dtype=images.dtype)
    for n in range(len(images)):
        mean, deviation = pooled_map[n].mean(), (pooled_map[n].var(correction=0) + twin.head.norm.eps).sqrt()
        for row in range(last.shape[2]):
            for column in range(last.shape[3]):
                position = (last[n, :, row, column] - mean) / deviation
                maps[n, :, row, column] = twin.head.fc(position * twin.head.norm.weight + twin.head.norm.bias)
    return {
        "logits": logits, "probabilities": logits.softmax(dim=1), "top5_probabilities": best.values,
        "top5_classes": best.indices, "embedding": embedding, "unit_embedding": F.normalize(embedding, dim=1),
        **{f"stage{at}": stage for at, stage in enumerate(stages[-4:], 1)}, "class_maps": maps,
    }  # fmt: skip


@pytest.mark.parametrize("leave_out", [(), ("head-affine",)])
@pytest.mark.parametrize("layout", ["gpu", "cpu", "openvino"])
def test_every_output_is_timms_in_float64(tiny_model: ConvNeXtV2, layout: Any, leave_out: tuple[str, ...]) -> None:
    model, images = tiny_model.double(), torch.rand(2, 3, *SIZE, dtype=torch.float64)
    for words in (EVERY, ("class-maps",), ("maps",), ("top5", "logits")):  # an embedding keeps the norm's affine apart
        spec = DeploySpec("fp64", SIZE, layout=layout, leave_out=leave_out, outputs=words)
        with torch.inference_mode():
            expected = by_timm(model, normalised(spec, images))
        for runner in (reference_runner(model, spec).module.eval(), deploy_form(model, spec)):
            with torch.inference_mode():
                found = runner(images)
            found = found if isinstance(found, dict) else {words[0].replace("-", "_"): found}
            assert found.keys() >= {
                spec.name for spec in find_task("classification").outputs(10, words, [(1, 1, 1)] * 4)
            }
            for name, output in found.items():
                torch.testing.assert_close(output, expected[name], rtol=1e-11, atol=1e-11)


def test_the_mean_of_a_class_map_is_the_logit_and_a_norm_of_each_position_is_not_it(tiny_model: ConvNeXtV2) -> None:
    model, images = tiny_model.double(), torch.rand(3, 3, *SIZE, dtype=torch.float64)
    with torch.inference_mode():
        found = model.forward_outputs(images, ("logits", "class-maps", "maps"), temperature=2.0)
        torch.testing.assert_close(found["class_maps"].mean(dim=(2, 3)), found["logits"], rtol=1e-12, atol=1e-12)
        by_position = model.head(model.norm(found["stage4"].movedim(1, -1))).movedim(-1, 1) / 2.0
    assert (by_position.mean(dim=(2, 3)) - found["logits"]).abs().max() > 0.01


def test_grad_cam_weighs_the_maps_by_the_gradient_of_the_pooled_vector(tiny_model: ConvNeXtV2) -> None:
    model, images = tiny_model.double(), torch.rand(2, 3, *SIZE, dtype=torch.float64)
    classes = torch.tensor([3, 7])
    last = model.forward_outputs(images, ("maps",))["stage4"].detach()
    pooled_map = last.mean(dim=(2, 3)).requires_grad_()
    scores = model.head(model.norm(pooled_map)).gather(1, classes[:, None]).sum()
    (gradient,) = torch.autograd.grad(scores, pooled_map)
    # Every position of a map has the same share in the pooled vector, so the mean gradient is this one over the area.
    expected = (gradient[..., None, None] * last).sum(dim=1).clamp_min(0.0) / last[0, 0].numel()
    torch.testing.assert_close(grad_cam(model, images, classes), expected)
    assert not torch.allclose(grad_cam(model, images, classes.flip(0)), expected)


@pytest.mark.slow
def test_files_of_every_output_pass_and_say_what_they_give(files: list[cnx.Artifact], photos: Path) -> None:
    for artifact in files:
        assert artifact.manifest.deploy.outputs == EVERY
        assert artifact.manifest.facts.outputs["top5_classes"].type == "INT64"
        assert artifact.manifest.facts.outputs["stage4"].shape == ("batch", 64, 3, 2)
        assert len(artifact.manifest.facts.outputs) == 11
    report = cnx.verify(files, samples=3)
    assert report.passed, str(report)
    assert len(report.results[1].results) == 22, "11 outputs by ONNX Runtime and by the emulator"
    with cnx.load(files[0].path) as model:
        found = model.outputs(sorted(photos.rglob("*.png")))
    assert found["top5_classes"].dtype == torch.int64
    assert torch.equal(found["top5_classes"][:, 0], found["logits"].argmax(dim=1))


class Faulty(pooled.Answers):
    """A module of outputs with a fault in one: places rolled by one, or values a thousandth too large."""

    fault = ""

    def forward(self, *words: Any) -> Any:
        outputs = super().forward(*words)
        given = outputs[self.fault]
        return {**outputs, self.fault: (given + 1) % 10 if given.dtype == torch.int64 else given * 1.001}


@pytest.mark.parametrize("output", ["probabilities", "top5_classes", "unit_embedding", "class_maps", "stage2"])
def test_a_fault_in_any_output_fails_the_gate(tiny_model: ConvNeXtV2, output: str) -> None:
    spec = DeploySpec("fp32", SIZE, outputs=EVERY)
    images, deployed = torch.rand(3, 3, *SIZE), deploy_form(tiny_model, spec)
    specs = deployed.output_specs
    expected = reference_runner(tiny_model, spec).run(images)
    for fault in ("", output):
        if fault:
            deployed.answers.__class__, Faulty.fault = Faulty, fault  # type: ignore[assignment]
        with torch.inference_mode():
            results = verdicts(deployed(images), expected, specs, GATES["fp32"], ("deployed", "torch"), (3,))
        assert [result.output for result in results if not result.passed] == [fault] * bool(fault)


@pytest.mark.slow
def test_an_export_with_a_fault_in_its_class_maps_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pooled.ClassMaps.forward
    monkeypatch.setattr(pooled.ClassMaps, "forward", lambda *words: right(*words) * 1.001)
    with pytest.raises(ParityError, match="differs from PyTorch in class_maps: relative L2"):
        cnx.export("tiny-test", precision="fp32", outputs=("class-maps", "logits"), output_dir=tmp_path, **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_classes_that_change_places_within_the_noise_differ_little_and_a_wrong_class_differs_much() -> None:
    specs = find_task("classification").outputs(6, ("top5",))
    scores = torch.tensor([[0.4, 0.2, 0.1999, 0.1, 0.06, 0.0401]])
    reference = {"probabilities": scores, "top5_classes": torch.tensor([[0, 1, 2, 3, 4]])}
    reference["top5_probabilities"] = scores[:, :5]

    def failures(*classes: int) -> tuple[str, ...]:
        candidate = {**reference, "top5_classes": torch.tensor([classes])}
        del candidate["probabilities"]
        given, expected = comparable(candidate, reference, specs)
        return GATES["fp16"].failures(differences(given["top5_classes"], expected["top5_classes"], specs[1]))

    assert failures(0, 2, 1, 3, 4) == ()
    assert failures(0, 1, 2, 3, 5), "the sixth for the fifth"
    assert failures(1, 0, 2, 3, 4)
    assert failures(0, 1, 2, 3, -1) == ("1 values are NaN or infinite",)


@pytest.mark.parametrize(("activation", "logarithm"), [("softmax", torch.log), ("sigmoid", torch.logit)])
def test_decisions_of_probabilities_are_those_of_their_logits(activation: Any, logarithm: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    candidate = reference + 0.05 * torch.randn(300, 5, generator=generator, dtype=torch.float64)
    turned = [side.softmax(1) if activation == "softmax" else side.sigmoid() for side in (candidate, reference)]
    found = differences(*turned, OutputSpec("p", (5,), "probability", activation))
    plain = differences(*map(logarithm, turned), OutputSpec("l", (5,), "logit", activation))
    assert (found.flips, found.excused_flips, found.mean_kl) == (plain.flips, plain.excused_flips, plain.mean_kl)
    assert found.flips > found.excused_flips > 0 or found.flips == found.excused_flips > 0
    assert found.relative_l2_max == pytest.approx(
        float(((turned[0] - turned[1]).norm(dim=1) / turned[1].norm(dim=1)).max())
    )


@pytest.mark.slow
def test_labels_are_compared_and_counted_with_probabilities_as_with_logits(tmp_path: Path, photos: Path) -> None:
    names = ("class-0", "class-1")
    words: dict[str, Any] = {**OPTIONS, "num_classes": 2, "precision": "fp32", "class_names": names}
    by_shares, by_best = (
        cnx.export("tiny-test", outputs=(word,), output_dir=tmp_path, name=word, no_verify=True, **words)
        for word in ("probabilities", "top5")
    )
    by_logits = save_checkpoint(
        tmp_path / "same.safetensors", random_model("tiny-test", 2), class_names=names,
        preprocessing=by_shares.manifest.model.preprocessing,
    )  # fmt: skip
    counted = [cnx.evaluate(artifact, photos) for artifact in (by_logits, by_shares)]
    assert counted[0].per_class == counted[1].per_class
    assert counted[0].mean_nll == pytest.approx(counted[1].mean_nll, rel=1e-5)
    (verified,) = cnx.verify(by_shares, data=photos).results[0].results
    assert isinstance(verified, LabelledResult)
    assert verified.passed
    assert verified.agreement.reference_correct == verified.agreement.candidate_correct == counted[0].correct_top1
    answers = [cnx.predict(artifact, str(next(photos.rglob("*.png")))) for artifact in (by_logits, by_shares, by_best)]
    assert [score.name for score in answers[0].scores] == [score.name for score in answers[2].scores]
    for one, other, third in zip(*(answer.scores for answer in answers), strict=True):
        assert one.probability == pytest.approx(other.probability, rel=1e-5)
        assert one.probability == pytest.approx(third.probability, rel=1e-5)
    with pytest.raises(InputError, match="gives top5_probabilities, top5_classes, and metrics need logits or prob"):
        cnx.evaluate(by_best, photos)


FEATURES = ("embedding", "unit-embedding", "maps")


def test_features_come_from_weights_with_a_head_without_one_and_without_a_norm(
    tiny_model: ConvNeXtV2, tiny_variant: Variant, tmp_path: Path
) -> None:
    state = tiny_model.state_dict()
    without_head = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    without_norm = {name: tensor for name, tensor in without_head.items() if not name.startswith("norm.")}
    save_checkpoint(tmp_path / "ours.safetensors", tiny_model, class_names=list("abcdefghij"))
    save_file(timm_twin(tiny_model).state_dict(), tmp_path / "timm.safetensors")
    save_file(without_head, tmp_path / "backbone.safetensors")
    save_file(without_norm, tmp_path / "pretrained.safetensors")
    images = torch.rand(2, 3, *SIZE)
    expected = by_timm(tiny_model, normalised(DeploySpec(), images))
    for name, said in (
        ("ours", "the head is left out: head.bias, head.weight"), ("timm", "the head is left out"), ("backbone", ""),
        ("pretrained", "the weights have no last norm"),
    ):  # fmt: skip
        path = tmp_path / f"{name}.safetensors"
        with cnx.load(path, task="features", outputs=FEATURES, image_size=SIZE) as model:
            assert any(said in note for note in model.notes), model.notes
            assert (model.num_classes, model.class_names) == (0, None)
            found = model.runner.run(images)
        names = ("stage1", "stage4") if name == "pretrained" else ("embedding", "unit_embedding", "stage1", "stage4")
        for output in names:
            torch.testing.assert_close(found[output], expected[output], rtol=1e-4, atol=1e-4)
    plain = F.layer_norm(expected["stage4"].mean(dim=(2, 3)), (64,), eps=1e-6)
    torch.testing.assert_close(found["embedding"], plain, rtol=1e-4, atol=1e-4)
    options: dict[str, Any] = {"image_size": SIZE, "batch": (1, 2, 4), "output_dir": tmp_path, "precision": "fp32"}
    artifact = cnx.export("tiny-test", checkpoint=path, task="features", **options)
    assert (artifact.manifest.model.task, artifact.manifest.model.num_classes) == ("features", 0)
    assert cnx.verify(artifact, samples=2).passed, "the manifest leads back to the same weights"


@pytest.mark.slow
def test_the_kernels_of_every_output_are_known_and_classes_leave_an_engine_as_integers(
    files: list[cnx.Artifact], tmp_path: Path
) -> None:
    engine = cnx.build_engine(files[1], target="sm89", output_dir=tmp_path)
    compiled = engine.manifest.facts.compiled
    assert compiled is not None
    assert "other" not in {kernel.block for kernel in compiled.kernel_list}
    assert any("Int64" in kernel.tensors for kernel in compiled.kernel_list)


@pytest.mark.slow
def test_features_answer_by_the_command_line(
    command: Command, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--image-size", "96x64", "--batch", "1:2:4", "--task", "features", "--precision", "fp16")
    code, _, said = command("export", "--variant", "tiny-test", *words, "--output", "embedding", "--output", "maps")
    assert code == 0, said
    file = "export/tiny-test-features-96x64-fp16.onnx"
    code, out, said = command("predict", file, photos, "--save", "all.npz")
    assert code == 0, said
    assert "64 values of length" in out
    saved = np.load("all.npz")
    assert {name: saved[name].shape for name in saved.files} == {
        "paths": (8,), "embedding": (8, 64), "stage1": (8, 8, 24, 16), "stage2": (8, 16, 12, 8),
        "stage3": (8, 32, 6, 4), "stage4": (8, 64, 3, 2),
    }  # fmt: skip
    with cnx.load(file) as model:
        np.testing.assert_array_equal(saved["embedding"], model.outputs(list(saved["paths"]))["embedding"].numpy())


def test_pictures_are_drawn_of_a_file_and_of_a_checkpoint(
    command: Command, tiny_model: ConvNeXtV2, tmp_path: Path, photos: Path
) -> None:
    checkpoint = save_checkpoint(tmp_path / "ours.safetensors", tiny_model)
    options = {**OPTIONS, "checkpoint": checkpoint, "outputs": ("logits", "class-maps"), "output_dir": tmp_path}
    del options["num_classes"]
    file = cnx.export("tiny-test", precision="fp32", no_verify=True, **options)
    for artifact, words in ((file.path, ()), (checkpoint, ("--image-size", "96x64"))):
        images = (photos / "class-0" / "0.png", photos / "class-1" / "1.png")
        code, _, said = command("predict", artifact, *images, "--explain", tmp_path / "maps", *words)
        assert code == 0, said
        assert ("Grad-CAM beside them" in said) == (artifact == checkpoint)
        drawn = sorted((tmp_path / "maps").iterdir())
        assert len(drawn) == 2
        for path in drawn:
            with Image.open(path) as picture:
                assert picture.width > 300
    with cnx.load(checkpoint, image_size=64) as model, pytest.raises(InputError, match="--output class-maps"):
        model.explain(photos / "class-0" / "0.png", tmp_path / "none")
    with cnx.load(checkpoint, image_size=64, outputs="embedding") as model:
        found = model.predict(photos / "class-0" / "0.png")
        assert len(found.embedding) == 64, "a classifier's embedding is told as that of features is"
    with pytest.raises(InputError, match="no output 'bogus'"):
        cnx.load(checkpoint, outputs=["bogus"])
    code, _, said = command("predict", checkpoint, photos, "--task", "features", "--explain", tmp_path / "none")
    assert (code, "the task features has none" in said) == (2, True)
    code, _, said = command("eval", checkpoint, photos, "--task", "features")
    assert (code, "verify FILE --data FOLDER" in said) == (2, True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": "scores"}, "no output 'scores': expected logits, probabilities, top5"),
        ({"task": "features", "outputs": ("logits",)}, "no output 'logits': expected embedding, unit-embedding, maps"),
        ({"task": "features", "temperature": 2.0}, "does not allow temperature 2.0"),
        ({"outputs": ("logits", "maps"), "tta": "flip"}, "cannot average maps over an image and its mirror"),
        ({"outputs": ("embedding",), "temperature": 2.0}, "A temperature divides logits, and embedding have none"),
        ({"task": "features", "num_classes": 5}, "The task features has no classes"),
        ({"task": "feature"}, "Choose one of: classification, detect, features, multi-label, segment"),
        ({"outputs": ("class-maps",), "image_size": (64, 96, 128)}, "class-maps has a size that follows the image's"),
    ],
)
def test_what_cannot_be_given_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        cnx.export("tiny-test", precision="fp32", output_dir=tmp_path, **options)


def test_features_have_no_classes_to_choose(tiny_model: ConvNeXtV2, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "ours.safetensors", tiny_model)
    for options in ({"num_classes": 5}, {"reset_head": True}):
        with pytest.raises(InputError, match="The task features has no classes"):
            cnx.export("tiny-test", checkpoint=checkpoint, task="features", output_dir=tmp_path, **options)


def test_a_flip_averages_the_embeddings_of_both_images(tiny_variant: Variant) -> None:
    model = random_model(tiny_variant, 10, seed=1).double()
    spec = DeploySpec("fp64", SIZE, tta="flip", outputs=("embedding", "logits"))
    images = torch.rand(2, 3, *SIZE, dtype=torch.float64)
    with torch.inference_mode():
        sides: Sequence[Tensor] = [
            by_timm(model, normalised(spec, side))["embedding"] for side in (images, images.flip(-1))
        ]
        found = deploy_form(model, spec)(images)["embedding"]
    torch.testing.assert_close(found, (sides[0] + sides[1]) / 2, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_every_output_is_followed_and_compared_by_layer(
    command: Command, files: list[cnx.Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, said = command("diagnose", "layers", files[1].path)
    assert code == 0, out + said
    assert "no backend diverges" in out
    assert "not lined up" not in out
    code, out, said = command("diagnose", "chain", files[1].path, "--samples", "2")
    assert code == 0, out + said
    assert "3 steps passed" in out
