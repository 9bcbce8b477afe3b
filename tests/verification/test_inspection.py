"""Files told by their content, and what is said of each."""

import json
import shutil
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from cnx_deploy.core.errors import CheckpointError, CorruptArtifactError, InputError
from cnx_deploy.core.gates import GATES, ParityResult
from cnx_deploy.core.system import package_version
from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine
from cnx_deploy.model.checkpoint import LoadedModel, hash_weights, resolve_model, save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.verification.inspect import inspect_file, kind_of_file, recorded_artifact, with_compiled
from cnx_deploy.verification.parity import differences
from tests.support.artifacts import copy_artifact

NEEDS_RTX = pytest.mark.skipif(not package_version("tensorrt-rtx"), reason="tensorrt-rtx is not installed")


@pytest.fixture(scope="module")
def atto() -> LoadedModel:
    return resolve_model("atto", num_classes=3)


@pytest.fixture
def exported(tiny_onnx_fp16):
    """An FP16 ONNX artifact of the tiny network (five blocks) at 32 px."""
    return tiny_onnx_fp16


@pytest.fixture
def engine(tiny_engine):
    """Its engine for sm89, batch 1 and 1 to 8, built ahead of time."""
    return tiny_engine


@pytest.fixture
def onnx_copy(exported, tmp_path):
    """The ONNX file and its manifest in a folder that a test may spoil."""
    return copy_artifact(exported, tmp_path).path


@pytest.fixture(scope="module")
def checkpoint(atto, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "best.safetensors"
    return save_checkpoint(path, atto.model, class_names=("cat", "dog", "owl"), licence="MIT", extra={"epoch": "7"})


def test_a_checkpoint_of_ours_is_described_with_its_metadata(checkpoint, atto):
    found = inspect_file(checkpoint)
    facts = found.facts
    assert (found.kind, facts["layout"], facts["variant"], facts["classes"]) == ("safetensors", "official", "atto", 3)
    assert facts["parameters"] == 3_388_363
    assert (facts["licence"], facts["metadata"]["epoch"]) == ("MIT", "7")
    assert facts["weights_sha256"] == hash_weights(atto.model)


def test_a_pickled_checkpoint_is_described_with_the_entry_its_weights_are_under(atto, tmp_path):
    torch.save({"model": atto.model.state_dict()}, tmp_path / "last.pth")
    found = inspect_file(tmp_path / "last.pth")
    assert (found.kind, found.facts["entry"], found.facts["variant"]) == ("pickle", "model", "atto")
    assert "unknown" in found.facts["licence"]


def test_names_preprocessing_and_what_is_assumed_are_shown_of_weights_and_of_a_recorded_file(
    atto, onnx_copy, tmp_path, cnx
):
    """`classes` is an entry, the crop ratio an argument, the rest is said by nobody."""
    beside = {"classes": ["a", "b", "c"], "args": {"crop_pct": 0.9}}
    torch.save({"model": atto.model.state_dict(), **beside}, tmp_path / "last.pth")
    manifest = json.loads(onnx_copy.with_suffix(".json").read_text())
    manifest["model"] |= {"class_names": [f"name {index}" for index in range(10)]}
    manifest["model"]["origins"] = {"mean": "assumed", "class_names": "option"}
    onnx_copy.with_suffix(".json").write_text(json.dumps(manifest))
    code, out, _ = cnx("inspect", tmp_path / "last.pth", onnx_copy, "--json")
    weights, file = (document["facts"] for document in json.loads(out))
    assert (code, weights["class_names"], file["class_names"][9]) == (0, ["a", "b", "c"], "name 9")
    assert (weights["origins"]["class_names"], weights["origins"]["mean"]) == ("the checkpoint's classes", "assumed")
    assert (weights["preprocessing"]["crop_ratio"], weights["origins"]["crop_ratio"]) == (0.9, "the checkpoint's args")
    assert file["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    out = cnx("inspect", tmp_path / "last.pth", onnx_copy)[1]
    lines = [line for line in out.splitlines() if line.startswith(("class names", "origins"))]
    assert lines[0].endswith("[a, b, c]")
    assert "the checkpoint's args [crop_ratio]" in lines[1]
    assert "assumed [image_size, interpolation, mean, std, crop_mode]" in lines[1]
    assert lines[2].endswith("[name 0, name 1, name 2, name 3, name 4, name 5, name 6, … 10 in all]")
    assert lines[3].endswith("assumed [mean], option [class_names]")


def test_what_beside_weights_cannot_be_followed_is_a_note(atto, tmp_path):
    torch.save({"model": atto.model.state_dict(), "args": {"crop_pct": 1.2}}, tmp_path / "last.pth")
    found = inspect_file(tmp_path / "last.pth")
    assert (found.facts["class_names"], found.facts["preprocessing"]["crop_ratio"]) == (None, 0.875)
    assert "crop_ratio must be in (0, 1], got 1.2" in found.notes[-1]


def test_a_checkpoint_without_a_head_is_described_and_says_so(atto, tmp_path):
    state = {f"encoder.{name}": tensor for name, tensor in atto.model.state_dict().items()}
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(("encoder.norm.", "encoder.head."))}
    torch.save({"model": kept | {"mask_token": torch.zeros(1, 512, 1, 1)}}, tmp_path / "pretrained.pt")
    found = inspect_file(tmp_path / "pretrained.pt")
    assert (found.facts["layout"], found.facts["variant"], found.facts["classes"]) == ("fcmae", "atto", None)
    assert "no classification head" in found.notes[0]


def test_a_network_that_is_no_variant_is_described_and_says_so(tiny_variant, tmp_path):
    save_file(random_model(replace(tiny_variant, depths=(1, 1, 1, 1)), 10).state_dict(), tmp_path / "own.safetensors")
    found = inspect_file(tmp_path / "own.safetensors")
    assert (found.facts["variant"], found.facts["classes"]) == (None, 10)
    assert "none of the eight" in found.notes[0]


def test_altered_weights_in_a_checkpoint_of_ours_are_an_altered_artifact(checkpoint, tmp_path):
    content = bytearray(checkpoint.read_bytes())
    content[-2] ^= 1  # the lowest mantissa bits of a weight
    (tmp_path / "best.safetensors").write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="altered"):
        inspect_file(tmp_path / "best.safetensors")


