"""A soup: the mean of several checkpoints of one network, and what its record says."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cnx_deploy import api
from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.errors import CheckpointError, CorruptArtifactError, InputError, OutputExistsError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.model.checkpoint import hash_weights, load_checkpoint, mean_of, resolve_model, save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.recorded import recorded_model
from cnx_deploy.training import TrainingSpec, initial_model
from cnx_deploy.verification.provenance import check_provenance
from tests.conftest import Command

NAMES = ("cat", "dog", "newt")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def saved(path: Path, seed: int, **words: Any) -> Path:
    variant, classes = words.pop("variant", "tiny-test"), words.pop("classes", 3)
    known: dict[str, Any] = {"class_names": NAMES, "preprocessing": Preprocessing(32), "licence": f"licence {seed}"}
    return save_checkpoint(path, random_model(variant, classes, seed=seed), **{**known, **words})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints a to c of one network, and in `export` the file of their mean. Do not change."""
    folder = tmp_path_factory.mktemp("soup")
    files = [saved(folder / f"{name}.safetensors", seed) for seed, name in enumerate("abc")]
    api.export("tiny-test", **words_of(files, folder))
    return folder


@pytest.fixture
def files(made: Path, tmp_path: Path) -> list[Path]:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return [tmp_path / f"{name}.safetensors" for name in "abc"]


@pytest.fixture
def exported(files: list[Path]) -> Artifact:
    (manifest,) = (files[0].parent / "export").glob("*.json")
    return open_artifact(manifest)


def words_of(files: list[Path], folder: Path, **more: Any) -> dict[str, Any]:
    words = {"precision": "fp32", "batch": (1, 2, 4), "no_verify": True, "output_dir": folder / "export"}
    return {"checkpoint": files[0], "soup": [str(path) for path in files[1:]], **words, **more}


def states(files: list[Path]) -> list[dict[str, np.ndarray[Any, Any]]]:
    loaded = [load_checkpoint(path).model.state_dict() for path in files]
    return [{name: tensor.numpy() for name, tensor in state.items()} for state in loaded]


def test_a_soup_is_the_mean_of_the_tensors_in_float64_rounded_once(files: list[Path]) -> None:
    first, second, third = states(files)
    found = load_checkpoint(files[0], soup=files[1:])
    rounded_on_the_way = 0
    for name, tensor in found.model.state_dict().items():
        exact = (first[name].astype(np.float64) + second[name] + third[name]) / 3.0
        np.testing.assert_array_equal(tensor.numpy(), exact.astype(np.float32), err_msg=name)
        rounded_on_the_way += int(((first[name] + second[name] + third[name]) / np.float32(3) != tensor.numpy()).sum())
    assert rounded_on_the_way > 0, "in float32 it would be another mean"
    assert (found.class_names, found.preprocessing) == (NAMES, Preprocessing(32))
    assert found.weights.licence == "licence 0; licence 1; licence 2"
    assert found.notes[0] == f"the mean of 3 checkpoints: {', '.join(map(str, files))}"


@pytest.mark.parametrize("copies", [1, 2, 3, 7])
def test_a_file_alone_and_any_number_of_times_is_itself_to_the_bit(files: list[Path], copies: int) -> None:
    alone, found = load_checkpoint(files[0]), load_checkpoint(files[0], soup=files[:1] * (copies - 1))
    assert found.weights.sha256 == alone.weights.sha256 == hash_weights(found.model)
    assert len(found.weights.soup) == (copies if copies > 1 else 0)


