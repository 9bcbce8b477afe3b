"""The chain from weights to engine, and what is done to engines."""

import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from cnx_deploy.cli import main
from cnx_deploy.core.artifacts import open_artifact, read_artifact
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CorruptArtifactError, MissingRequirementError, RefusedArtifactError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.system import Gpu
from cnx_deploy.core.variants import find_variant
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.exporters.trt.backend import load_backend
from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.recorded import model_record
from cnx_deploy.runners.tensorrt import _check_gpu, _check_release
from cnx_deploy.verification.provenance import ProvenanceReport, check_provenance


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint under a licence, its ONNX file with weights in a file of their own, an engine. Do not change."""
    root = tmp_path_factory.mktemp("chain")
    variant = find_variant("tiny-test")
    path = save_checkpoint(root / "tiny.safetensors", random_model(variant, 2, seed=0), licence="CC-BY-NC-4.0")
    loaded = load_checkpoint(path, variant)
    record = model_record(loaded, Preprocessing(image_size=32), root / "export")
    spec = ExportSpec(deploy=DeploySpec("fp16", 32), batch=(2, 2, 2), external_data_bytes=1000)
    exported = export_onnx(loaded.model, record, spec, root / "export")
    build = BuildSpec(runtime="tensorrt-rtx", target="sm89", batches=((2, 2, 2),), measure=False)
    build_engine(exported, build, root / "engines")
    return root


@pytest.fixture
def chain(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "chain")
    return tmp_path / "chain"


def checked(chain: Path) -> ProvenanceReport:
    return check_provenance((), chain / "export", chain / "engines")


def faults(chain: Path) -> list[str]:
    return [finding.text for finding in checked(chain).findings if finding.verdict == "fault"]


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def flipped(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset % len(content)] ^= 1
    path.write_bytes(content)


def test_manifest_roundtrip_an_untouched_chain_passes_and_its_licence_is_in_all_of_it(
    chain: Path,
) -> None:
    found = checked(chain)
    assert found.passed
    texts = " | ".join(finding.text for finding in found.findings if finding.verdict == "ok")
    assert "tiny.safetensors, CC-BY-NC-4.0" in texts
    assert "built from tiny-test-32-fp16.onnx" in texts
    assert "tiny-test-32-fp16.onnx.data" in texts
    for path in (chain / "export/tiny-test-32-fp16.onnx", chain / "engines/tiny-test-32-fp16-rtx-sm89.engine"):
        assert open_artifact(path).manifest.model.weights.licence == "CC-BY-NC-4.0"
    model = onnx.load(chain / "export/tiny-test-32-fp16.onnx", load_external_data=False)
    assert {prop.key: prop.value for prop in model.metadata_props}["cnx_deploy.licence"] == "CC-BY-NC-4.0"


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "byte of the ONNX file": (
        lambda c: flipped(c / "export/tiny-test-32-fp16.onnx", 999),
        "tiny-test-32-fp16.onnx was altered",
    ),
    "byte of the weights": (lambda c: flipped(c / "export/tiny-test-32-fp16.onnx.data", 9), "onnx.data was altered"),
    "byte of the engine": (
        lambda c: flipped(c / "engines/tiny-test-32-fp16-rtx-sm89.engine", -1),
        "engine was altered",
    ),
    "missing weights": (lambda c: (c / "export/tiny-test-32-fp16.onnx.data").unlink(), "onnx.data is missing"),
    "swapped files": (
        lambda c: shutil.copy(c / "export/tiny-test-32-fp16.onnx", c / "engines/tiny-test-32-fp16-rtx-sm89.engine"),
        "engine has",
    ),
    "another checkpoint": (
        lambda c: save_checkpoint(c / "tiny.safetensors", random_model("tiny-test", 2, seed=1), licence="CC-BY-NC-4.0"),
        "its manifest says",
    ),
    "a licence washed off": (
        lambda c: save_checkpoint(c / "tiny.safetensors", random_model("tiny-test", 2, seed=0), licence="MIT"),
        "is under 'MIT', its manifest says 'CC-BY-NC-4.0'",
    ),
    "byte of the checkpoint": (lambda c: flipped(c / "tiny.safetensors", -5), "was altered"),
    "engine of another ONNX file": (
        lambda c: edited(c / "engines/tiny-test-32-fp16-rtx-sm89.json", lambda d: d.update(source_sha256="1" * 64)),
        "it was built from another tiny-test-32-fp16.onnx",
    ),
    "other weights named": (
        lambda c: edited(c / "export/tiny-test-32-fp16.json", lambda d: d.update(source_sha256="1" * 64)),
        "and was made from 111111111111…",
    ),
    "another licence in an engine's manifest": (
        lambda c: edited(
            c / "engines/tiny-test-32-fp16-rtx-sm89.json", lambda d: d["model"]["weights"].update(licence="MIT")
        ),
        "names other weights or another licence",
    ),
    "no licence": (
        lambda c: edited(c / "export/tiny-test-32-fp16.json", lambda d: d["model"]["weights"].update(licence=" ")),
        "no licence is recorded",
    ),
    "a file of nobody": (
        lambda c: (c / "engines/stranger.engine").write_bytes(b"vtrt"),
        "stranger.engine is in no manifest: nothing says where it is from",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_onnx_extdata_missing_swapped_and_every_other_break_of_the_chain_is_named(fault: str, chain: Path) -> None:
    change, reason = FAULTS[fault]
    change(chain)
    assert any(reason in text for text in faults(chain)), faults(chain)


def test_without_files_records_are_notes_and_named_files_are_faults(chain: Path) -> None:
    (chain / "engines/tiny-test-32-fp16-rtx-sm89.engine").unlink()
    assert checked(chain).passed
    named = check_provenance([chain / "engines/tiny-test-32-fp16-rtx-sm89.json"], chain / "export", chain / "engines")
    assert not named.passed


def test_engine_wrong_runtime_version_is_a_note_of_the_chain_and_exit_5_when_run(chain: Path) -> None:
    manifest = chain / "engines/tiny-test-32-fp16-rtx-sm89.json"
    edited(manifest, lambda d: d["facts"].update(runtime_version="1.2.3.4"))
    notes = [finding.text for finding in checked(chain).findings if finding.verdict == "note"]
    assert any("built with tensorrt-rtx 1.2.3.4, " in text and "runs on its own release only" in text for text in notes)
    with pytest.raises(MissingRequirementError, match=r"built with tensorrt-rtx 1\.2\.3\.4; .* is installed") as error:
        _check_release(open_artifact(manifest), load_backend("tensorrt-rtx"))
    assert error.value.exit_code == 5


def test_engine_wrong_sm_is_a_note_of_the_chain_and_exit_5_when_run(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def notes() -> list[str]:
        return [finding.text for finding in checked(chain).findings if finding.verdict == "note"]

    assert notes() == []
    monkeypatch.setattr(
        "cnx_deploy.verification.provenance.find_gpus", lambda: (Gpu("GeForce RTX 2080", "sm75", "580.1", 8192),)
    )
    assert notes() == ["built for sm89, this machine's GPU is sm75"]
    with pytest.raises(MissingRequirementError, match=r"is for sm89; this GPU is sm75\. Build for it"):
        _check_gpu(open_artifact(chain / "engines/tiny-test-32-fp16-rtx-sm89.engine"), "sm75")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="the other TensorRT is here")
def test_engine_wrong_flavour_names_the_package_that_is_missing(chain: Path) -> None:
    edited(chain / "engines/tiny-test-32-fp16-rtx-sm89.json", lambda d: d["request"].update(runtime="tensorrt"))
    engine = open_artifact(chain / "engines/tiny-test-32-fp16-rtx-sm89.engine")
    with pytest.raises(
        MissingRequirementError, match=r"tensorrt cannot be imported .* Install it: pip install"
    ) as error:
        load_backend(engine.manifest.request.runtime)
    assert error.value.exit_code == 5


@pytest.mark.parametrize("words", [["verify", "records"], ["verify", "records", "--json"]], ids=["text", "json"])
def test_the_command_ends_with_4_for_a_fault_and_0_without(
    words: list[str], chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(chain)
    codes = []
    for change in (lambda: None, lambda: flipped(chain / "export/tiny-test-32-fp16.onnx", 5)):
        change()
        with pytest.raises(SystemExit) as stop:
            main(words)
        codes.append(stop.value.code)
        out = capsys.readouterr().out
        assert json.loads(out)["passed"] is (codes == [0]) if "--json" in words else "SHA-256" in out
    assert codes == [0, 4]


# --- engines: the hash comes before any deserialiser ------------------------------------------------------------------


def test_engine_truncated_or_with_a_flipped_bit_is_refused_before_anything_reads_it(
    tiny_engine: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: object) -> None:
        raise AssertionError("an engine was given to a deserialiser")

    monkeypatch.setattr(load_backend("tensorrt-rtx").trt, "Runtime", refuse)
    for path in (tiny_engine.path, tiny_engine.path.with_suffix(".json")):
        shutil.copy(path, tmp_path)
    path, content, draw = tmp_path / tiny_engine.path.name, tiny_engine.path.read_bytes(), random.Random(0)
    for cut in (0, *(len(content) * part // 10 for part in range(1, 10)), len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(CorruptArtifactError, match=f"has {cut} bytes, its manifest says {len(content)}"):
            open_artifact(path)
    for _ in range(100):
        path.write_bytes(content)
        flipped(path, draw.randrange(len(content)))
        with pytest.raises(CorruptArtifactError, match="was altered: SHA-256"):
            open_artifact(path)
    path.write_bytes(content)
    assert open_artifact(path).sha256 == tiny_engine.sha256


@pytest.mark.parametrize("words", ["predict FILE a.png", "eval FILE .", "build-trt FILE"])
def test_engine_unsigned_or_unlisted_is_refused_with_4(
    words: str, tiny_engine: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copy(tiny_engine.path, tmp_path / "stranger.engine"))
    with pytest.raises(SystemExit) as stop:
        main(words.replace("FILE", str(path)).split())
    assert stop.value.code == 4
    assert "is refused: an engine is native code, and no manifest beside it names it" in capsys.readouterr().err
    for read in (open_artifact, read_artifact):  # where verify and bench, which ask for a GPU first, read it
        with pytest.raises(RefusedArtifactError, match="an engine is native code"):
            read(path)


@pytest.mark.parametrize(
    ("suffix", "said"),
    [
        (".engine", "an ONNX file, although its name ends in .engine"),
        (".onnx", "a TensorRT engine, although its name ends in .onnx"),
    ],
    ids=["engine_is_onnx", "onnx_is_engine"],
)
def test_engine_is_onnx_and_onnx_is_engine_are_named_by_what_they_are(
    suffix: str, said: str, tiny_engine: Artifact, tiny_onnx_fp16: Artifact, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = tiny_onnx_fp16 if suffix == ".engine" else tiny_engine
    path = Path(shutil.copy(source.path, tmp_path / f"swapped{suffix}"))
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path)])
    assert (stop.value.code, said in capsys.readouterr().out) == (0, True)
