"""run.json, which `--resume` compares with what is asked for now; the table of epochs, which curves are drawn from."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.variants import Variant
from cnx_deploy.data import find_dataset
from cnx_deploy.training import TrainingSpec
from cnx_deploy.training import run as training_run
from cnx_deploy.training.curves import draw_curves, read_table
from cnx_deploy.training.fcmae import PretrainingSpec
from cnx_deploy.training.fcmae import run as pretraining_run
from cnx_deploy.training.fcmae.images import divide_images, find_images_below
from cnx_deploy.training.records import EpochRecord
from cnx_deploy.training.run_folder import REQUEST, open_run, table_of
from tests.support.lies import LONG, ODD_JSON, QUICK, documents, placed, put, refused, result_or_error, spoilt
from tests.support.training_data import write_colours

Values = dict[str, Any]


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory, tiny_variant: Variant) -> dict[str, Values]:
    """What training and pre-training write when they begin."""
    root = tmp_path_factory.mktemp("requests")
    data = write_colours(root / "colours", 4, 2)
    spec = TrainingSpec(data, tiny_variant, run_dir=root / "training", image_size=32)
    training_run._open_run(spec, find_dataset(data))
    masked = PretrainingSpec(data, tiny_variant, run_dir=root / "pretraining", image_size=64, held_images=2)
    pretraining_run._open_run(masked, divide_images(find_images_below(data), 2))
    return {name: json.loads((root / name / REQUEST).read_text()) for name in ("training", "pretraining")}


@pytest.fixture
def request_now(requests: dict[str, Values]) -> Values:
    return requests["training"]


def compare(folder: Path, before: bytes, now: Values) -> None:
    """Resume in a folder whose run.json holds `before`."""
    put(folder / REQUEST, before)
    open_run(now, name="tiny", output_dir=folder, run_dir=folder, resume=True)


@pytest.mark.parametrize("kind", ["training", "pretraining"])
def test_a_request_is_resumed_as_it_was_written(tmp_path: Path, requests: dict[str, Values], kind: str) -> None:
    compare(tmp_path, json.dumps(requests[kind]).encode(), requests[kind])
    other = requests["training" if kind == "pretraining" else "pretraining"]
    refused(lambda: compare(tmp_path, json.dumps(other).encode(), requests[kind]), InputError, "was started otherwise")


REQUESTS: list[tuple[tuple[Any, ...], Any, str]] = [
    (("spec",), None, "spec: Expected object, got null"),
    (("spec", "epochs"), [2], "spec[...]: Expected bool | int | float | str | null, got array"),
    (("train_images",), "8", "train_images: Expected int, got str"),
    (("train_images",), -1, "train_images: Expected int >= 0"),
    (("class_names",), "red", "class_names: Expected array | null, got str"),
    (("class_names",), [1], "class_names[0]: Expected str, got int"),
    (("preprocessing",), [], "preprocessing: Expected object, got array"),
    (("preprocessing", "mean"), [0], "preprocessing.mean: Expected array of length 3"),
    (("resolved",), 1, "resolved: Expected object, got int"),
]


@pytest.mark.parametrize(("place", "lie", "reason"), REQUESTS, ids=[reason[:40] for *_, reason in REQUESTS])
def test_a_lie_of_the_request_is_named_by_its_field(
    request_now: Values, tmp_path: Path, place: tuple[Any, ...], lie: Any, reason: str
) -> None:
    before = json.dumps(placed(request_now, place, lie)).encode()
    path = tmp_path / REQUEST
    said = (f"{path} cannot be read ({reason}", "Start a run without --resume")
    refused(lambda: compare(tmp_path, before, request_now), CorruptArtifactError, *said)


def test_another_request_is_told_field_by_field_and_briefly(request_now: Values, tmp_path: Path) -> None:
    compare(tmp_path, json.dumps(request_now).encode(), request_now)
    for field, then, reason in (
        ("epochs", 3, "epochs 3 then, 30 now"),
        ("epochs", True, "epochs True then, 30 now"),
        ("accumulate", True, "accumulate True then, 1 now"),
        ("schedule", "x" * 9000, "schedule xxxxx"),
    ):
        before = json.dumps(placed(request_now, ("spec", field), then)).encode()
        said = refused(lambda before=before: compare(tmp_path, before, request_now), InputError, reason)
        assert len(said) < 700
    same = json.dumps(placed(request_now, ("spec", "weight_decay"), 0.05)).replace(
        '"accumulate": 1,', '"accumulate": 1.0,'
    )
    compare(tmp_path, same.encode(), request_now)


@pytest.mark.parametrize("name", ODD_JSON)
def test_what_is_no_request_is_corrupt(request_now: Values, tmp_path: Path, name: str) -> None:
    refused(lambda: compare(tmp_path, ODD_JSON[name], request_now), CorruptArtifactError, "run.json cannot be read (")


def test_a_request_of_before_lacks_what_is_for_people(request_now: Values, tmp_path: Path) -> None:
    before = {name: each for name, each in request_now.items() if name != "resolved"}
    compare(tmp_path, json.dumps(before).encode(), request_now)


def fuzz_request(requests: dict[str, Values], folder: Path, data: st.DataObject) -> None:
    now = requests[data.draw(st.sampled_from(["training", "pretraining"]))]
    result_or_error(lambda: compare(folder, data.draw(documents(now)), now), CorruptArtifactError, InputError)


@QUICK
@given(data=st.data())
def test_fuzz_a_request_is_compared_or_corrupt(
    requests: dict[str, Values], tmp_path: Path, data: st.DataObject
) -> None:
    fuzz_request(requests, tmp_path, data)


@pytest.mark.slow
@LONG
@given(data=st.data())
def test_fuzz_a_request_at_length(requests: dict[str, Values], tmp_path: Path, data: st.DataObject) -> None:
    fuzz_request(requests, tmp_path, data)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_request_that_no_json_could_keep_is_wrong_input(tiny_variant: Variant, value: float) -> None:
    with pytest.raises(InputError, match="clip_norm is"):
        TrainingSpec(Path("x"), tiny_variant, clip_norm=value)
    with pytest.raises(InputError, match="weight_decay is"):
        TrainingSpec(Path("x"), tiny_variant, weight_decay=value)


# --- metrics.csv ------------------------------------------------------------------------------------------------------

EPOCHS = [EpochRecord(at, 1.0 / at, 0.9 / at, 50.0, 100.0, None, None, 1e-3, 2.0, 3.0, 4.0) for at in (1, 2, 3)]
TABLE = table_of([record.to_dict() for record in EPOCHS])


def table(folder: Path, content: bytes) -> list[dict[str, float]]:
    return read_table(put(folder / "metrics.csv", content))


def test_a_table_is_read_as_training_writes_it(tmp_path: Path) -> None:
    columns = ("epoch", "train_loss", "val_loss", "val_top1_percent", "learning_rate")
    found = table(tmp_path, TABLE.encode())
    assert [[row[name] for name in columns] for row in found] == [
        [pytest.approx(getattr(record, name), rel=1e-5) for name in columns] for record in EPOCHS
    ]
    assert all("ema_val_loss" not in row for row in found)
    assert "train_loss" not in table(tmp_path, TABLE.replace("0.5,", "nan,").encode())[1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (TABLE.replace("epoch", "time").encode(), "line 2 has no epoch"),
        (TABLE.partition("\n")[0].encode(), "it has no epoch"),
        (b"", "it has no epoch"),
        (TABLE.replace("0.5,", "half,").encode(), "line 3, train_loss: 'half' is no number"),
        (TABLE.replace("0.5,", "0x10,").encode(), "line 3, train_loss: '0x10' is no number"),
        (TABLE.replace("0.5,", "1_0,").encode(), "line 3, train_loss: '1_0' is no number"),
        (TABLE.replace("0.5,", '"0.5').encode(), "unexpected end of data"),
        (TABLE.encode("utf-16"), "invalid start byte"),
        (TABLE.encode() + b"x" * 200_000, "field larger than field limit"),
        (TABLE.encode() + b"\n" * (16 << 20), "it has more than 16,777,216 bytes"),
    ],
)  # fmt: skip
def test_what_is_no_table_of_epochs_is_corrupt(tmp_path: Path, content: bytes, reason: str) -> None:
    refused(lambda: table(tmp_path, content), CorruptArtifactError, "metrics.csv is no table of a run (", reason)


@QUICK
@given(content=spoilt(TABLE.encode()))
def test_fuzz_a_table_is_read_or_corrupt(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    result_or_error(lambda: table(tmp_path_factory.getbasetemp(), content), CorruptArtifactError)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@LONG
@given(content=spoilt(TABLE.encode()))
def test_fuzz_curves_at_length(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    put(tmp_path_factory.getbasetemp() / "metrics.csv", content)
    result_or_error(lambda: draw_curves(tmp_path_factory.getbasetemp()), CorruptArtifactError)
