"""A foreign ONNX file is checked and run in a process of its own: what it does there, it does not do here."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from cnx_deploy.cli import main
from cnx_deploy.core.child_process import Limits
from cnx_deploy.core.errors import (
    CorruptArtifactError,
    InputError,
    MissingRequirementError,
    OutOfMemoryError,
    RefusedArtifactError,
)
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.data import image_like_batches
from cnx_deploy.exporters import onnx_admission
from cnx_deploy.exporters.graph_rules import check_graph
from cnx_deploy.exporters.onnx_admission import FirstRun, admission_task, admit_onnx
from cnx_deploy.runners import ort_session
from cnx_deploy.verification.predict import open_classifier
from tests.support.hostile_onnx import (
    DATA,
    SIDE,
    before_logits,
    foreign_classifier,
    peak_of_children_megabytes,
    written,
)


def test_a_sound_file_is_let_in_with_the_facts_that_a_check_here_finds(tmp_path: Path) -> None:
    path = written(tmp_path)
    found = admit_onnx(path, runs=True)
    assert found.facts == check_graph(path)
    assert found.run == FirstRun((1, 3, SIDE, SIDE), (1, 4), is_finite=True)
    assert found.checks[-1] == "one image through ONNX Runtime, in a process of its own"


def test_an_export_without_its_manifest_has_the_same_facts(tiny_onnx_fp16: Artifact, tmp_path: Path) -> None:
    """Names of axes, epsilons and sets come back from the child as they were."""
    path = tmp_path / "alone.onnx"
    path.write_bytes(tiny_onnx_fp16.path.read_bytes())
    assert admit_onnx(path).facts == check_graph(tiny_onnx_fp16.path)


def _bomb(model: onnx.ModelProto) -> None:
    """8 GB, of a size that is known only when it runs: no shape in the file says so."""
    nodes = [
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("ReduceProd", ["shape"], ["pixels"], keepdims=1),
        helper.make_node("Mul", ["pixels", "times"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["filled"]),
        helper.make_node("ReduceSum", ["filled"], ["sum"], keepdims=0),
    ]
    model.graph.initializer.append(helper.make_tensor("times", TensorProto.INT64, [1], [2_000_000_000 // 3072]))
    before_logits(model, *nodes, added="sum")


def _hang(model: onnx.ModelProto) -> None:
    """Products of matrices for a minute, in a few megabytes."""
    nodes = [
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("Slice", ["shape", "one", "two"], ["channels"]),
        helper.make_node("Mul", ["channels", "sides"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["work0"]),
        *(helper.make_node("MatMul", [f"work{i}", f"work{i}"], [f"work{i + 1}"]) for i in range(400)),
        helper.make_node("ReduceSum", ["work400"], ["sum"], keepdims=0),
    ]
    for name, values in (("one", [1]), ("two", [2]), ("sides", [700, 700])):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
    before_logits(model, *nodes, added="sum")


def test_a_bomb_that_only_a_run_sets_off_takes_bounded_memory(tmp_path: Path) -> None:
    path = written(tmp_path, _bomb)
    assert admit_onnx(path).run is None
    with pytest.raises(RefusedArtifactError, match=r"took more than 600 MB of memory and was ended") as caught:
        admit_onnx(path, runs=True, limits=Limits(60.0, 600_000_000))
    assert "Checking foreign.onnx failed" in str(caught.value)
    assert peak_of_children_megabytes() < 6_000


def test_a_bomb_that_loading_sets_off_is_refused_and_not_called_a_shortage_of_this_machine(tmp_path: Path) -> None:
    """A constant of 12 GB: as large as a value may be, folded while the session is made."""

    def fold(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(helper.make_tensor("size", TensorProto.INT64, [1], [3_000_000_000]))
        nodes = [
            helper.make_node("ConstantOfShape", ["size"], ["filled"]),
            helper.make_node("ReduceSum", ["filled"], ["sum"], keepdims=0),
        ]
        before_logits(model, *nodes, added="sum")

    with pytest.raises(RefusedArtifactError, match="took more than 600 MB of memory and was ended"):
        admit_onnx(written(tmp_path, fold), runs=True, limits=Limits(60.0, 600_000_000))


def test_memory_that_runs_short_in_the_child_is_the_files_doing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(path: Path) -> None:
        raise OutOfMemoryError("There is not enough memory: expected more. Free some.")

    monkeypatch.setattr(ort_session, "open_session", short)
    with pytest.raises(RefusedArtifactError, match=r"foreign\.onnx is refused: There is not enough memory"):
        admission_task(str(written(tmp_path)), runs=True)


def test_a_run_that_does_not_end_is_ended(tmp_path: Path) -> None:
    path, started = written(tmp_path, _hang), time.perf_counter()
    with pytest.raises(RefusedArtifactError, match=r"took more than 2\.5 s and was ended"):
        admit_onnx(path, runs=True, limits=Limits(2.5, 2 << 30))
    assert time.perf_counter() - started < 20.0


def test_a_file_that_changes_while_it_is_checked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    runs = onnx_admission.run_isolated

    def changing(*words: object, **named: object) -> object:
        found = runs(*words, **named)
        (tmp_path / DATA).write_bytes(np.zeros(12, np.float32).tobytes())
        return found

    monkeypatch.setattr(onnx_admission, "run_isolated", changing)
    with pytest.raises(CorruptArtifactError, match="was changed while it was checked"):
        admit_onnx(path)


def test_an_answer_of_another_form_than_asked_for_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_admission, "run_isolated", lambda *words, **named: {"facts": {"opset": "20"}, "run": None})
    with pytest.raises(RefusedArtifactError, match="its process gave another answer than was asked for"):
        admit_onnx(written(tmp_path))


METADATA = {
    "no object": ({"cnx_deploy.preprocessing": "[1]"}, "has metadata that is not JSON", CorruptArtifactError),
    "deep": ({"cnx_deploy.preprocessing": "[" * 100_000}, "has metadata that is not JSON", CorruptArtifactError),
    "names": (
        {"cnx_deploy.preprocessing": '{"image_size": 32}', "cnx_deploy.class_names": '[1, "a"]'},
        "has metadata that is not JSON",
        CorruptArtifactError,
    ),
    "unknown field": ({"cnx_deploy.preprocessing": '{"side": 32}'}, "Preprocessing has the fields", InputError),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_lies_is_one_message(name: str, tmp_path: Path) -> None:
    entries, text, kind = METADATA[name]
    path = written(tmp_path, lambda model: helper.set_model_props(model, entries))
    with pytest.raises(kind, match=text) as caught:
        open_classifier(path)
    assert type(caught.value) is kind


def _gray(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    model.graph.initializer[0].dims[0] = 1
    del model.graph.initializer[0].float_data[:]
    model.graph.initializer[0].raw_data = bytes(16)


def _any_side(model: onnx.ModelProto) -> None:
    for axis in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        axis.dim_param = "side"


def _two_outputs(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("means", TensorProto.FLOAT, ["batch", 3]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_gray, r"takes images tensor\(float\) \['batch', 1, 32, 32\]"),
        (_any_side, r"takes images tensor\(float\) \['batch', 3, 'side', 'side'\]"),
        (_two_outputs, r"gives logits tensor\(float\) \['batch', 4\], means tensor"),
    ],
)
def test_what_takes_no_images_is_an_input_error(
    change: Callable[[onnx.ModelProto], None], text: str, tmp_path: Path
) -> None:
    path = written(tmp_path, change, outside=False)
    with pytest.raises(InputError, match=text):
        admit_onnx(path, runs=True)
    assert admit_onnx(path).run is None


def test_a_bf16_file_is_let_in_without_a_run_and_predict_says_what_it_takes(tmp_path: Path) -> None:
    """ONNX Runtime's CPU has no BF16: to run it here would call a sound file corrupt."""

    def halved(model: onnx.ModelProto) -> None:
        nodes = [
            helper.make_node("Cast", ["bias"], ["half"], to=TensorProto.BFLOAT16),
            helper.make_node("Cast", ["half"], ["wide"], to=TensorProto.FLOAT),
        ]
        before_logits(model, *nodes, added="wide")

    path = written(tmp_path, halved)
    assert admit_onnx(path, runs=True).run is None
    with pytest.raises(
        MissingRequirementError, match=r"foreign\.onnx computes in BF16, which ONNX Runtime does not on a CPU"
    ):
        open_classifier(path)


