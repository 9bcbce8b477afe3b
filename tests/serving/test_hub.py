"""`push`: one folder that timm, transformers and this package load, with the same weights, labels and images."""

import base64
import http.server
import json
import re
import stat
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

import cnx_deploy as cnx
from cnx_deploy.core.errors import CorruptArtifactError, InputError, OutputExistsError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import ALL_VARIANTS, find_variant
from cnx_deploy.data.preprocessing import to_pixels
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.tasks.base import find_task
from cnx_deploy.serving.hub import write_hub_folder
from cnx_deploy.training.run import OWN_LICENCE
from tests.conftest import TINY_TEST, TINY_V1_TEST, Command
from tests.support.foreign_models import randomise, saved, timm_model, transformers_model
from tests.support.pictures import smooth_pictures

NAMES = tuple(f"Klasse {index}: Küche" for index in range(10))
MADE = Preprocessing(
    image_size=64, crop_ratio=0.9, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), interpolation="bilinear"
)


@pytest.fixture(autouse=True)
def _knows_v1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a checkpoint of the smallest V1 be known by its shapes."""
    monkeypatch.setitem(ALL_VARIANTS, TINY_V1_TEST.name, TINY_V1_TEST)


def network(version: int = 2, task: str = "classification", in_chans: int = 3) -> ConvNeXtV2:
    """Every parameter random, GRN's too."""
    variant = TINY_TEST if version == 2 else TINY_V1_TEST
    return random_model(variant, 10, seed=0, task=find_task(task), in_chans=in_chans).eval()


def pushed(
    tmp_path: Path, model: ConvNeXtV2 | None = None, preprocessing: Preprocessing = MADE, **options: Any
) -> Path:
    """The folder of a network that was saved as a checkpoint of ours."""
    model = network() if model is None else model
    names = NAMES if model.num_classes else None
    words: dict[str, Any] = {"class_names": names, "preprocessing": preprocessing, "licence": "CC-BY-NC-4.0"}
    checkpoint = save_checkpoint(tmp_path / "mine.safetensors", model, **words)
    return cnx.push(checkpoint, tmp_path / "folder", **options).path


def in_timm(folder: Path) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def in_transformers(folder: Path) -> transformers.PreTrainedModel:
    """By the class that the folder names; nothing may be missing, unexpected or of another shape."""
    (name,) = json.loads((folder / "config.json").read_text("utf-8"))["architectures"]
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return model.eval()


