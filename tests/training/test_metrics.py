"""metrics.csv, which curves are drawn from, and TensorBoard's events."""

import dataclasses
import sys

import pytest
from hypothesis import given

from cnx_deploy.core.errors import CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.training import TrainingRecord, TrainingSpec, train
from cnx_deploy.training.metrics import draw_curves, read_table, table_of
from tests.support.lies import QUICK, put, refused, result_or_error, spoilt
from tests.support.training_data import rows

EPOCHS = [TrainingRecord(at, 1.0 / at, 0.9 / at, 50.0, 100.0, None, None, 1e-3, 2.0, 3.0, 4.0) for at in (1, 2, 3)]
TABLE = table_of([record.row() for record in EPOCHS])


def table(folder, content):
    return read_table(put(folder / "metrics.csv", content))


def test_a_table_is_read_as_training_writes_it_and_drawn(tmp_path):
    read = table(tmp_path, TABLE.encode())
    known = {name: values for name, values in read.items() if "ema" not in name}
    assert known == {name: pytest.approx([getattr(record, name) for record in EPOCHS], rel=1e-5) for name in known}
    assert len(known) == 9
    assert all(value != value for value in (*read["ema_val_loss"], *read["ema_val_top1_percent"]))
    text = draw_curves(tmp_path).read_text()
    assert ("validation<" in text, "validation, average" in text) == (True, False)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (TABLE.replace("epoch", "time").encode(), "it has no epoch"),
        (TABLE.partition("\n")[0].encode(), "it has no epoch"),
        (b"", "it has no epoch"),
        (TABLE.replace("0.5,", "half,").encode(), "could not convert string to float: 'half'"),
        (TABLE.replace("0.5,", '"0.5').encode(), "unexpected end of data"),
        (TABLE.encode("utf-16"), "invalid start byte"),
        (TABLE.encode() + b"\n" * (16 << 20), "it has more than 16,777,216 bytes"),
    ],
)
def test_what_is_no_table_of_epochs_is_corrupt(tmp_path, content, reason):
    refused(lambda: table(tmp_path, content), CorruptArtifactError, "metrics.csv is no table of a run (", reason)


@QUICK
@given(content=spoilt(TABLE.encode()))
def test_fuzz_a_table_is_read_or_corrupt(tmp_path_factory, content):
    result_or_error(lambda: table(tmp_path_factory.getbasetemp(), content), CorruptArtifactError, InputError)


def test_tensorboard_gets_every_epochs_figures_and_the_error_without_it_names_the_extra(
    colours, tiny_variant, tmp_path, monkeypatch
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = TrainingSpec(colours, tiny_variant, tmp_path, epochs=2, image_size=32, batch_size=8, tensorboard=True)
    result = train(spec)
    events = EventAccumulator(str(result.run_dir / "tensorboard")).Reload()
    written = [event.value for event in events.Scalars("epoch/val_loss")]
    assert written == pytest.approx([float(row["val_loss"]) for row in rows(result.run_dir)], rel=1e-4)
    assert [event.step for event in events.Scalars("step/learning_rate")] == [1, 4]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingRequirementError, match=r"cnx-deploy\[tensorboard\]"):
        train(dataclasses.replace(spec, epochs=1))
