"""Files that cannot or must not be read."""

import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from cnx_deploy.core.errors import CheckpointError, CorruptArtifactError, InputError, RefusedArtifactError
from cnx_deploy.model.checkpoint import load_checkpoint
from tests.support.foreign_models import saved


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_malicious_pt_is_refused_and_runs_nothing(tiny_model, tmp_path, new_format):
    marker, path = tmp_path / "marker", tmp_path / "malicious.pt"
    content = {"model": tiny_model.state_dict(), "args": Malicious(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(RefusedArtifactError, match="could run foreign code") as caught:
        load_checkpoint(path)
    assert not marker.exists()
    assert "weights_only" not in str(caught.value)  # torch's advice to read it unsafely is not passed on
    torch.load(path, weights_only=False)
    assert marker.exists()  # so the file would have done it


def test_pickle_malicious_pt_without_an_archive(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "bare.bin"
    path.write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    with pytest.raises(RefusedArtifactError):
        load_checkpoint(path)
    assert not marker.exists()


def test_pickle_malicious_pt_under_a_safetensors_name(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "bare.safetensors"
    path.write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(CorruptArtifactError):
        load_checkpoint(path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # TorchScript itself is deprecated
def test_pickle_malicious_pt_a_torchscript_program(tmp_path):
    path = tmp_path / "program.pt"
    torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(RefusedArtifactError, match="TorchScript"):
        load_checkpoint(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.9999])
def test_checkpoint_truncated_at_ten_points(tiny_model, tiny_variant, tmp_path, suffix, share):
    path = saved(tiny_model.state_dict(), tmp_path / f"whole{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CorruptArtifactError):
        load_checkpoint(path, tiny_variant)


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><title>404</title>", bytes(range(256)), b"version https://git-lfs"]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_of_another_kind_is_corrupt_not_refused(tmp_path, content, suffix):
    path = tmp_path / f"other{suffix}"
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError):
        load_checkpoint(path)


def test_altered_pickles_are_errors_of_ours_whatever_the_alteration(tiny_variant, tmp_path):
    path = tmp_path / "altered.pt"
    torch.save({"model": {"downsample_layers.0.0.bias": torch.ones(8)}}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    outcomes = Counter()
    for _ in range(300):
        altered = bytearray(content)
        for place, value in zip(
            torch.randint(len(content), (3,), generator=generator).tolist(),
            torch.randint(256, (3,), generator=generator).tolist(),
            strict=True,
        ):
            altered[place] = value
        path.write_bytes(altered)
        with pytest.raises((CorruptArtifactError, RefusedArtifactError, CheckpointError)) as caught:
            load_checkpoint(path, tiny_variant)
        outcomes[caught.type] += 1
    assert outcomes[CorruptArtifactError] > 150


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pt", "folder.pt", "notes.txt"])
def test_what_is_no_checkpoint_file_is_wrong_input(tmp_path, name):
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(InputError):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {"model": {"epoch": 3}}, {"epoch": 3}])
def test_a_pickle_without_a_state_dict_is_an_error(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="state dict"):
        load_checkpoint(path)
