"""`cnx-deploy rescue` from a file to a proven file: what it prints, refuses and leaves unwritten."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import cnx_deploy as cnx
from cnx_deploy.core.errors import InputError, ParityError, RefusedArtifactError
from cnx_deploy.exporters.rescue import conversion
from cnx_deploy.verification import rescue as rescue_module
from tests.support.foreign_files import exported, heat, network


@pytest.fixture(scope="module")
def half_file(tiny_variant, tmp_path_factory) -> Path:
    """A transformers classifier with hot weights, exported after `.half()`."""
    path = tmp_path_factory.mktemp("half") / "hot.onnx"
    return exported(heat(network("transformers", tiny_variant), 100.0), path, half=True)


@pytest.fixture(scope="module")
def rescued(half_file, tmp_path_factory) -> cnx.Artifact:
    return cnx.rescue(half_file, output_dir=tmp_path_factory.mktemp("export"))


def test_a_hot_half_file_is_rescued_and_the_naive_one_is_nan(rescued) -> None:
    assert rescued.islands == {"GRN": 5, "LayerNorm": 10, "pool": 1}
    assert (rescued.source_precision, rescued.opset) == ("fp16", 17)
    assert all(result.passed for result in (*rescued.fp32, *rescued.fp16))
    assert rescued.fp32[0].differences.relative_l2_max < 1e-6
    assert "NaN" in rescued.naive
    assert "5 GRN, 10 LayerNorm, 1 pool, 0 not recognised" in str(rescued)


def test_the_rescued_file_takes_floats_and_answers_as_the_original(rescued, half_file) -> None:
    images = np.random.default_rng(0).standard_normal((3, 3, 64, 64)).astype(np.float32)
    sessions = [onnxruntime.InferenceSession(path) for path in (rescued.path, half_file)]
    assert sessions[0].get_inputs()[0].type == sessions[0].get_outputs()[0].type == "tensor(float)"
    answers = [
        session.run(None, {"pixels": pixels})[0]
        for session, pixels in zip(sessions, (images, images.astype(np.float16)), strict=True)
    ]
    # ONNX Runtime computes both in FP32, so that the hot file has an answer here.
    torch.testing.assert_close(*(torch.from_numpy(each.astype(np.float32)) for each in answers), rtol=2e-2, atol=2e-2)


def test_the_command_prints_what_was_found_and_proven(half_file, tmp_path: Path, cnx) -> None:
    code, out, err = cnx("rescue", half_file, "--output-dir", tmp_path, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["islands"]["GRN"] == 5
    assert told["fp16"][0]["passed"]
    again, _, err = cnx("rescue", half_file, "--output-dir", tmp_path)
    assert again == 2
    assert "--force" in err


def test_a_file_with_nothing_to_rescue_says_so_with_exit_code_3(tiny_variant, tmp_path: Path, cnx) -> None:
    path = exported(network("plain", tiny_variant), tmp_path / "plain.onnx")
    code, _, err = cnx("rescue", path, "--output-dir", tmp_path / "out")
    assert code == 3
    assert "nothing to rescue" in err
    assert not list((tmp_path / "out").glob("*.onnx"))


def test_a_fault_of_the_conversion_is_seen_and_nothing_is_written(half_file, tmp_path: Path, monkeypatch) -> None:
    """The twin sees it, and where the twin was not asked, the emulator."""
    import onnx_ir as ir

    retyped = conversion._retyped

    def negated(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
        made = retyped(tensor, dtype)
        return ir.Tensor(-made.numpy(), dtype=dtype) if made.numpy().ndim == 4 else made

    monkeypatch.setattr(conversion, "_retyped", negated)
    with pytest.raises(ParityError, match="another function"):
        cnx.rescue(half_file, output_dir=tmp_path)
    monkeypatch.setattr(rescue_module.Proof, "twin", lambda proof: ())
    with pytest.raises(ParityError):
        cnx.rescue(half_file, output_dir=tmp_path)
    assert not list(tmp_path.glob("*.onnx"))


def test_a_stranger_s_graph_of_other_operators_is_refused_before_it_is_read(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18, "evil": 1]> g (float[N, 3, 64, 64] x) => (float[N, 3, 64, 64] y) '
        "{ y = evil.Run(x) }"
    )
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(RefusedArtifactError, match="not a standard operator"):
        cnx.rescue(tmp_path / "a.onnx", output_dir=tmp_path)


@pytest.mark.slow
def test_weights_outside_the_original_are_in_the_rescued_file(half_file, tmp_path: Path, monkeypatch) -> None:
    """As torch writes files: every weight in `<file>.data`. The original's hash is over both files."""
    onnx.save(
        onnx.load(half_file), tmp_path / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0
    )
    found = cnx.rescue(tmp_path / "a.onnx", output_dir=tmp_path / "out")
    assert all(result.passed for result in found.fp16)
    assert found.source_bytes > 50_000 > (tmp_path / "a.onnx").stat().st_size
    (tmp_path / "out" / "a.data").write_bytes(b"")
    assert [file.name for file in found.artifact.manifest.files] == ["a-64-fp16.onnx"]
    before = found.artifact.manifest.source_sha256
    content = bytearray((tmp_path / "a.data").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a.data").write_bytes(content)
    monkeypatch.setattr(conversion, "EXTERNAL_DATA_BYTES", 1000)
    again = cnx.rescue(tmp_path / "a.onnx", output_dir=tmp_path / "out", force=True)
    assert again.artifact.manifest.source_sha256 != before
    assert [file.name for file in again.artifact.manifest.files] == ["a-64-fp16.onnx", "a-64-fp16.onnx.data"]
    assert all(result.passed for result in again.fp16)


def test_other_float_types_are_refused_by_name(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (double[N, 5, 8] x, double[8] gain) => (double[N, 5, 8] y) '
        "{ y = LayerNormalization(x, gain) }"
    )
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="computes in DOUBLE"):
        cnx.rescue(tmp_path / "a.onnx", output_dir=tmp_path)


def test_inputs_that_nobody_can_guess_are_asked_for_and_taken(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (int64[N, 6] tokens) => (float[N, 6, 8] y) '
        "<float[10, 8] table, float[8] gain> { e = Gather(table, tokens) y = LayerNormalization(e, gain) }"
    )
    random = np.random.default_rng(0)
    for name, shape in (("table", (10, 8)), ("gain", (8,))):
        values = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="--inputs"):
        cnx.rescue(tmp_path / "a.onnx", output_dir=tmp_path)
    np.savez(tmp_path / "inputs.npz", tokens=np.array([[0, 1, 2, 3, 4, 9]]))
    found = cnx.rescue(tmp_path / "a.onnx", output_dir=tmp_path, inputs=tmp_path / "inputs.npz")
    assert found.islands == {"LayerNorm": 1}
    assert found.fp16
    assert found.fp16[0].passed


def test_what_the_emulator_does_not_know_is_told_and_fp16_is_not_called_proven(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float[N, 5, 8] x) => (float[N, 5, 8] y) <float[8] gain> '
        "{ n = LayerNormalization(x, gain) y = LpNormalization <axis = -1, p = 2> (n) }"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(8, np.float32), "gain"))
    onnx.save(model, tmp_path / "a.onnx")
    found = cnx.rescue(tmp_path / "a.onnx", output_dir=tmp_path)
    assert not found.fp16
    assert "not run" in str(found)