def test_weights_of_another_network_are_refused_with_their_names(tmp_path):
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"layer\.weight"):
        inspect_file(tmp_path / "other.safetensors")


def test_an_onnx_file_is_described_from_its_graph_and_its_manifest(exported):
    found = inspect_file(exported.path)
    facts = found.facts
    assert (found.kind, facts["opset"], facts["operators"]["ReduceSum"]) == ("onnx", 20, 5)
    assert facts["inputs"] == {"images": ["FLOAT", ["batch", 3, 32, 32]]}
    assert facts["outputs"] == {"logits": ["FLOAT", ["batch", 10]]}
    assert 0.4 < facts["half_share"] < 1
    assert facts["metadata"]["cnx_deploy.variant"] == facts["variant"] == "tiny-test"
    assert facts["hashes"] == "match the manifest (1 of 1 files)"
    assert found.sha256 == exported.sha256


def test_a_manifest_stands_for_the_file_it_describes(exported):
    assert inspect_file(exported.path.with_suffix(".json")).path == exported.path


def test_the_parity_recorded_at_export_is_shown(onnx_copy):
    manifest, measured = onnx_copy.with_suffix(".json"), torch.ones(2, 3)
    content = json.loads(manifest.read_text())
    parity = ParityResult("a", "b", GATES["fp16"], (1, 2), "logits", differences(measured, measured), ()).to_dict()
    content["facts"]["parity"] = [{name: value for name, value in parity.items() if name != "passed"}]
    manifest.write_text(json.dumps(content))
    assert json.loads(json.dumps(inspect_file(onnx_copy).facts["parity"])) == json.loads(json.dumps(parity))


