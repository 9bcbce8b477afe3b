"""Model repositories of Triton: what is in them, what is refused, and what a check finds. No server runs here."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import cnx_deploy as cnx
from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.errors import DiskFullError, InputError, OutputExistsError
from cnx_deploy.core.manifest import EngineManifest, OnnxManifest
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import pixels
from cnx_deploy.data.preprocessing import runner_input
from cnx_deploy.serving.triton_config import config_from_text
from cnx_deploy.serving.triton_preprocessing import network_input
from tests.conftest import Command
from tests.support.artifacts import copy_artifact
from tests.support.installations import ROOT

NAMES = tuple(f"class {number}" for number in range(10))


def config_of(repository: Path, name: str) -> Any:
    return config_from_text((repository / name / "config.pbtxt").read_text(encoding="utf-8"))


def restated(artifact: cnx.Artifact, folder: Path, manifest: Any = None, **model: Any) -> cnx.Artifact:
    """The same file in another folder, under a manifest that says something else of the network."""
    made = copy_artifact(artifact, folder)
    manifest = manifest or replace(made.manifest, model=replace(made.manifest.model, **model))
    (folder / f"{made.manifest.stem}.json").write_text(manifest.to_json(), encoding="utf-8")
    return open_artifact(made.path)


def plan(engine: cnx.Artifact[EngineManifest], folder: Path, target: str, **changes: Any) -> cnx.Artifact:
    """A file with the manifest of a plan of TensorRT for a GPU: nothing here reads what is in a plan."""
    folder.mkdir(exist_ok=True)
    stem, content = f"tiny-test-32-fp16-trt-{target}", f"a plan for {target}".encode()
    (folder / f"{stem}.engine").write_bytes(content)
    old = engine.manifest
    file = replace(
        old.files[0], name=f"{stem}.engine", size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )
    request = replace(old.request, runtime="tensorrt", target=target, **changes)
    facts = replace(old.facts, runtime_version="10.13.3.9", gpu=None)
    manifest = replace(old, stem=stem, files=(file,), request=request, facts=facts)
    (folder / f"{stem}.json").write_text(manifest.to_json(), encoding="utf-8")
    return open_artifact(folder / f"{stem}.engine")


@pytest.fixture(scope="module")
def named(tiny_onnx_fp32: cnx.Artifact, tmp_path_factory: pytest.TempPathFactory) -> cnx.Artifact:
    """The smallest network with names for its ten classes."""
    return restated(tiny_onnx_fp32, tmp_path_factory.mktemp("named"), class_names=NAMES)


@pytest.fixture(scope="module")
def repository(named: cnx.Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its repository. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("triton") / "models"
    cnx.package(named, "triton", to=folder, name="net")
    return folder


def test_a_network_gets_three_models_with_what_its_manifest_says(
    tiny_onnx_fp32: cnx.Artifact, tmp_path: Path, cnx: Command
) -> None:
    code, printed, told = cnx("package", "triton", tiny_onnx_fp32.path, "--to", tmp_path / "models")
    name = tiny_onnx_fp32.manifest.stem
    assert code == 0
    assert f"{name}, {name}-preprocessing, {name}-network" in printed
    assert "weights are random" in told
    network, ensemble = (config_of(tmp_path / "models", f"{name}{end}") for end in ("-network", ""))
    assert (network.backend, network.max_batch_size, [*network.input[0].dims]) == ("onnxruntime", 8, [3, 32, 32])
    assert [*network.dynamic_batching.preferred_batch_size] == [4, 8]
    assert [warmup.batch_size for warmup in network.model_warmup] == [1, 4, 8]
    manifest = tiny_onnx_fp32.path.with_suffix(".json").read_bytes()
    for config in (network, ensemble):
        assert config.parameters["manifest_sha256"].string_value == hashlib.sha256(manifest).hexdigest()
        assert config.parameters["weights_licence"].string_value == tiny_onnx_fp32.manifest.model.weights.licence
        assert config.parameters["note"].string_value == "The weights are random: the answers mean nothing."
    version = tmp_path / "models" / f"{name}-network" / "1"
    assert (version / network.default_model_filename).read_bytes() == tiny_onnx_fp32.path.read_bytes()
    version = tmp_path / "models" / f"{name}-preprocessing" / "1"
    assert (version / "pixels.py").read_bytes() == Path(pixels.__file__).read_bytes()
    assert json.loads((version / "preprocessing.json").read_text())["preprocessing"]["mean"] == [0.485, 0.456, 0.406]


def test_options_say_how_the_server_batches_and_waits(tiny_onnx_fp32: cnx.Artifact, tmp_path: Path) -> None:
    words = {"max_delay_ms": 2.5, "queue_limit": 7, "queue_timeout_ms": 300, "instances": 3, "device": "gpu"}
    cnx.package(tiny_onnx_fp32, "triton", to=tmp_path / "models", name="net", version=4, **words)
    config = config_of(tmp_path / "models", "net-network")
    batching = config.dynamic_batching
    assert batching.max_queue_delay_microseconds == 2500
    assert batching.default_queue_policy.max_queue_size == 7
    assert batching.default_queue_policy.default_timeout_microseconds == 300_000
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (3, 1)
    assert (tmp_path / "models" / "net-network" / "4" / config.default_model_filename).is_file()


def test_a_repository_is_replaced_when_forced_and_nothing_else_is(tiny_onnx_fp32: cnx.Artifact, tmp_path: Path) -> None:
    place = tmp_path / "models"
    cnx.package(tiny_onnx_fp32, "triton", to=place, name="first")
    with pytest.raises(OutputExistsError, match="--force"):
        cnx.package(tiny_onnx_fp32, "triton", to=place, name="second")
    cnx.package(tiny_onnx_fp32, "triton", to=place, name="second", force=True)
    assert sorted(path.name for path in place.iterdir()) == ["second", "second-network", "second-preprocessing"]
    (place / "diary.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="something else"):
        cnx.package(tiny_onnx_fp32, "triton", to=place, name="third", force=True)
    assert (place / "diary.txt").read_text() == "mine"
    (place / "diary.txt").unlink()
    (place / "mine").mkdir()
    (place / "mine/config.pbtxt").write_text('backend: "python"')
    with pytest.raises(OutputExistsError, match="something else"):
        cnx.package(tiny_onnx_fp32, "triton", to=place, name="third", force=True)
    assert (place / "mine/config.pbtxt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_nothing_is_left_of_a_repository_that_cannot_be_written(
    tiny_onnx_fp32: cnx.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*words: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(DiskFullError, match="No room"):
        cnx.package(tiny_onnx_fp32, "triton", to=tmp_path / "models")
    assert list(tmp_path.iterdir()) == []


def test_two_networks_share_a_repository_and_two_of_one_name_do_not(
    tiny_onnx_fp32: cnx.Artifact, tiny_onnx_fp16: cnx.Artifact, tmp_path: Path
) -> None:
    made = cnx.package([tiny_onnx_fp32, tiny_onnx_fp16], "triton", to=tmp_path / "models")
    assert len(made.models) == 6
    assert cnx.check_package(tmp_path / "models").passed
    twin = copy_artifact(tiny_onnx_fp32, tmp_path / "twin")
    with pytest.raises(InputError, match="would have one name"):
        cnx.package([tiny_onnx_fp32, twin], "triton", to=tmp_path / "others")
    stem = f"{tiny_onnx_fp32.manifest.stem}-network"  # as a model of the other is called
    (twin.path.parent / f"{stem}.onnx").write_bytes(twin.path.read_bytes())
    file = replace(twin.manifest.files[0], name=f"{stem}.onnx")
    manifest = replace(twin.manifest, stem=stem, files=(file,)).to_json()
    (twin.path.parent / f"{stem}.json").write_text(manifest, encoding="utf-8")
    with pytest.raises(InputError, match="would have one name"):
        cnx.package([tiny_onnx_fp32, twin.path.parent / f"{stem}.onnx"], "triton", to=tmp_path / "others")
    with pytest.raises(InputError, match="is of one network"):
        cnx.package([tiny_onnx_fp32, tiny_onnx_fp16], "triton", to=tmp_path / "others", name="net")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"name": "a/b"}, r"cannot be a model's name"),
        ({"instances": 0}, r"instances is 0; expected a finite number, 1 or more"),
        ({"queue_timeout_ms": float("inf")}, r"queue_timeout_ms is inf"),
        ({"queue_timeout_ms": float("nan")}, r"queue_timeout_ms is nan"),
        ({"device": "tpu"}, r"No device is called 'tpu'"),
        ({"delay": 3}, r"There is no option 'delay'"),
    ],
)
def test_a_request_that_cannot_be_is_refused(
    tiny_onnx_fp32: cnx.Artifact, tmp_path: Path, fault: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        cnx.package(tiny_onnx_fp32, "triton", to=tmp_path / "models", **fault)
    assert not (tmp_path / "models").exists()


def test_an_engine_of_tensorrt_rtx_is_refused_with_the_reason(tiny_engine: cnx.Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"TensorRT-RTX, and Triton's tensorrt backend loads plans of TensorRT alone"):
        cnx.package(tiny_engine, "triton", to=tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_plans_for_several_gpus_are_one_model(tiny_engine: cnx.Artifact, tmp_path: Path, cnx: Command) -> None:
    plans = [plan(tiny_engine, tmp_path / "engines", target) for target in ("sm86", "sm89")]
    code, printed, told = cnx("package", "triton", *(made.path for made in plans), "--to", tmp_path / "models")
    assert code == 0
    assert printed.strip().endswith("tiny-test-32-fp16-trt-network")
    assert told.count("plan of TensorRT 10.13.3.9") == 2
    config = config_of(tmp_path / "models", "tiny-test-32-fp16-trt-network")
    assert config.backend == "tensorrt"
    assert dict(config.cc_model_filenames) == {
        "8.6": "tiny-test-32-fp16-trt-sm86.engine",
        "8.9": "tiny-test-32-fp16-trt-sm89.engine",
    }
    assert config.parameters["tensorrt_version"].string_value == "10.13.3.9"
    assert [*config.instance_group[0].profile] == ["0", "1"]  # or Triton would take the first alone, of batch 1
    assert [*config.dynamic_batching.preferred_batch_size] == [1, 4, 8]
    assert [(row.name, [*row.dims]) for row in config.output] == [("logits", [10])]


def test_a_plan_that_lacks_a_batch_size_is_refused(tiny_engine: cnx.Artifact, tmp_path: Path) -> None:
    gap = plan(tiny_engine, tmp_path / "gap", "sm89", batches=((1, 1, 1), (4, 4, 8)))
    with pytest.raises(InputError, match="no profile for a batch of 2"):
        cnx.package(gap, "triton", to=tmp_path / "models")
    late = plan(tiny_engine, tmp_path / "late", "sm89", batches=((4, 4, 8),))
    with pytest.raises(InputError, match="takes batches from 4, and Triton runs what has arrived"):
        cnx.package(late, "triton", to=tmp_path / "models")


def test_a_bf16_file_is_for_servers_with_a_gpu(tiny_onnx_bf16: cnx.Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no BF16 convolution on a CPU"):
        cnx.package(tiny_onnx_bf16, "triton", to=tmp_path / "models")
    cnx.package(tiny_onnx_bf16, "triton", to=tmp_path / "models", device="gpu")
    assert config_of(tmp_path / "models", "tiny-test-32-bf16-network").instance_group[0].kind == 1


def test_without_pictures_of_its_kind_a_network_stands_alone_and_that_is_said(
    tiny_onnx_fp32: cnx.Artifact, tmp_path: Path
) -> None:
    wide = Preprocessing(image_size=32, mean=(0.5,) * 6, std=(0.2,) * 6)
    manifest: OnnxManifest = tiny_onnx_fp32.manifest  # type: ignore[assignment]
    deploy = replace(manifest.request.deploy, mean=wide.mean, std=wide.std)
    changed = replace(
        manifest,
        request=replace(manifest.request, deploy=deploy),
        model=replace(manifest.model, preprocessing=wide),
        facts=replace(
            manifest.facts, inputs={"images": replace(manifest.facts.inputs["images"], shape=("b", 6, 32, 32))}
        ),
    )
    made = cnx.package(restated(tiny_onnx_fp32, tmp_path / "wide", changed), "triton", to=tmp_path / "models")
    assert made.models == ("tiny-test-32-fp32-network",)
    assert any("its images have 6 channels, and picture files have 1 to 4" in text for text in made.notes)
    assert cnx.check_package(tmp_path / "models").passed


def test_an_inference_service_of_kserve_points_at_the_repository(tiny_onnx_fp32: cnx.Artifact, tmp_path: Path) -> None:
    place = "s3://bucket/models: 'x'"
    cnx.package(tiny_onnx_fp32, "triton", to=tmp_path / "models", name="My_Net.2", storage_uri=place)
    service = yaml.safe_load((tmp_path / "models" / "inference-service.yaml").read_text(encoding="utf-8"))
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", service["metadata"]["name"])
    assert service["spec"]["predictor"]["model"] == {
        "modelFormat": {"name": "triton"}, "protocolVersion": "v2", "storageUri": place,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["uint8", "float", "normalised"])
def test_the_servers_images_are_those_of_predict_to_the_bit(kind: str) -> None:
    every = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)  # each value in each channel
    preprocessing = Preprocessing(mean=(0.4815, 0.4578, 0.4082), std=(0.2686, 0.2613, 0.2757))
    expected = runner_input(torch.from_numpy(every)[None], kind, preprocessing)[0].numpy()
    assert np.array_equal(network_input(every, kind, preprocessing), expected)


def test_the_environment_of_the_server_decodes_and_computes_as_the_tests_do() -> None:
    pins = [
        dict(line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line)
        for name in ("constraints-triton.txt", "constraints.txt")
    ]
    assert pins[0]["pillow"] == pins[1]["pillow"]
    assert pins[0]["onnxruntime"] == pins[1]["onnxruntime-gpu"]
    assert pins[0]["numpy"].startswith("1.")


def test_a_repository_that_was_written_has_nothing_wrong(repository: Path, cnx: Command) -> None:
    code, printed, _ = cnx("package", "check", repository)
    assert (code, printed.strip()) == (0, f"{repository}: 3 models, nothing wrong")


def test_a_folder_without_models_is_refused(tmp_path: Path, cnx: Command) -> None:
    code, _, told = cnx("package", "check", tmp_path)
    assert code == 2
    assert "holds no models" in told
    code, _, told = cnx("package", "check", tmp_path / "nowhere")
    assert (code, "nowhere is no folder" in told) == (2, True)


def text_of(model: str, old: str, new: str, file: str = "config.pbtxt", times: int = 1) -> Callable[[Path], None]:
    """A fault: in a file of a model, by default its configuration, a text stands for another, once."""

    def change(repository: Path) -> None:
        path = repository / model / file
        content = path.read_text(encoding="utf-8")
        assert old in content
        path.write_text(content.replace(old, new, times), encoding="utf-8")

    return change


def gone(pattern: str) -> Callable[[Path], None]:
    """A fault: a file is missing."""
    return lambda repository: next(repository.glob(pattern)).unlink()


def other(path: str, content: bytes) -> Callable[[Path], None]:
    """A fault: a file has another content."""

    def change(repository: Path) -> None:
        assert (repository / path).is_file()
        (repository / path).write_bytes(content)

    return change


def recorded(old: str, new: str) -> Callable[[Path], None]:
    """A fault in what the preprocessing is told."""
    return text_of("net-preprocessing", old, new, "1/preprocessing.json")


def flip_a_byte(repository: Path) -> None:
    path = next((repository / "net-network" / "1").glob("*.onnx"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


MUTANTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "folder of another name": (
        lambda repository: (repository / "net-network").rename(repository / "other"),
        r"it is called 'net-network', and its folder 'other'",
    ),
    "no such field": (text_of("net", "max_batch_size", "max_batch"), r'\d+:\d+ .*no field named "max_batch"'),
    "no such type": (text_of("net-network", "TYPE_FP32", "TYPE_FLOAT"), r"no value named TYPE_FLOAT"),
    "no such backend": (text_of("net-network", '"onnxruntime"', '"onnx"'), r"no backend is called 'onnx'"),
    "preferred above the largest": (
        text_of("net-network", "batch_size: 8\n  max", "batch_size: 9\n  max"),
        r"preferred_batch_size 9 is not from 1 to",
    ),
    "largest above the file's": (
        text_of("net-network", "max_batch_size: 8", "max_batch_size: 16"),
        r"takes batches of 1 to 8",
    ),
    "batch not open": (
        text_of("net-network", "max_batch_size: 8", "max_batch_size: 0"),
        r"dynamic_batching needs a max_batch_size",
    ),
    "wrong output dimension": (
        text_of("net-network", "dims: 10", "dims: 11"),
        r"the output logits is FP32 \[11\]; .* has FP32 \[10\]",
    ),
    "wrong input layout": (
        text_of("net-network", "dims: 3\n  dims: 32\n  dims: 32", "dims: 32\n  dims: 32\n  dims: 3"),
        r"the input images is FP32 \[32, 32, 3\]",
    ),
    "wrong type": (text_of("net-network", "TYPE_FP32", "TYPE_FP16"), r"the input images is FP16"),
    "wrong output name": (
        text_of("net-network", 'name: "logits"', 'name: "scores"'),
        r"its outputs are scores; .* has logits",
    ),
    "ensemble maps to a missing input": (
        text_of("net", 'input_map {\n      key: "images"', 'input_map {\n      key: "picture"'),
        r"net-network has no input 'picture'",
    ),
    "ensemble reads what nobody makes": (
        text_of("net", 'value: "pixels"', 'value: "pixel"'),
        r"net-network reads pixels, which is no input",
    ),
    "ensemble of a missing model": (text_of("net", "net-preprocessing", "net-pre"), r"a step is of 'net-pre'"),
    "ensemble gives another shape": (
        text_of("net", "dims: 10", "dims: 5"),
        r"its output logits is FP32 \[5\], and what makes it gives FP32 \[10\]",
    ),
    "ensemble batches more": (
        text_of("net", "max_batch_size: 8", "max_batch_size: 64"),
        r"max_batch_size is 64, and net-preprocessing has 8",
    ),
    "another crop": (recorded("0.875", "0.9"), r"makes images by crop_ratio 0\.9, not by 0\.875"),
    "another mean": (recorded("0.485", "0.5"), r"makes images by mean"),
    "another kind of input": (recorded('"float"', '"uint8"'), r"makes images by 'uint8', not by 'float'"),
    "pixels of another version": (
        text_of("net-preprocessing", "89_000_000", "99_000_000", "1/pixels.py"),
        r"pixels\.py is not that of this version",
    ),
    "a class less": (other("net-network/labels.txt", b"a\nb\n"), r"labels\.txt has 2 names for the 10 classes"),
    "no labels": (gone("net/labels.txt"), r"class names of logits cannot be read"),
    "no version": (lambda repository: shutil.rmtree(repository / "net-network" / "1"), r"it has no version"),
    "no file": (gone("net-network/1/*.onnx"), r"is not there, and the backend onnxruntime loads it"),
    "a file that was changed": (flip_a_byte, r"was altered: SHA-256"),
    "no manifest": (gone("net-network/1/*.json"), r"has no manifest"),
    "another licence": (
        text_of("net-network", "none (random weights)", "MIT"),
        r"the parameter weights_licence is 'MIT'",
    ),
    "warm-up above the largest": (
        text_of("net-network", "\n  batch_size: 8", "\n  batch_size: 80"),
        r"has a batch of 80, above",
    ),
    "warm-up of another shape": (
        text_of("net-network", "      dims: 32\n      zero", "      dims: 64\n      zero"),
        r"gives images as FP32 \[3, 32, 64\]",
    ),
    "warm-up without its picture": (gone("net-preprocessing/warmup/picture"), r"warmup/picture is not there"),
    "warm-up of no type": (
        text_of("net-preprocessing", "data_type: TYPE_STRING", "data_type: TYPE_INVALID", times=3),
        r"the input image has no data_type",
    ),
    "classes of no dimension": (text_of("net-network", "  dims: 10\n", ""), r"the output logits has dims \[\]"),
    "a name that is a list": (recorded('"image"', '["image"]'), r"does not say how images are made"),
    "a picture cut short": (other("net-preprocessing/warmup/picture", b"\xff\0\0\0ab"), r"no tensor of 1 byte strings"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_check_finds_a_fault_and_names_its_reason(name: str, repository: Path, tmp_path: Path, cnx: Command) -> None:
    fault, reason = MUTANTS[name]
    shutil.copytree(repository, tmp_path / "models")
    fault(tmp_path / "models")
    code, printed, _ = cnx("package", "check", tmp_path / "models")
    assert code == 3
    assert re.search(reason, printed), printed


def test_plans_under_the_wrong_gpu_are_found(tiny_engine: cnx.Artifact, tmp_path: Path) -> None:
    plans = [plan(tiny_engine, tmp_path / "engines", target) for target in ("sm86", "sm89")]
    cnx.package(plans, "triton", to=tmp_path / "models", name="net")
    text_of("net-network", 'key: "8.6"', 'key: "8.0"')(tmp_path / "models")
    assert any(
        "is for compute capability 8.6, not 8.0" in row for row in cnx.check_package(tmp_path / "models").findings
    )
