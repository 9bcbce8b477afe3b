"""A task with another head, added from outside, is taken by every stage without another edit."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

import cnx_deploy as cnx
from cnx_deploy.cli import cli
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError, ParityError
from cnx_deploy.core.gates import Gate, OutputSpec
from cnx_deploy.core.variants import Variant
from cnx_deploy.diagnosis import chain
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.deploy import deploy_form
from cnx_deploy.model.deploy_layers import TokenNorm, doubles, linear, widen
from cnx_deploy.model.layers import EPS
from cnx_deploy.model.tasks import base
from cnx_deploy.model.tasks.base import Outputs, Prediction, Task, find_task, register_task
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.verification.saved_results import judge_saved

PICTURE = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(0))
WIDTH = 6
"""Values of the embedding."""


class TwoLayers(nn.Module):
    """A linear layer for the labels, and one whose result is the embedding; stage 3 is read beside stage 4."""

    def __init__(self, labels: nn.Linear, embedding: nn.Linear) -> None:
        super().__init__()
        self.labels, self.embedding = labels, embedding


@dataclass(frozen=True, slots=True)
class Labels(Prediction):
    """The labels whose score is above zero, and the embedding's length."""

    labels: tuple[str, ...] = ()
    length: float = 0.0

    def __str__(self) -> str:
        return Prediction.__str__(self) if self.error else f"{', '.join(self.labels) or 'none'} ({self.length:.2f})"


class SeveralHeads(Task):
    """Several labels an image from the last stage, and an embedding of the one before: two outputs of two kinds."""

    name = "several-heads"
    levels = (2, 3)
    operators = MappingProxyType({"LayerNormalization": 1})
    prediction = Labels

    def outputs(self, num_classes: int, words: Any = (), maps: Any = ()) -> tuple[OutputSpec, ...]:
        return OutputSpec("labels", (num_classes,), "logit", "sigmoid"), OutputSpec("embedding", (WIDTH,), "feature")

    def modules(self, variant: Variant, num_classes: int) -> dict[str, nn.Module]:
        last, before = variant.dims[3], variant.dims[2]
        head = TwoLayers(nn.Linear(last, num_classes), nn.Linear(before, WIDTH))
        return {"norm": nn.LayerNorm(last, eps=EPS), "head": head}

    def forward(
        self, network: Any, maps: Mapping[int, Tensor], words: Any = (), *, temperature: float = 1.0
    ) -> Outputs:
        pooled = {level: output.mean(dim=(-2, -1)) for level, output in maps.items()}
        return {
            "labels": network.head.labels(network.norm(pooled[3])),
            "embedding": network.head.embedding(pooled[2]),
        }

    def deployed_modules(self, model: ConvNeXtV2, spec: DeploySpec) -> dict[str, nn.Module]:
        head = model.head
        layers = TwoLayers(linear(*doubles(head.labels)), linear(*doubles(head.embedding)))  # type: ignore[arg-type]
        return {"norm": TokenNorm(*doubles(model.norm)), "head": layers}

    def deployed_forward(self, network: Any, maps: Mapping[int, Tensor], words: Any = ()) -> Outputs:
        kind = network.head.labels.weight.dtype
        pooled = {level: widen(output).mean(dim=(2, 3)) for level, output in maps.items()}
        return {
            "labels": widen(network.head.labels(network.norm(pooled[3]).to(kind))),
            "embedding": widen(network.head.embedding(pooled[2].to(kind))),
        }

    def predictions(
        self, outputs: Mapping[str, Tensor], paths: Sequence[str], class_names: Sequence[str] | None, *, top: int
    ) -> list[Prediction]:
        names = class_names or [str(index) for index in range(outputs["labels"].shape[1])]
        return [
            Labels(
                path, labels=tuple(name for name, score in zip(names, scores, strict=True) if score > 0), length=size
            )
            for path, scores, size in zip(
                paths, outputs["labels"].tolist(), outputs["embedding"].norm(dim=1).tolist(), strict=True
            )
        ]

    def num_classes_in(self, state: Mapping[str, Tensor]) -> int | None:
        return len(state["head.labels.weight"]) if "head.labels.weight" in state else None

    def gate(self, gate: Gate) -> Gate:
        return replace(gate, name=f"{gate.name} several-heads")

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs["labels"], targets, reduction="none").mean(dim=1)


@pytest.fixture(scope="module")
def task() -> Iterator[SeveralHeads]:
    task = SeveralHeads()
    register_task(task)
    yield task
    del base._TASKS[task.name]