def test_one_altered_byte_is_found_before_the_graph_is_read(onnx_copy):
    content = bytearray(onnx_copy.read_bytes())
    content[len(content) // 2] ^= 1
    onnx_copy.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="SHA-256"):
        inspect_file(onnx_copy)


def test_what_is_cut_off_is_corrupt_with_and_without_its_manifest(onnx_copy):
    manifest, content = onnx_copy.with_suffix(".json"), onnx_copy.read_bytes()
    for length in (0, 3, 1000, 100_000):
        onnx_copy.write_bytes(content[:length])
        with pytest.raises(CorruptArtifactError, match=f"{length} bytes"):
            inspect_file(onnx_copy)
    manifest.write_text(manifest.read_text()[:200])
    with pytest.raises(CorruptArtifactError, match="manifest"):
        inspect_file(onnx_copy)
    manifest.unlink()
    assert kind_of_file(onnx_copy) == "onnx"
    with pytest.raises(CorruptArtifactError, match="not a valid ONNX"):
        inspect_file(onnx_copy)


def test_an_onnx_file_named_engine_is_named_as_what_it_is(onnx_copy):
    misnamed = onnx_copy.rename(onnx_copy.with_suffix(".engine"))
    found = inspect_file(misnamed)
    assert found.kind == "onnx"
    assert found.description == "an ONNX file, although its name ends in .engine"
    assert "No manifest" in found.notes[0]


def test_some_other_programs_json_beside_a_file_is_no_manifest(onnx_copy):
    onnx_copy.with_suffix(".json").write_text('{"labels": ["cat"]}')
    assert recorded_artifact(onnx_copy) is None
    assert "No manifest" in inspect_file(onnx_copy).notes[0]


def test_a_checkpoint_under_another_kinds_name_is_named_as_what_it_is(checkpoint, tmp_path):
    shutil.copy(checkpoint, tmp_path / "model.onnx")
    found = inspect_file(tmp_path / "model.onnx")
    assert (found.kind, found.facts["variant"]) == ("safetensors", "atto")
    assert found.description == "a safetensors checkpoint, although its name ends in .onnx"


@pytest.mark.parametrize(
    "content", [b"", b"\x08", b"\x08\x0a", b"hello, world, this is text", b"\x89PNG\r\n\x1a\n" * 4]
)
def test_a_file_that_is_no_artifact_is_an_input_error(tmp_path, content):
    (tmp_path / "file.onnx").write_bytes(content)
    with pytest.raises(InputError, match="neither a checkpoint"):
        inspect_file(tmp_path / "file.onnx")


@pytest.mark.parametrize(("name", "message"), [("absent.onnx", "cannot be read"), (".", "is a folder, expected a")])
def test_no_file_is_an_input_error(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        inspect_file(tmp_path / name)


def test_a_folder_of_timm_or_transformers_stands_for_its_weights(tmp_path):
    save_checkpoint(tmp_path / "model.safetensors", random_model("tiny-test", 10))
    assert inspect_file(tmp_path).path == tmp_path / "model.safetensors"


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_safetensors_header_whose_length_looks_like_a_pickle_is_told_as_safetensors(tmp_path, length):
    # 640 is written as 80 02, with which protocol 2 of pickle begins.
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + header + bytes(4))
    assert kind_of_file(tmp_path / "a.safetensors") == "safetensors"


def test_an_engine_without_manifest_is_named_and_not_opened(tmp_path):
    (tmp_path / "foreign.engine").write_bytes(b"ftrt" + bytes(100))
    found = inspect_file(tmp_path / "foreign.engine")
    assert (found.kind, found.facts) == ("engine", {})
    assert "native code" in found.notes[0]


@NEEDS_RTX
def test_an_engine_is_described_by_its_manifest(exported, engine):
    found = inspect_file(engine.path)
    facts = found.facts
    assert (found.kind, facts["runtime"], facts["target"]) == ("engine", "tensorrt-rtx", "sm89")
    assert (facts["profiles"], facts["runtime_version"]) == ([[1, 1, 1], [1, 4, 8]], package_version("tensorrt-rtx"))
    assert facts["source"] == {"onnx": exported.path.name, "sha256": exported.sha256}
    assert facts["census"]["types"]["HALF"] > 0
    assert (found.compiled, found.compiled.kernels > 5) == (engine.manifest.facts.compiled, True)
    assert found.notes == ("An engine cannot be read without a GPU: this is its manifest.",)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.slow