def answer(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits or probabilities, or the embedding of a network without a head."""
    with torch.no_grad():
        found = model(images)
    if isinstance(found, torch.Tensor):
        return found
    return found.logits if "logits" in found else found.pooler_output


@pytest.mark.parametrize("version", [2, 1])
@pytest.mark.parametrize("task", ["classification", "features"])
@pytest.mark.parametrize("in_chans", [3, 5])
def test_both_libraries_compute_what_the_training_form_computes(
    version: int, task: str, in_chans: int, tmp_path: Path
) -> None:
    model = network(version, task, in_chans)
    folder = pushed(tmp_path, model, MADE.for_channels(in_chans))
    images = torch.rand(2, in_chans, 64, 64, generator=torch.Generator().manual_seed(1))
    for theirs in (in_timm(folder), in_transformers(folder)):
        found, expected = answer(theirs, images), answer(model, images)
        if version == 1:
            assert torch.equal(found, expected)  # a difference of 0.0
        # GRN's terms are added in another order: V2 is equal but for rounding, of which nothing is left in float64.
        double = answer(theirs.double(), images.double()) - answer(model.double(), images.double())
        assert float(double.abs().max()) < 1e-12
        model.float()


@pytest.mark.parametrize("version", [2, 1])
def test_a_network_that_came_from_timm_computes_the_same_in_timm_again(version: int, tmp_path: Path) -> None:
    before = randomise(timm_model(TINY_TEST if version == 2 else TINY_V1_TEST))
    folder = cnx.push(saved(before.state_dict(), tmp_path / "timm.safetensors"), tmp_path / "folder").path
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(answer(in_timm(folder), images), answer(before, images))


@pytest.mark.parametrize("version", [2, 1])
def test_a_network_that_came_from_transformers_computes_the_same_there_again(version: int, tmp_path: Path) -> None:
    before = randomise(transformers_model(TINY_TEST if version == 2 else TINY_V1_TEST))
    next(before.children()).layernorm.eps = 1e-6  # the library's default of 1e-12 is not what networks are trained with
    folder = cnx.push(saved(before.state_dict(), tmp_path / "hf.safetensors"), tmp_path / "folder").path
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(answer(in_transformers(folder), images), answer(before, images))


@pytest.mark.parametrize("name", ["atto", "v1-atto"])
def test_published_sizes_have_timms_name_and_its_shapes(name: str, tmp_path: Path) -> None:
    variant = find_variant(name)
    model = random_model(variant, 4, seed=0)
    folder = cnx.push(save_checkpoint(tmp_path / "a.safetensors", model), tmp_path / "folder", library="timm").path
    theirs = in_timm(folder)
    assert (
        theirs.pretrained_cfg["architecture"] == f"convnext{'v2' if variant.version == 2 else ''}_{name.split('-')[-1]}"
    )
    assert sum(parameter.numel() for parameter in theirs.parameters()) == variant.parameters_with(4)


def test_a_changed_tensor_shows_as_a_difference(tmp_path: Path) -> None:
    model = network()
    folder = pushed(tmp_path, model)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        model.stages[2][1].grn.beta += 0.1
    for theirs in (in_timm(folder), in_transformers(folder)):
        assert float((answer(theirs, images) - answer(model, images)).abs().max()) > 1e-3


@pytest.mark.parametrize("library", [None, "timm", "transformers"])
@pytest.mark.parametrize("mode", ["center", "center-floor", "squash"])
def test_labels_preprocessing_licence_and_weights_are_read_back(library: str | None, mode: str, tmp_path: Path) -> None:
    model = network()
    made = replace(MADE, crop_mode=mode, white_level=200.0)
    folder = pushed(tmp_path, model, made, library=library)
    loaded = load_checkpoint(folder)
    assert (loaded.class_names, loaded.preprocessing, loaded.weights.licence) == (NAMES, made, "CC-BY-NC-4.0")
    torch.testing.assert_close(loaded.model.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_thresholds_of_labels_are_read_back_and_transformers_is_told_of_several_labels(tmp_path: Path) -> None:
    cuts = tuple(0.1 + 0.05 * index for index in range(10))
    model = network(task="multi-label")
    model.task = model.task.with_thresholds(cuts)
    folder = pushed(tmp_path, model)
    loaded = load_checkpoint(folder)
    assert (loaded.model.task.name, loaded.model.task.thresholds) == ("multi-label", cuts)
    images = torch.rand(1, 3, 64, 64)
    for theirs in (in_timm(folder), in_transformers(folder)):
        torch.testing.assert_close(answer(theirs, images).sigmoid(), answer(model, images), rtol=0, atol=1e-6)
    assert in_transformers(folder).config.problem_type == "multi_label_classification"
    assert "0.1 to 0.55" in (folder / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return smooth_pictures(((300, 200), (201, 301), (64, 64), (77, 130), (500, 120), (256, 341)))


IMAGES = {
    "cropped": MADE,
    "cropped, odd": replace(MADE, image_size=96, crop_ratio=0.93, interpolation="bicubic", crop_mode="center-floor"),
    "large and cropped": replace(MADE, image_size=384, crop_ratio=0.95),
    "squashed": replace(MADE, image_size=384, crop_ratio=1.0, crop_mode="squash"),
    "squashed, small": replace(MADE, crop_ratio=1.0, crop_mode="squash"),
    "squashed and cropped": replace(MADE, crop_mode="squash", crop_ratio=0.8),
    "squashed, an odd margin": replace(MADE, crop_mode="squash"),
    "squashed, not square": replace(MADE, image_size=(64, 96), crop_ratio=1.0, crop_mode="squash"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_timm_and_transformers_make_the_same_images(name: str, pictures: list[Image.Image], tmp_path: Path) -> None:
    """To within 1/255, but for the pixel that the card tells of: timm rounds half of a margin, transformers cuts it."""
    made = IMAGES[name]
    folder = pushed(tmp_path, preprocessing=made)
    transform = create_transform(**resolve_model_data_config(in_timm(folder)), normalize=False)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (made.mean, made.std))
    apart = 0.0
    for picture in pictures:
        rounded = to_pixels(picture, replace(made, crop_mode=made.crop_mode.removesuffix("-floor")))
        cut = rounded if made.crop_mode == "squash" else to_pixels(picture, replace(made, crop_mode="center-floor"))
        assert int((transform(picture).permute(1, 2, 0).int() - rounded.int()).abs().max()) <= 1
        values = torch.from_numpy(processor(picture, return_tensors="np")["pixel_values"])[0]
        apart = max(apart, float((((values * std + mean) * 255).round().permute(1, 2, 0) - cut).abs().max()))
    is_shifted = name == "squashed, an odd margin"
    assert (apart > 1) == is_shifted
    assert ("half a pixel" in (folder / "README.md").read_text("utf-8")) == (is_shifted or "center" in made.crop_mode)


def test_transformers_own_pipeline_names_the_classes_that_predict_names(tmp_path: Path) -> None:
    (picture,) = smooth_pictures(((64, 64),))
    folder = pushed(tmp_path, preprocessing=replace(MADE, crop_ratio=1.0))
    found = transformers.pipeline("image-classification", model=str(folder))(picture, top_k=5)
    expected = cnx.predict(folder, picture, top=5).scores
    assert [row["label"] for row in found] == [score.name for score in expected]
    assert [row["score"] for row in found] == pytest.approx([score.probability for score in expected], abs=2e-3)


def test_what_a_library_cannot_say_is_said_by_name(tmp_path: Path) -> None:
    notes: list[str] = []
    canvas = replace(MADE, crop_mode="border", pad_value=(114.0, 114.0, 114.0))
    folder = pushed(tmp_path, preprocessing=canvas, note=notes.append)
    assert not (folder / "preprocessor_config.json").exists()
    text = "\n".join(notes)
    assert "transformers has no image processor for the crop mode border" in text
    assert "timm fills borders with the mean colour (102, 128, 153), not with (114, 114, 114)" in text
    assert all(note.removeprefix("Note: ") in (folder / "README.md").read_text("utf-8") for note in notes[1:])
    with pytest.raises(InputError, match=r"no crop mode corner.*--library transformers"):
        pushed(tmp_path, preprocessing=replace(MADE, crop_mode="corner", crop_ratio=1.0), force=True)


def test_a_dense_network_is_refused(tmp_path: Path) -> None:
    model = random_model(TINY_TEST, 3, seed=0, task=find_task("segment"))
    checkpoint = save_checkpoint(tmp_path / "dense.safetensors", model)
    with pytest.raises(InputError, match=r"The task segment has heads .* expected one of classification, multi-label"):
        cnx.push(checkpoint, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_weights_of_ours_bear_no_foreign_tag_and_anybody_may_read_the_files(tmp_path: Path) -> None:
    folder = pushed(tmp_path)
    assert in_timm(folder).pretrained_cfg.get("tag") is None
    assert "fcmae" not in "".join(
        path.read_text("utf-8") for path in folder.iterdir() if path.suffix in (".json", ".md")
    )
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    card = (folder / "README.md").read_text("utf-8")
    assert card.startswith('---\nlicense: "cc-by-nc-4.0"\n')
    assert "base_model" not in card


def test_the_card_lists_the_recorded_files_of_these_weights_and_no_others(
    tiny_onnx_fp32: cnx.Artifact, tiny_onnx_fp16: cnx.Artifact, tiny_engine: cnx.Artifact, tmp_path: Path
) -> None:
    folder = cnx.push(tiny_onnx_fp32, tmp_path / "folder", artifacts=(tiny_onnx_fp16, tiny_engine)).path
    card = (folder / "README.md").read_text("utf-8")
    for artifact in (tiny_onnx_fp32, tiny_onnx_fp16):
        measured = artifact.manifest.facts.worst_parity.differences
        row = next(line for line in card.splitlines() if artifact.path.name in line)
        assert f"{measured.relative_l2_max:.1e}" in row
        assert f"| {measured.samples} | passed |" in row
    assert re.search(rf"{re.escape(tiny_engine.path.name)} \|.* sm89: not run", card)
    assert "random (seed 0): results mean nothing" in card
    other = save_checkpoint(tmp_path / "other.safetensors", random_model(TINY_TEST, 10, seed=1))
    with pytest.raises(InputError, match="was made from other weights"):
        cnx.push(other, tmp_path / "other", artifacts=(tiny_onnx_fp16,))
    with pytest.raises(InputError, match=r"whose manifest says how it was made, so --crop-ratio"):
        cnx.push(tiny_onnx_fp32, tmp_path / "other", crop_ratio=0.5)


def test_a_full_folder_is_kept_and_force_replaces_a_hub_folder_alone(tmp_path: Path) -> None:
    folder = pushed(tmp_path)
    with pytest.raises(OutputExistsError, match="--force"):
        pushed(tmp_path, network(version=1))
    pushed(tmp_path, network(version=1), library="timm", force=True)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert load_checkpoint(folder).model.variant.version == 1
    (folder / "mine.txt").write_text("keep", encoding="utf-8")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputExistsError, match="something else"):
        pushed(tmp_path, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "mine.txt").unlink()
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")  # as timm and transformers call theirs
    with pytest.raises(OutputExistsError, match="something else"):
        pushed(tmp_path, force=True)


def test_weights_that_were_trained_here_are_given_away_under_no_licence(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "mine.safetensors", network(), licence=OWN_LICENCE)
    card = (cnx.push(checkpoint, tmp_path / "folder").path / "README.md").read_text("utf-8")
    assert 'license: "other"\nlicense_name: "not stated (trained with cnx-deploy)"' in card
    assert "MIT" not in card


def test_a_library_that_is_not_known_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Choose one of: timm, transformers"):
        pushed(tmp_path, library="keras")
    assert not (tmp_path / "folder").exists()


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (pushed(tmp_path, force=True) for _ in range(2))
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (first, second)]
    for _ in range(3):
        made = write_hub_folder(load_checkpoint(tmp_path / "mine.safetensors"), MADE, tmp_path / "again", force=True)
        for name in ("model.safetensors", "model.transformers.safetensors"):
            assert (made.path / name).read_bytes() == contents[0][name]
    assert contents[0] == contents[1]


def test_only_the_file_with_transformers_names_says_the_format_that_earlier_transformers_asks_for(
    tmp_path: Path,
) -> None:
    """transformers 4.50 knows no `transformers_weights`, and would draw a network at random in the place of timm's."""
    folder = pushed(tmp_path)
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            found[path.name] = opened.metadata().get("format")
    assert found == {"model.safetensors": None, "model.transformers.safetensors": "pt"}


def test_altered_weights_are_refused(tmp_path: Path) -> None:
    folder = pushed(tmp_path)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="was altered"):
        load_checkpoint(folder)