def test_files_of_other_layouts_and_types_are_averaged_as_the_network_that_they_hold(tmp_path: Path) -> None:
    plain, other = (random_model("tiny-test", 3, seed=seed).state_dict() for seed in (0, 1))
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in plain.items()}}, tmp_path / "plain.pt")
    torch.save({name: tensor.double() for name, tensor in other.items()}, tmp_path / "other.pt")
    found = load_checkpoint(tmp_path / "plain.pt", "tiny-test", soup=[tmp_path / "other.pt"])
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, ((plain[name].double() + other[name].double()) / 2).float()), name
    assert f"{tmp_path / 'other.pt'}: float64 weights, rounded to float32" in found.notes


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"class_names": ("cat", "newt", "dog")}, "class_names is ('cat', 'dog', 'newt') in the first"),
        ({"class_names": None}, "class_names is ('cat', 'dog', 'newt') in the first and None in the second"),
        ({"preprocessing": Preprocessing(32, mean=(0.5, 0.5, 0.5))}, "mean is (0.485, 0.456, 0.406) in the first"),
        ({"preprocessing": Preprocessing(64)}, "image_size is 32 in the first and 64 in the second"),
        ({"preprocessing": Preprocessing(32, white_level=4095)}, "white_level is None in the first and 4095"),
        ({"variant": "atto"}, "variant is tiny-test in the first and atto in the second"),
    ],
    ids=["order of classes", "no names", "mean", "image size", "white level", "variant"],
)
def test_another_network_is_refused_with_the_field_and_both_files(
    files: list[Path], tmp_path: Path, words: dict[str, Any], named: str
) -> None:
    other = saved(tmp_path / "other.safetensors", 5, **words)
    with pytest.raises(CheckpointError, match=re.escape(named)) as caught:
        load_checkpoint(files[0], soup=[other])
    assert str(files[0]) in str(caught.value)
    assert str(other) in str(caught.value)


def test_other_tensors_are_refused_with_their_name_and_both_files(files: list[Path], tmp_path: Path) -> None:
    paths = [
        saved(tmp_path / f"{classes}.safetensors", 0, classes=classes, class_names=None, preprocessing=None)
        for classes in (3, 4)
    ]
    with pytest.raises(CheckpointError, match=r"3\.safetensors and .*4\.safetensors.*: head\.weight is 3x64 in the"):
        load_checkpoint(paths[0], soup=paths[1:])
    wider = saved(tmp_path / "wider.safetensors", 0, variant="atto")
    with pytest.raises(
        CheckpointError, match=r"wider\.safetensors cannot be averaged with .*a\.safetensors\. .*0\.0\.weight is 40x"
    ):
        load_checkpoint(files[0], "tiny-test", soup=[wider])


def test_what_has_no_mean_has_to_be_equal(files: list[Path]) -> None:
    def counted(path: Path, steps: int) -> Any:
        loaded = load_checkpoint(path)
        loaded.model.register_buffer("steps", torch.tensor(steps))
        return loaded

    assert mean_of([counted(files[0], 3), counted(files[1], 3)]).model.state_dict()["steps"] == 3
    with pytest.raises(CheckpointError, match=r"a\.safetensors and .*b\.safetensors differ in steps"):
        mean_of([counted(files[0], 3), counted(files[1], 4)])


def test_a_soup_needs_a_checkpoint(files: list[Path]) -> None:
    for words in ({}, {"pretrained": "convnextv2_atto.fcmae_ft_in1k"}):
        with pytest.raises(InputError, match=r"--soup \(soup\) averages with it: add one"):
            resolve_model("atto", soup=files, **words)


def test_predict_and_headroom_take_the_mean_as_its_own_file_would_give_it(
    files: list[Path], tmp_path: Path, cnx: Command
) -> None:
    PICTURE.save(tmp_path / "picture.png")
    mean = load_checkpoint(files[0], soup=files[1:])
    alone = save_checkpoint(
        tmp_path / "mean.safetensors", mean.model, class_names=NAMES, preprocessing=mean.preprocessing
    )
    soup = ("--soup", files[1], "--soup", files[2])
    answers, ranges = [], []
    for words in ((files[0], *soup), (alone,), (files[0],)):
        code, out, told = cnx("predict", *words[:1], tmp_path / "picture.png", *words[1:], "--json")
        assert (code, "Note: the mean of 3 checkpoints" in told) == (0, len(words) > 1)
        answers.append(json.loads(out)["predictions"][0]["scores"])
        code, out, _ = cnx("diagnose", "headroom", *words, "--samples", 1, "--json")
        ranges.append(json.loads(out))
    assert answers[0] == answers[1] != answers[2]
    assert ranges[0]["tensors"] == ranges[1]["tensors"] != ranges[2]["tensors"]
    assert ranges[0]["network"]["soup"] == [path.as_posix() for path in files]