@NEEDS_RTX
def test_an_onnx_file_compiled_now_has_the_kernels_of_its_engine_with_or_without_a_manifest(
    exported, engine, onnx_copy
):
    compiled = with_compiled(inspect_file(exported.path), target="sm89", batch=8).compiled
    assert compiled == engine.manifest.facts.compiled
    onnx_copy.with_suffix(".json").unlink()
    other = with_compiled(inspect_file(onnx_copy), target="sm86", batch=2)
    assert (other.compiled.target, other.compiled.batch) == ("sm86", 2)
    assert other.compiled.kernel_list != compiled.kernel_list, "bytes are for the batch that was asked for"
    assert other.facts["runtime_version"] == package_version("tensorrt-rtx")
    assert ["No manifest" in other.notes[0], "not run" in other.notes[1]] == [True, True]


@pytest.mark.slow
@NEEDS_RTX
def test_for_turing_a_file_is_compiled_as_its_engine_is(exported, tmp_path):
    spec = BuildSpec(runtime="tensorrt-rtx", target="sm75", batches=((1, 2, 4),))
    recorded = build_engine(exported, spec, tmp_path).manifest.facts.compiled
    compiled = with_compiled(inspect_file(exported.path), target="sm75", batch=4).compiled
    assert compiled.megabytes_per_image == recorded.megabytes_per_image


@NEEDS_RTX
def test_only_an_onnx_file_is_compiled_and_only_for_a_target_that_exists(exported, checkpoint):
    with pytest.raises(InputError, match="only an ONNX file is compiled"):
        with_compiled(inspect_file(checkpoint), target="sm89", batch=1)
    with pytest.raises(InputError, match="builds for sm75"):
        with_compiled(inspect_file(exported.path), target="sm70", batch=1)


@NEEDS_RTX
def test_inspect_shows_stages_operations_and_kinds_of_an_engine(cnx, engine):
    code, out, _ = cnx("inspect", str(engine.path))
    compiled, lines = engine.manifest.facts.compiled, out.splitlines()
    assert code == 0
    assert f"{compiled.kernels} kernels, {compiled.megabytes_per_image} MB an image; sm89, batch 8" in out
    for grouping in ("stage", "operation", "kind"):
        start = next(index for index, line in enumerate(lines) if line.split()[:2] == [grouping, "kernels"])
        shown = lines[start + 1 : start + 1 + len(compiled.totals(grouping))]
        shares = [float(line.split()[-1].rstrip("%")) for line in shown]
        assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    assert "myl0_0:" not in out, "kernels are listed only when asked for"


@NEEDS_RTX
def test_inspect_lists_every_kernel_the_largest_first(cnx, exported, engine):
    """Those of the file compiled now and those recorded of its engine are the same."""
    code, out, _ = cnx("inspect", str(exported.path), "--compile", "--batch", "8", "--kernels")
    lines = out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("kernel ")) + 1
    rows = [line.split() for line in lines[start:] if not line.startswith("Note")]
    _, document, _ = cnx("inspect", str(engine.path), "--kernels", "--json")
    assert code == 0
    assert len(rows) == json.loads(document)[0]["compiled"]["kernels"]
    assert sorted(int(row[0]) for row in rows) == list(range(len(rows)))
    sizes = [float(row[1]) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 5


@NEEDS_RTX
@pytest.mark.parametrize("words", [("--kernels",), ("--batch", "4"), ("--target", "sm89")])
def test_what_needs_compiling_is_refused_without_it(cnx, exported, words):
    code, out, err = cnx("inspect", str(exported.path), *words)
    assert (code, out) == (2, "")
    assert "--compile" in err