def test_the_command_says_what_it_wrote(cnx: Command, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "a.safetensors", network(), preprocessing=MADE)
    code, out, err = cnx("push", checkpoint, "--to", tmp_path / "hub", "--json")
    assert code == 0
    assert json.loads(out)["files"] == [
        "model.safetensors", "model.transformers.safetensors", "preprocessor_config.json", "README.md", "config.json"
    ]  # fmt: skip
    assert "Note: layout official" in err
    for words, said in (
        (("--public",), "Name a repository with --repo-id"),
        (("--repo-id", "a/b/c"), "no name of a repository"),
    ):
        code, out, err = cnx("push", checkpoint, "--to", tmp_path / "other", *words)
        assert (code, said in err, (tmp_path / "other").exists()) == (2, True, False)
    assert cnx("push", tmp_path / "none", "--to", tmp_path / "other")[0] == 2


class StandIn(http.server.BaseHTTPRequestHandler):
    """Answers as a model hub does to what `upload_folder` asks of it, and keeps what it was sent."""

    def do_POST(self) -> None:
        """Make a repository, say how files are to be sent, take a commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        seen: list[tuple[str, str | None, bytes]] = self.server.seen  # type: ignore[attr-defined]
        seen.append((self.path, self.headers.get("Authorization"), body))
        status, document = 200, {}
        if self.headers.get("Authorization") != "Bearer hf_right":
            status, document = 401, {"error": "Invalid username or password."}
        elif self.path == "/api/repos/create":
            document = {"url": f"http://{self.headers['Host']}/me/mine"}
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            mode = self.server.mode  # type: ignore[attr-defined]
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None} for path in paths]
            document = {"files": files}
        elif self.path.endswith("/info/lfs/objects/batch"):
            place = {"href": f"http://{self.headers['Host']}/store"}
            objects = [{**each, "actions": {"upload": place}} for each in json.loads(body)["objects"]]
            document = {"transfer": "basic", "objects": objects}
        elif "/commit/" in self.path:
            document = {"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/1", "commitOid": "1" * 40,
                        "pullRequestUrl": None, "success": True, "hookOutput": ""}  # fmt: skip
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        """Take no file."""
        self.send_error(403)

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    """A stand-in on the loopback device, which huggingface_hub takes for its hub."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.seen, server.mode = [], "regular"  # type: ignore[attr-defined]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_files_of_the_folder_are_uploaded_in_one_commit_to_a_private_repository(
    hub: http.server.ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cnx: Command
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    checkpoint = save_checkpoint(tmp_path / "a.safetensors", network(), preprocessing=MADE)
    code, out, err = cnx("push", checkpoint, "--to", tmp_path / "hub", "--repo-id", "me/mine")
    assert (code, out.splitlines()[-1].endswith("/me/mine")) == (0, True)
    assert "hf_right" not in out + err
    made, *_, (place, _, commit) = hub.seen  # type: ignore[attr-defined]
    assert json.loads(made[2])["visibility"] == "private"
    assert place == "/api/models/me/mine/commit/main"
    files = [row["value"] for row in map(json.loads, commit.splitlines()) if row["key"] == "file"]
    sent = {file["path"]: base64.b64decode(file["content"]) for file in files}
    assert sent == {path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()}


def test_a_file_of_weights_that_does_not_get_through_is_told(
    hub: http.server.ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cnx: Command
) -> None:
    hub.mode = "lfs"  # type: ignore[attr-defined]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    checkpoint = save_checkpoint(tmp_path / "a.safetensors", network(), preprocessing=MADE)
    code, _, err = cnx("push", checkpoint, "--to", tmp_path / "hub", "--repo-id", "me/mine")
    assert "was not uploaded to me/mine (Error while uploading" in err
    assert code == 1


@pytest.mark.parametrize(("token", "code", "said"), [("hf_wrong", 5, "Set HF_TOKEN"), ("hf_right", 1, "HF_ENDPOINT")])
def test_a_hub_that_refuses_or_is_away_leaves_the_folder_and_shows_no_token(
    token: str, code: int, said: str, hub: http.server.ThreadingHTTPServer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, cnx: Command,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    if code == 1:
        hub.server_close()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    checkpoint = save_checkpoint(tmp_path / "a.safetensors", network(), preprocessing=MADE)
    found, out, err = cnx("push", checkpoint, "--to", tmp_path / "hub", "--repo-id", "me/mine")
    assert (found, said in err, token in out + err) == (code, True, False)
    assert (tmp_path / "hub" / "config.json").is_file()
