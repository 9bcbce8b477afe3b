"""Other texts that commands and scripts read: README and index.csv, timm's config, preprocessing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.model import pretrained
from cnx_deploy.model.pretrained import fetch_pretrained
from cnx_deploy.report.records import BEGIN, END
from tests.support.lies import (
    FEW,
    ODD_JSON,
    QUICK,
    check_command,
    documents,
    lying,
    placed,
    put,
    refused,
    result_or_error,
    run,
    spoilt,
)

ROOT = Path(__file__).parents[2]


# --- README and index.csv ---------------------------------------------------------------------------------------------

README = f"# Title\n\n{BEGIN}\nold\n{END}\nmore\n"


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one recorded file; the current one."""
    (tmp_path / "export").mkdir()
    shutil.copy(ROOT / "export" / "atto-224-fp16.json", tmp_path / "export")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_table_is_written_into_a_sound_readme_and_found_there(recorded: Path) -> None:
    put(recorded / "README.md", README.encode())
    assert run("report")[0] == 0
    assert "| atto | 3,708,400 |" in (recorded / "README.md").read_text(encoding="utf-8")
    assert run("report", "--check")[0] == 0


def test_a_readme_that_is_no_text_is_wrong_input_where_named_and_left_alone_where_not(recorded: Path) -> None:
    put(recorded / "README.md", README.encode("utf-16"))
    assert check_command("report") == 0
    code, said = run("report", "--readme", "README.md")
    assert (code, "README.md is no text in UTF-8" in said) == (2, True)
    with (recorded / "README.md").open("wb") as stream:
        stream.truncate(100_000_000)
    code, said = run("report", "--readme", "README.md")
    assert (code, "README.md has 100,000,000 bytes: expected a text of at most" in said) == (2, True)


def test_an_index_that_is_no_text_is_out_of_date_and_written_again(recorded: Path) -> None:
    put(recorded / "export" / "index.csv", b"\xff\xfe\x00")
    code, said = run("report", "--check")
    assert (code, "Out of date" in said) == (3, True)
    assert run("report")[0] == 0
    assert run("report", "--check")[0] == 0


@settings(FEW, max_examples=8)
@given(readme=spoilt(README.encode()), index=spoilt(b"stem,kind\na,onnx\n"))
def test_fuzz_report_over_texts(recorded: Path, readme: bytes, index: bytes) -> None:
    put(recorded / "README.md", readme)
    put(recorded / "export" / "index.csv", index)
    check_command("report", "--check", allowed=frozenset({0, 2, 3}))
    check_command("report", "--readme", "README.md", allowed=frozenset({0, 2}))


# --- timm's config ----------------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "architecture": "convnextv2_atto", "num_classes": 1000,
    "pretrained_cfg": {
        "input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    },
}  # fmt: skip
TAG = "convnextv2_atto.fcmae_ft_in1k"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of a tag as the hub's cache would give them; the config's path."""
    put(tmp_path / "model.safetensors", b"")
    monkeypatch.setattr(pretrained, "_fetch", lambda tag, name, cache: tmp_path / name)
    return tmp_path / "config.json"


def fetch(path: Path, content: bytes) -> Any:
    put(path, content)
    return fetch_pretrained(TAG)


def test_timms_config_is_read_as_it_is(cached: Path) -> None:
    found = fetch(cached, json.dumps(CONFIG).encode())
    assert (found.num_classes, found.preprocessing) == (1000, Preprocessing())


@pytest.mark.parametrize(
    ("place", "lie", "field"),
    [
        (("num_classes",), "1000", "num_classes"),
        (("pretrained_cfg",), [], "pretrained_cfg"),
        (("pretrained_cfg", "input_size"), [3, 224, 225], "225"),
        (("pretrained_cfg", "crop_pct"), True, "pretrained_cfg.crop_pct"),
        (("pretrained_cfg", "std"), [0, 1, 1], "std"),
    ],
)
def test_a_lie_of_timms_config_is_named(cached: Path, place: tuple[Any, ...], lie: Any, field: str) -> None:
    content = json.dumps(placed(CONFIG, place, lie)).encode()
    refused(lambda: fetch(cached, content), CorruptArtifactError, "config.json is not a timm model's config (", field)


@pytest.mark.parametrize("name", ["cut off", "list"])
def test_what_is_no_config_is_corrupt(cached: Path, name: str) -> None:
    refused(lambda: fetch(cached, ODD_JSON[name]), CorruptArtifactError, "is not a timm model's config (")


@QUICK
@given(content=documents(CONFIG))
def test_fuzz_timms_config(cached: Path, content: bytes) -> None:
    result_or_error(lambda: fetch(cached, content), CorruptArtifactError)


# --- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lie", "field"),
    [
        ({"image_size": True}, "image_size"),
        ({"crop_ratio": 10**400}, "crop_ratio"),
        ({"interpolation": "\x1b[2J"}, "'\\x1b[2J'"),
        ({"mean": [0, 0, None]}, "mean[2]"),
        ({"std": [1, 1, float("nan")]}, "std"),
        ({"x" * 9000: 1}, "xxxxx"),
    ],
)
def test_a_lie_of_preprocessing_is_named(lie: dict[str, Any], field: str) -> None:
    values = {**Preprocessing().to_dict(), **lie}
    assert len(refused(lambda: Preprocessing.from_dict(values), InputError, field)) < 700


@QUICK
@given(values=lying(Preprocessing().to_dict()))
def test_fuzz_preprocessing_is_read_or_wrong_input(values: Any) -> None:
    found = result_or_error(lambda: Preprocessing.from_dict(values), InputError)
    assert found is None or Preprocessing.from_dict(found.to_dict()) == found