@pytest.fixture(scope="module")
def files(task: SeveralHeads, tmp_path_factory: pytest.TempPathFactory) -> list[cnx.Artifact]:
    """Random weights of the smallest network with the head of the task, in FP32 and FP16."""
    folder = tmp_path_factory.mktemp("task")
    options: dict[str, Any] = {"image_size": 32, "num_classes": 10, "batch": (2, 2, 2), "output_dir": folder}
    return cnx.export("tiny-test", task=task.name, precision=("fp32", "fp16"), **options)


def test_its_outputs_are_exported_and_each_is_judged_by_its_gate(files: list[cnx.Artifact]) -> None:
    for artifact in files:
        assert artifact.manifest.model.task == "several-heads"
        assert {name: spec.shape for name, spec in artifact.manifest.facts.outputs.items()} == {
            "labels": (2, 10), "embedding": (2, WIDTH),
        }  # fmt: skip
        found = {result.output: result for result in artifact.manifest.facts.parity}
        assert list(found) == ["labels", "embedding"]
        assert {result.gate.name for result in found.values()} == {f"{artifact.manifest.precision.name} several-heads"}
        assert found["labels"].differences.top1_agreement == 1.0
        assert found["embedding"].differences.top1_agreement is None, "a feature is no decision"


@pytest.mark.usefixtures("quick_timing")
def test_it_is_verified_timed_and_used(files: list[cnx.Artifact], tmp_path: Path) -> None:
    report = cnx.verify(files, samples=2, save_outputs=str(tmp_path / "saved"))
    assert report.passed, str(report)
    assert {row.gate.name for row in report.results[1].results} == {"fp16 several-heads"}
    again = [judged.to_dict()["results"] for judged in judge_saved(tmp_path / "saved")]
    assert again == [judged.to_dict()["results"] for judged in report.results], "saved outputs are judged the same"
    assert [(row.candidate, row.output) for row in report.results[1].results] == [
        (runner, output)
        for runner in ("onnxruntime fp16", "emulator fp16") for output in ("labels", "embedding")
    ]  # fmt: skip
    timed = cnx.benchmark(files[0], batch=2, compare=["torch", "timm"], duration_seconds=0.05, threads=1)
    assert {row.name: row.correctness.failures for row in timed.rows if row.correctness} == {
        "torch eager fp32": (), "tiny-test-several-heads-32-fp32.onnx": (),
    }  # fmt: skip
    assert "no counterpart of several-heads" in timed.not_run[0].reason
    with cnx.load(files[0]) as model:
        answer = model.predict(PICTURE)
        assert isinstance(answer, Labels)
        assert answer.labels
        broken = model.predict([tmp_path / "absent.png"])[0]
    assert (type(broken), broken.labels, "absent.png" in broken.error) == (Labels, (), True)