def test_an_export_records_every_file_and_all_of_them_are_checked_from_then_on(
    files: list[Path], tmp_path: Path, exported: Artifact, cnx: Command
) -> None:
    weights = open_artifact(exported.path).manifest.model.weights
    each = [load_checkpoint(path).weights.sha256 for path in files]
    assert [(file.reference, file.sha256) for file in weights.soup] == [
        (f"../{path.name}", sha256) for path, sha256 in zip(files, each, strict=True)
    ]
    assert weights.sha256 == load_checkpoint(files[0], soup=files[1:]).weights.sha256
    assert api.verify(exported, samples=2).passed
    code, out, _ = cnx("inspect", exported.path)
    assert (code, all(f"../{path.name}" in out for path in files)) == (0, True)
    assert "(mean of 3 files)" in exported.manifest.source_name

    # The same files again are the same artifact; fewer, or others of the same mean, are not.
    assert api.export("tiny-test", **words_of(files, tmp_path)).reused
    with pytest.raises(OutputExistsError, match="other inputs"):
        api.export("tiny-test", **words_of(files[:2], tmp_path))
    mean = save_checkpoint(
        tmp_path / "mean.safetensors", recorded_model(exported).model, class_names=NAMES,
        preprocessing=Preprocessing(32), licence=weights.licence,
    )  # fmt: skip
    with pytest.raises(OutputExistsError, match=r"the same weights but other metadata \(cnx_deploy\.soup\)"):
        api.export("tiny-test", **words_of([mean], tmp_path))

    # Provenance follows each file.
    def findings() -> list[tuple[str, str]]:
        report = check_provenance((), tmp_path / "export", tmp_path / "engines")
        return [(finding.verdict, finding.text) for finding in report.findings]

    assert {verdict for verdict, _ in findings()} == {"ok"}
    assert any("the mean of 3 checkpoints, licence 0; licence 1; licence 2" in text for _, text in findings())
    kept = files[2].read_bytes()
    saved(files[2], 9)
    assert [text.partition(" holds")[0] for verdict, text in findings() if verdict == "fault"] == [
        str(tmp_path / "export" / ".." / "c.safetensors")
    ]
    with pytest.raises(CorruptArtifactError, match=r"checkpoint \.\./c\.safetensors\) have changed"):
        recorded_model(exported)
    files[2].unlink()
    assert any(verdict == "note" and "c.safetensors is not here" in text for verdict, text in findings())
    with pytest.raises(InputError, match=r"made from .*c\.safetensors, which is not there"):
        recorded_model(exported)
    files[2].write_bytes(kept)
    saved(files[2], 2, licence="another")  # the same tensors
    assert [text for verdict, text in findings() if verdict == "fault"] == [
        "its checkpoints are under 'licence 0; licence 1; another', its manifest says 'licence 0; licence 1; licence 2'"
    ]


def test_a_manifest_whose_soup_is_not_of_its_checkpoint_is_refused(exported: Artifact) -> None:
    path = exported.path.with_suffix(".json")
    document = json.loads(path.read_text())
    document["model"]["weights"]["soup"] = document["model"]["weights"]["soup"][1:]
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptArtifactError, match="its first is the reference"):
        open_artifact(exported.path)


def test_a_moved_record_leads_to_the_same_files(exported: Artifact, tmp_path: Path) -> None:
    moved = exported.manifest.model_seen_from(tmp_path / "deep" / "engines", exported.path.parent)
    assert [file.reference for file in moved.weights.soup] == [f"../../{name}.safetensors" for name in "abc"]
    assert replace(exported.manifest.model, weights=moved.weights) == moved


def test_training_starts_from_the_mean(files: list[Path], tmp_path: Path) -> None:
    for split, name in ((split, name) for split in ("train", "val") for name in NAMES):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        PICTURE.save(tmp_path / "data" / split / name / "0.png")
    spec = TrainingSpec(tmp_path / "data", "tiny-test", tmp_path / "runs", image_size=32)
    mean = load_checkpoint(files[0], soup=files[1:]).weights.sha256
    for words in ({"init": files[0]}, {"checkpoint": files[0]}):
        loaded = initial_model(spec, soup=files[1:], **words)
        assert loaded is not None
        assert loaded.weights.sha256 == mean
    with pytest.raises(InputError, match="--soup out"):
        initial_model(spec, soup=files)
