"""metrics.csv, which curves are drawn from, and TensorBoard's events."""

import dataclasses
import sys
from dataclasses import asdict

import pytest
from hypothesis import given

from cnx_deploy.core.errors import CorruptArtifactError, MissingRequirementError
from cnx_deploy.training import TrainingRecord, TrainingSpec, train
from cnx_deploy.training.metrics import draw_curves, read_table, table_of
from tests.support.lies import LONG, QUICK, put, refused, result_or_error, spoilt
from tests.support.training_data import rows

EPOCHS = [TrainingRecord(at, 1.0 / at, 0.9 / at, 50.0, 100.0, None, None, 1e-3, 2.0, 3.0, 4.0) for at in (1, 2, 3)]
TABLE = table_of([asdict(record) for record in EPOCHS])


def table(folder, content):
    return read_table(put(folder / "metrics.csv", content))


def test_a_table_is_read_as_training_writes_it(tmp_path):
    columns = ("epoch", "train_loss", "val_loss", "val_top1_percent", "learning_rate")
    read = table(tmp_path, TABLE.encode())
    assert [[row[name] for name in columns] for row in read] == [
        [pytest.approx(getattr(record, name), rel=1e-5) for name in columns] for record in EPOCHS
    ]
    assert all("ema_val_loss" not in row for row in read)
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
)
def test_what_is_no_table_of_epochs_is_corrupt(tmp_path, content, reason):
    refused(lambda: table(tmp_path, content), CorruptArtifactError, "metrics.csv is no table of a run (", reason)


@QUICK
@given(content=spoilt(TABLE.encode()))
def test_fuzz_a_table_is_read_or_corrupt(tmp_path_factory, content):
    result_or_error(lambda: table(tmp_path_factory.getbasetemp(), content), CorruptArtifactError)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@LONG
@given(content=spoilt(TABLE.encode()))
def test_fuzz_curves_at_length(tmp_path_factory, content):
    put(tmp_path_factory.getbasetemp() / "metrics.csv", content)
    result_or_error(lambda: draw_curves(tmp_path_factory.getbasetemp()), CorruptArtifactError)


def test_curves_are_drawn_as_svg(tmp_path):
    put(tmp_path / "metrics.csv", TABLE.encode())
    assert draw_curves(tmp_path).read_text().startswith("<?xml")


def test_tensorboard_gets_every_epochs_figures_and_the_error_without_it_names_the_extra(
    colours, tiny_variant, tmp_path, monkeypatch
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = TrainingSpec(colours, tiny_variant, tmp_path, epochs=2, image_size=32, batch_size=8, tensorboard=True)
    result = train(spec)
    events = EventAccumulator(str(result.run_dir / "tensorboard")).Reload()
    written = [event.value for event in events.Scalars("epoch/val_loss")]
    assert written == pytest.approx([float(row["val_loss"]) for row in rows(result.run_dir)], rel=1e-4)
    assert events.Scalars("step/learning_rate")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingRequirementError, match=r"cnx-deploy\[tensorboard\]"):
        train(dataclasses.replace(spec, epochs=1))