def test_what_onnx_runtime_cannot_run_is_corrupt(tmp_path: Path) -> None:
    """A product whose sizes do not fit, which no static check sees."""

    def mismatch(model: onnx.ModelProto) -> None:
        nodes = [
            helper.make_node("Shape", ["images"], ["shape"]),
            helper.make_node("ConstantOfShape", ["shape"], ["ones"]),
            helper.make_node("Reshape", ["ones", "five"], ["fives"]),
            helper.make_node("ReduceSum", ["fives"], ["sum"], keepdims=0),
        ]
        model.graph.initializer.append(helper.make_tensor("five", TensorProto.INT64, [2], [-1, 5]))
        before_logits(model, *nodes, added="sum")

    with pytest.raises(CorruptArtifactError, match="ONNX Runtime cannot run"):
        admit_onnx(written(tmp_path, mismatch), runs=True)


def test_a_foreign_classifier_predicts_what_its_formula_says(tmp_path: Path) -> None:
    path = written(tmp_path)
    images = image_like_batches(2, SIDE, batch_size=2)
    with open_classifier(path) as classifier:
        assert any("one image through ONNX Runtime" in note for note in classifier.notes)
        pixels = next(iter(images)).permute(0, 3, 1, 2).float() / 255
        logits = classifier.runner.run(pixels)
    weights = torch.from_numpy(np.array(onnx.numpy_helper.to_array(foreign_classifier().graph.initializer[0])))
    expected = pixels.double().mean(dim=(2, 3)) @ weights.double() + 1.0
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)


def test_predict_refuses_a_bomb_before_this_process_has_run_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, _bomb)
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "image.png")
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(path), str(tmp_path), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (stop.value.code, document["error"]) == (4, "RefusedArtifactError")
    assert "of memory and was ended" in document["message"]