def test_the_commands_show_it(files: list[cnx.Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain's first step is the FP32 file that is there: tests/diagnosis/test_chain.py has one exported."""
    monkeypatch.setattr(chain, "_export_fp32", lambda *_: files[0])

    def cnx_deploy(*words: object) -> str:
        result = CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    (tmp_path / "image.png").write_bytes(_png())
    assert "labels" in cnx_deploy("verify", files[0].path, "--samples", 2)
    (row,) = json.loads(cnx_deploy("predict", files[0].path, tmp_path / "image.png", "--json"))["predictions"]
    assert row.keys() == {"path", "error", "labels", "length"}
    assert "several-heads" in cnx_deploy("inspect", files[0].path)
    for command in ("layers", "chain"):
        cnx_deploy("diagnose", command, files[1].path)


@pytest.mark.slow
def test_an_engine_compiles_and_names_its_outputs(files: list[cnx.Artifact], tmp_path: Path) -> None:
    engine = cnx.build_engine(files[1], target="sm89", output_dir=tmp_path)
    assert (engine.manifest.model.task, engine.manifest.facts.half_share_of_products) == ("several-heads", 1.0)
    compiled = engine.manifest.facts.compiled
    assert compiled is not None
    assert "other" not in {kernel.block for kernel in compiled.kernel_list}, "every kernel of the head is known as such"


def test_a_fault_in_one_output_alone_stops_the_export_and_is_named(
    task: SeveralHeads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = SeveralHeads.deployed_forward

    def wrong(self: SeveralHeads, network: Any, maps: Mapping[int, Tensor], words: Any = ()) -> Outputs:
        outputs = right(self, network, maps)
        return {**outputs, "embedding": outputs["embedding"] * 1.001}

    monkeypatch.setattr(SeveralHeads, "deployed_forward", wrong)
    options: dict[str, Any] = {"image_size": 32, "num_classes": 10, "batch": (1, 1, 1), "output_dir": tmp_path}
    with pytest.raises(ParityError, match="differs from PyTorch in embedding: relative L2"):
        cnx.export("tiny-test", task=task.name, precision="fp32", **options)
    assert list(tmp_path.iterdir()) == []


def test_its_deploy_form_is_exact_in_float64(task: SeveralHeads, tiny_variant: Variant) -> None:
    model, spec = random_model(tiny_variant, 10, task=task).double(), DeploySpec("fp64", 32)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (spec.mean, spec.std))
    with torch.inference_mode():
        expected, found = model((images - mean) / std), deploy_form(model, spec)(images)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def test_a_checkpoint_knows_its_task_and_a_new_head_is_of_the_task_asked_for(
    task: SeveralHeads, tiny_variant: Variant, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path / "own.safetensors", random_model(tiny_variant, 10, task=task))
    loaded = load_checkpoint(path, tiny_variant)
    assert (loaded.model.task.name, loaded.model.num_classes) == ("several-heads", 10)
    plain = save_checkpoint(tmp_path / "plain.safetensors", random_model(tiny_variant, 10))
    changed = load_checkpoint(plain, tiny_variant, task=task.name, num_classes=3, reset_head=True)
    assert changed.model(torch.rand(1, 3, 32, 32))["labels"].shape == (1, 3)
    assert torch.equal(changed.model.norm.weight, load_checkpoint(plain, tiny_variant).model.norm.weight)


def test_labels_of_classes_are_refused_where_a_task_has_no_metrics(files: list[cnx.Artifact], tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(_png())
    with pytest.raises(InputError, match="several-heads has no metrics"):
        cnx.evaluate(files[0], tmp_path)


@pytest.mark.parametrize(
    ("words", "named"), [({"tta": "flip"}, "tta flip"), ({"temperature": 2.0}, r"temperature 2\.0")]
)
def test_an_answer_that_a_task_does_not_allow_is_refused_by_name(
    task: SeveralHeads, tiny_variant: Variant, tmp_path: Path, words: dict[str, Any], named: str
) -> None:
    checkpoint = save_checkpoint(tmp_path / "own.safetensors", random_model(tiny_variant, 10, task=task))
    options: dict[str, Any] = {"image_size": 32, "checkpoint": checkpoint, "output_dir": tmp_path / "export", **words}
    for refuse in (
        lambda: cnx.export("tiny-test", **options),
        lambda: cnx.load(checkpoint, **words),
        lambda: cnx.headroom(checkpoint, samples=1, **words),
    ):
        with pytest.raises(InputError, match=f"The task several-heads does not allow {named}"):
            refuse()
    assert not list((tmp_path / "export").glob("*.onnx"))
    for folder in ("a", "b"):
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / folder / "0.png").write_bytes(_png())
    with pytest.raises(InputError, match="several-heads has no logits of classes"):
        cnx.fit_temperature(checkpoint, tmp_path / "data")


def test_a_flip_averages_every_output_of_a_task_that_allows_it(
    task: SeveralHeads, tiny_variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SeveralHeads, "allows_flip", True)
    model, spec = random_model(tiny_variant, 10, task=task).double(), DeploySpec("fp64", (37, 45), tta="flip")
    images = torch.rand(2, 3, 37, 45, dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (spec.mean, spec.std))
    with torch.inference_mode():
        one, other = (model((each - mean) / std) for each in (images, images[..., range(45)[::-1]]))
        deployed, reference = deploy_form(model, spec)(images), reference_runner(model, spec).module(images)
    for name in ("labels", "embedding"):
        for found in (deployed, reference):
            torch.testing.assert_close(found[name], (one[name] + other[name]) / 2, rtol=1e-12, atol=1e-12)


def test_an_unknown_task_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"No task is called 'depth'\. Choose one of: classification"):
        find_task("depth")


def test_the_loss_of_a_classifier_is_cross_entropy() -> None:
    logits, targets = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    found = find_task("classification").loss({"logits": logits}, targets)
    torch.testing.assert_close(found, -logits.log_softmax(dim=1).gather(1, targets[:, None]).flatten())


SCORES = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
CLASSES = torch.arange(8) % 5
ONE_HOT = F.one_hot(CLASSES, 5).double()
MIXED = ONE_HOT * 0.7 + ONE_HOT.roll(1, 0) * 0.3
WEIGHTS = torch.tensor([0.2, 0.5, 1.0, 4.0, 0.0], dtype=torch.float64)


def loss_of(scores: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return find_task("classification").loss({"logits": scores}, targets, **options)


@pytest.mark.parametrize("targets", [CLASSES, MIXED], ids=["classes", "mixed"])
def test_class_weights_and_gamma_zero_are_torchs_cross_entropy(targets: Tensor) -> None:
    expected = F.cross_entropy(SCORES, targets, weight=WEIGHTS, reduction="none")
    torch.testing.assert_close(loss_of(SCORES, targets, class_weights=WEIGHTS), expected, rtol=1e-12, atol=1e-12)
    assert float((loss_of(SCORES, targets) - expected).abs().max()) > 0.1
    ones = torch.ones(5, dtype=torch.float64)
    smoothed = F.cross_entropy(SCORES, targets, label_smoothing=0.1, reduction="none")
    for options in ({"class_weights": ones}, {"focal_gamma": 1e-9}, {"focal_gamma": 0.0}):
        found = loss_of(SCORES, targets, label_smoothing=0.1, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(found, smoothed, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_the_focal_loss_is_torchvisions_for_two_classes_and_the_papers_sum_for_more(gamma: float) -> None:
    scores, classes = SCORES[:, :2], CLASSES % 2
    binary = sigmoid_focal_loss(scores[:, 1] - scores[:, 0], classes.double(), alpha=0.8, gamma=gamma)
    found = loss_of(scores, classes, focal_gamma=gamma, class_weights=torch.tensor([0.2, 0.8], dtype=torch.float64))
    torch.testing.assert_close(found, binary, rtol=1e-10, atol=1e-12)
    p = SCORES.softmax(dim=1)
    for targets, shares in ((CLASSES, ONE_HOT), (MIXED, MIXED)):
        plain = -(shares * (1 - p) ** gamma * p.log()).sum(dim=1)
        torch.testing.assert_close(loss_of(SCORES, targets, focal_gamma=gamma), plain, rtol=1e-10, atol=1e-12)
        # Smoothing goes over the weighted shares.
        smoothed = 0.9 * shares * WEIGHTS + 0.1 / 5 * (shares * WEIGHTS).sum(dim=1, keepdim=True)
        words: dict[str, Any] = {"focal_gamma": gamma, "class_weights": WEIGHTS, "label_smoothing": 0.1}
        expected = -(smoothed * (1 - p) ** gamma * p.log()).sum(dim=1)
        torch.testing.assert_close(loss_of(SCORES, targets, **words), expected, rtol=1e-10, atol=1e-12)
        learning = SCORES.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda given, to=targets, by=words: loss_of(given, to, **by), (learning,))


def test_the_focal_loss_takes_the_gradient_from_easy_images_and_stays_finite_where_one_is_certain() -> None:
    def gradient(score: float, **options: Any) -> float:
        scores = torch.tensor([[score, 0.0]], requires_grad=True)
        loss_of(scores, torch.tensor([0]), **options).sum().backward()
        assert scores.grad is not None
        return -float(scores.grad[0, 0])

    easy, hard = (gradient(score, focal_gamma=2.0) / gradient(score) for score in (4.0, -4.0))
    assert easy < 0.01  # 3 (1 - p)^2 at most
    assert 0.9 < hard < 1.2
    for gamma in (0.5, 1.0, 2.0):
        assert gradient(200.0, focal_gamma=gamma) == 0.0  # p is 1 in FP32
        assert gradient(-200.0, focal_gamma=gamma) == 1.0


def test_smoothing_leaves_the_large_class_first_for_its_images_where_torchs_weights_do_not() -> None:
    """The network's best answer to an image has shares as the weights of the logarithms in its loss."""
    balanced = torch.tensor([0.505, 50.5])  # of 1000 and 10 images

    def best_share(loss: Callable[[Tensor], Tensor]) -> float:
        shares = torch.linspace(0.001, 0.999, 999)
        scores = torch.stack([shares.log(), (1 - shares).log()], dim=1)
        return float(shares[loss(scores).argmin()])

    large = torch.zeros(999, dtype=torch.long)
    assert best_share(
        lambda given: loss_of(given, large, class_weights=balanced, label_smoothing=0.1)
    ) == pytest.approx(0.95, abs=0.002)
    torchs = best_share(lambda given: F.cross_entropy(given, large, balanced, label_smoothing=0.1, reduction="none"))
    assert torchs < 0.2


def test_an_option_that_a_tasks_loss_does_not_take_is_refused_by_name(task: SeveralHeads) -> None:
    task.check_loss_takes(["label_smoothing"])
    find_task("classification").check_loss_takes(["label_smoothing", "class_weights", "focal_gamma"])
    with pytest.raises(
        InputError, match=r"several-heads does not take class_weights, focal_gamma\. Leave --class-weights"
    ):
        task.check_loss_takes(["label_smoothing", "class_weights", "focal_gamma"])


def _png() -> bytes:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray((PICTURE * 255).byte().permute(1, 2, 0).numpy()).save(stream, "PNG")
    return stream.getvalue()
