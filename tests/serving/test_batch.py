"""Batches in one process: what a row says, every kind of source, going on, and what is refused."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from PIL import Image

import cnx_deploy as cnx
from cnx_deploy.core.errors import CheckFailedError, InputError, OutputExistsError
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.serving import batch
from cnx_deploy.serving.batch import BatchRequest, PartWriter
from cnx_deploy.serving.batch_sources import find_source
from tests.support.artifacts import copy_artifact
from tests.support.batches import (
    check_exactly_once,
    jpegs,
    rows_of,
    with_broken,
    write_csv,
    write_folder,
    write_parquet,
    write_tar,
)


@pytest.fixture(scope="module")
def contents():
    return jpegs(21)


@pytest.fixture(scope="module")
def folder(contents, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("batch") / "photos", contents)


@pytest.fixture(scope="module")
def expected(folder, tiny_onnx_fp32, tmp_path_factory):
    """The rows of the folder."""
    out = tmp_path_factory.mktemp("batch") / "out"
    cnx.batch(tiny_onnx_fp32, folder, out, part_size=4)
    return rows_of(out)


def answers(rows):
    return [(row["error"], row["top_classes"], row["top_probabilities"]) for row in rows]


def test_a_row_says_what_predict_says(expected, folder, tiny_onnx_fp32):
    predictions = cnx.predict(tiny_onnx_fp32, sorted(folder.iterdir()))
    for row, prediction in zip(expected, predictions, strict=True):
        assert row["id"] == prediction.path
        assert row["top_classes"] == [score.index for score in prediction.scores]
        assert row["top_names"] == [score.name for score in prediction.scores]
        assert row["top_probabilities"] == [score.probability for score in prediction.scores]
        assert row["model_sha256"] == tiny_onnx_fp32.sha256
    assert len({str(row["top_probabilities"]) for row in expected}) == 21


def test_rows_do_not_depend_on_the_batch(expected, folder, tiny_onnx_fp32, tmp_path):
    cnx.batch(tiny_onnx_fp32, folder, tmp_path / "out", batch_size=3, part_size=7)
    assert rows_of(tmp_path / "out") == expected


@pytest.mark.parametrize("kind", ["pattern", "files", "table", "parquet", "struct", "tars", "folder of tars"])
def test_every_kind_of_source_gives_the_same_rows(kind, contents, expected, folder, tiny_onnx_fp32, tmp_path):
    options = {}
    if kind == "pattern":
        source = f"{folder}/*.jpg"
    elif kind == "files":
        source = sorted(folder.iterdir())
    elif kind == "table":
        source = write_csv(folder.parent / "table.csv", folder)
        options = {"id_column": "key"}
    elif kind in ("parquet", "struct"):
        source = write_parquet(tmp_path / "images.parquet", contents, as_struct=kind == "struct")
        options = {"id_column": "key"} if kind == "struct" else {}
    else:
        (tmp_path / "shards").mkdir()
        for at, first in enumerate((0, 10)):
            write_tar(tmp_path / f"shards/{at}.tar", contents[first : first + 10 + at], first)
        source = f"{tmp_path}/shards/*.tar" if kind == "tars" else tmp_path / "shards"
    result = cnx.batch(tiny_onnx_fp32, source, tmp_path / "out", part_size=4, **options)
    rows = rows_of(tmp_path / "out")
    assert (result.rows, result.errors, result.done) == (21, 0, 21)
    assert answers(rows) == answers(expected)
    ids = {
        "table": "7", "parquet": f"{tmp_path}/images.parquet#7", "struct": "key-7",
        "tars": f"{tmp_path}/shards/0.tar/0007.jpg", "folder of tars": f"{tmp_path}/shards/0.tar/0007.jpg",
    }  # fmt: skip
    assert rows[7]["id"] == ids.get(kind, f"{folder}/0007.jpg")


def test_a_broken_image_is_a_row_with_its_reason_and_exit_code_3(contents, expected, tiny_onnx_fp32, tmp_path, cnx):
    folder = write_folder(tmp_path / "photos", with_broken(contents, 3, 20))
    (folder / "0005.jpg").write_bytes(b"")
    code, out, err = cnx("batch", tiny_onnx_fp32.path, folder, "--to", tmp_path / "out", "--json")
    rows, document = rows_of(tmp_path / "out"), json.loads(out)
    assert (code, document["errors"], document["rows"]) == (3, 3, 21)
    assert "3 of 21 rows have an error" in err
    broken = [row["index"] for row in rows if row["error"] is not None]
    assert broken == [3, 5, 20]
    assert "0003.jpg cannot be read as an image" in rows[3]["error"]
    assert rows[3]["top_classes"] is None
    assert [row for row in answers(rows) if row[0] is None] == [
        row for at, row in enumerate(answers(expected)) if at not in broken
    ]
    again, out, _ = cnx("batch", tiny_onnx_fp32.path, folder, "--to", tmp_path / "out", "--json")
    assert (again, json.loads(out)["was_finished"], json.loads(out)["errors"]) == (3, True, 3)


def test_an_image_that_is_there_twice_has_two_rows(folder, tiny_onnx_fp32, tmp_path):
    file = folder / "0002.jpg"
    cnx.batch(tiny_onnx_fp32, [file, file, folder / "0001.jpg"], tmp_path / "out")
    assert [(row["index"], Path(row["id"]).name) for row in rows_of(tmp_path / "out")] == [
        (0, "0002.jpg"), (1, "0002.jpg"), (2, "0001.jpg"),
    ]  # fmt: skip


def test_outputs_and_all_probabilities_become_columns(folder, tiny_onnx_fp32, tmp_path):
    cnx.batch(tiny_onnx_fp32, folder, tmp_path / "out", keep=("logits",), probabilities=True, part_size=8)
    with cnx.load(tiny_onnx_fp32) as model:
        logits = model.outputs(sorted(folder.iterdir()))["logits"]
    table = pq.read_table(tmp_path / "out/rows").sort_by("index")
    np.testing.assert_array_equal(np.array(table["logits"].to_pylist(), np.float32), logits.numpy())
    np.testing.assert_array_equal(
        np.array(table["probabilities"].to_pylist(), np.float32), logits.double().softmax(1).float().numpy()
    )
    assert table.schema.field("logits").metadata == {b"shape": b"10"}


def test_an_image_whose_outputs_are_not_finite_is_a_row_with_its_reason(folder, tiny_model, tmp_path):
    """A head so large that the logits of some images pass the range of FP32."""
    with cnx.load(save_checkpoint(tmp_path / "plain.safetensors", tiny_model), image_size=32) as model:
        largest = model.outputs(sorted(folder.iterdir()))["logits"].abs().amax(1).median()
    tiny_model.head.weight.data *= torch.finfo(torch.float32).max / largest
    tiny_model.head.bias.data *= torch.finfo(torch.float32).max / largest
    weights = save_checkpoint(tmp_path / "large.safetensors", tiny_model)
    result = cnx.batch(weights, folder, tmp_path / "out", image_size=32, part_size=8)
    errors = [row["error"] for row in rows_of(tmp_path / "out") if row["error"] is not None]
    assert 0 < result.errors < 21
    assert len(errors) == result.errors
    assert all("not finite" in error for error in errors)


def test_what_images_show_is_told_where_one_of_them_has_no_finite_outputs(folder, tiny_model, tmp_path):
    tiny_model.head.weight.data *= torch.finfo(torch.float32).max
    weights = save_checkpoint(tmp_path / "large.safetensors", tiny_model)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "last.gif", save_all=True, append_images=frames[1:])
    images = [*sorted(folder.iterdir()), tmp_path / "last.gif"]
    result = cnx.batch(weights, images, tmp_path / "out", image_size=32, batch_size=2, part_size=22)
    assert result.errors
    assert any("several frames" in text for text in result.notes)


def test_the_same_command_makes_what_is_missing_and_nothing_else(expected, folder, tiny_onnx_fp32, tmp_path):
    out = tmp_path / "out"
    cnx.batch(tiny_onnx_fp32, folder, out, part_size=4)
    (out / "rows/part-000002.parquet").unlink()
    (out / "rows/part-000004.parquet").write_bytes(b"PAR1, and then the disk was full")
    made = {path: path.stat().st_mtime_ns for path in (out / "rows").iterdir() if path.name != "part-000004.parquet"}
    noted, finished = [], []

    def look(text, share):
        finished.append((out / "manifest.json").exists())

    result = cnx.batch(tiny_onnx_fp32, folder, out, part_size=4, note=noted.append, progress=look)
    assert finished == [False, False]
    assert (result.done, result.rows, result.was_finished) == (8, 21, False)
    assert any("part-000004.parquet cannot be read" in text for text in noted)
    assert made == {path: path.stat().st_mtime_ns for path in made}
    check_exactly_once(out, expected)
    assert cnx.batch(tiny_onnx_fp32, folder, out, part_size=4).was_finished


def test_the_manifest_is_absent_until_all_rows_are_there(folder, tiny_onnx_fp32, tmp_path):
    out, seen = tmp_path / "out", []

    def look(text, share):
        seen.append((out / "manifest.json").exists())
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cnx.batch(tiny_onnx_fp32, folder, out, part_size=4, progress=look)
    assert seen == [False, False]
    assert not (out / "manifest.json").exists()
    assert cnx.batch(tiny_onnx_fp32, folder, out, part_size=4).done == 13
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["result"]["rows"], manifest["source"]["count"]) == (21, 21)


def test_a_part_that_is_handed_out_again_is_taken_as_it_is(folder, tiny_onnx_fp32, tmp_path):
    """As Ray does where an actor died before it could tell of its part."""
    out = tmp_path / "out"
    cnx.batch(tiny_onnx_fp32, folder, out, part_size=4)
    document = json.loads((out / "request.json").read_text())
    (part, *_) = find_source([folder], part_size=4).parts
    made = (out / "rows" / part.file_name).stat().st_mtime_ns
    writer = PartWriter(BatchRequest(model=tiny_onnx_fp32.path, images=(str(folder),), out=out), document, 1)
    assert writer.write(part).rows == 4
    assert (out / "rows" / part.file_name).stat().st_mtime_ns == made
    (out / "request.json").unlink()
    with pytest.raises(InputError, match="shared file system"):
        PartWriter(writer.request, document, 1)


def test_rows_of_something_else_are_refused_by_name(folder, tiny_onnx_fp32, tiny_onnx_fp16, tmp_path):
    out = tmp_path / "out"
    cnx.batch(tiny_onnx_fp32, folder, out, part_size=4)
    with pytest.raises(
        OutputExistsError, match=f"answers of tiny-test-32-fp32.onnx, sha256 {tiny_onnx_fp32.sha256[:12]}"
    ):
        cnx.batch(tiny_onnx_fp16, folder, out, part_size=4)
    with pytest.raises(OutputExistsError, match="begun with top unset and not 3"):
        cnx.batch(tiny_onnx_fp32, folder, out, part_size=4, top=3)
    with pytest.raises(OutputExistsError, match="part_size 4 and not 8"):
        cnx.batch(tiny_onnx_fp32, folder, out, part_size=8)
    with pytest.raises(OutputExistsError, match=r"begun on 21 images of .*not the same: 1 images"):
        cnx.batch(tiny_onnx_fp32, folder / "0001.jpg", out, part_size=4)
    renamed = copy_artifact(tiny_onnx_fp32, tmp_path / "renamed")
    file = renamed.path.with_suffix(".json")
    manifest = json.loads(file.read_text())
    manifest["model"]["class_names"] = [f"bird {at}" for at in range(10)]
    file.write_text(json.dumps(manifest))
    with pytest.raises(OutputExistsError, match="under another manifest"):
        cnx.batch(renamed.path, folder, out, part_size=4)


def test_rows_of_a_checkpoints_other_weights_or_classes_are_refused(folder, tiny_model, tmp_path):
    (tmp_path / "net").mkdir()
    weights = save_checkpoint(tmp_path / "net/model.safetensors", tiny_model)
    cnx.batch(weights, folder, tmp_path / "out", part_size=4, image_size=32)
    with pytest.raises(OutputExistsError, match="begun with ema unset and not true"):
        cnx.batch(weights, folder, tmp_path / "out", part_size=4, image_size=32, ema=True)
    names = {str(at): f"bird {at}" for at in range(10)}
    (tmp_path / "net/config.json").write_text(json.dumps({"model_type": "convnextv2", "id2label": names}))
    with pytest.raises(OutputExistsError, match="classes or preprocessing differ"):
        cnx.batch(weights, folder, tmp_path / "out", part_size=4, image_size=32)


def test_rows_of_a_tables_other_images_are_refused(contents, folder, tiny_onnx_fp32, tmp_path):
    table = write_csv(tmp_path / "table.csv", folder)
    words = {"part_size": 4, "id_column": "key"}
    cnx.batch(tiny_onnx_fp32, table, tmp_path / "out", image_folder=folder.parent, **words)
    with pytest.raises(OutputExistsError, match="are not the same"):  # the same ids, below another folder
        cnx.batch(tiny_onnx_fp32, table, tmp_path / "out", image_folder=tmp_path, **words)
    table.write_text(table.read_text().replace("0001.jpg", "0002.jpg"))
    with pytest.raises(OutputExistsError, match="are not the same"):
        cnx.batch(tiny_onnx_fp32, table, tmp_path / "out", image_folder=folder.parent, **words)


def test_rows_of_a_run_that_ended_meanwhile_are_refused_too(expected, folder, tiny_onnx_fp32, tmp_path, monkeypatch):
    first_check = batch.check_request

    def check_and_be_overtaken(*words):
        first_check(*words)
        monkeypatch.setattr(batch, "check_request", first_check)
        cnx.batch(tiny_onnx_fp32, folder, tmp_path / "out", part_size=4)

    monkeypatch.setattr(batch, "check_request", check_and_be_overtaken)
    with pytest.raises(OutputExistsError, match="begun with top unset and not 3"):
        cnx.batch(tiny_onnx_fp32, folder, tmp_path / "out", part_size=4, top=3)
    assert rows_of(tmp_path / "out") == expected


def test_only_what_a_batch_has_left_is_tidied_away(folder, tiny_onnx_fp32, tmp_path):
    cnx.batch(tiny_onnx_fp32, folder, tmp_path / "out")
    for name in (".mine.tmp", ".manifest.json.tmp", "rows/.part-000000.parquet.tmp"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out/.mine.lock").touch()
    cnx.batch(tiny_onnx_fp32, folder, tmp_path / "out")
    hidden = sorted(path.name for path in (tmp_path / "out").rglob(".*"))
    assert hidden == [".mine.lock", ".mine.tmp"]


def test_a_folder_of_something_else_is_refused(folder, tiny_onnx_fp32, tmp_path):
    with pytest.raises(OutputExistsError, match="not empty"):
        cnx.batch(tiny_onnx_fp32, folder, folder)
    with pytest.raises(OutputExistsError, match="is a file"):
        cnx.batch(tiny_onnx_fp32, folder, folder / "0001.jpg")
    cnx.batch(tiny_onnx_fp32, folder, tmp_path / "out", part_size=4)
    pq.write_table(pa.table({"index": [1]}), tmp_path / "out/rows/more.parquet")
    with pytest.raises(OutputExistsError, match=r"more\.parquet is no file of this output"):
        cnx.batch(tiny_onnx_fp32, folder, tmp_path / "out", part_size=4)


def test_rows_inside_a_folder_of_parquet_files_are_refused(contents, tiny_onnx_fp32, tmp_path):
    write_parquet(tmp_path / "images.parquet", contents[:2])
    with pytest.raises(InputError, match="inside the folder of images"):  # a second run would take them for images
        cnx.batch(tiny_onnx_fp32, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_run_at_once_is_refused(folder, tiny_onnx_fp32, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.batch.lock"), pytest.raises(InputError, match="Another run is writing"):
        cnx.batch(tiny_onnx_fp32, folder, tmp_path / "out")


def test_images_after_the_end_of_a_cut_tar_are_not_dropped_in_silence(contents, expected, tiny_onnx_fp32, tmp_path):
    whole = write_tar(tmp_path / "whole.tar", contents[:6]).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        members = archive.getmembers()
    cases = {"data": members[8].offset_data + 100, "header": members[8].offset + 100, "end": members[-1].offset + 1024}
    for name, size in cases.items():
        (tmp_path / f"{name}.tar").write_bytes(whole[:size])
        result = cnx.batch(tiny_onnx_fp32, tmp_path / f"{name}.tar", tmp_path / name, part_size=4)
        rows = rows_of(tmp_path / name)
        there = {"data": 4, "header": 4, "end": 6}[name]
        assert answers(rows)[:there] == answers(expected)[:there], name
        assert result.errors == len(rows) - there == (2 if name == "data" else 1), name
        assert "images after its last one may be missing" in rows[-1]["error"]
    assert "0004.jpg is cut off" in rows_of(tmp_path / "data")[4]["error"]


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ("none/*.jpg", {}, r"No file matches the pattern .*none/\*\.jpg"),
        ("none", {}, "is not there"),
        ("empty", {}, "holds no images, tars or Parquet files"),
        ("text.parquet", {}, r"text\.parquet has no columns of bytes; its columns are key \(string\)"),
        ("two.parquet", {}, "has 2 columns of bytes"),
        ("two.parquet", {"column": "key"}, "no column key of image bytes"),
        ("torn.parquet", {}, "cannot be read as a Parquet file"),
        ("images.tar.gz", {}, "compressed archive"),
        ("torn.tar", {}, "cannot be read as a tar archive"),
        ("table.csv", {}, "where one column of paths was expected"),
        ("table.csv", {"column": "file"}, "no one column file"),
        (("a.jpg", "torn.tar"), {}, r"several kinds: .*image files .*a\.jpg.* and WebDataset tars"),
        ("a.jpg", {"column": "path"}, "--column"),
        ("a.jpg", {"actors": 2}, "--actors .* is of Ray"),
        ("a.jpg", {"keep": ("embedding",)}, "gives logits, and not embedding"),
        ("a.jpg", {"batch_size": 0}, "batch_size is 0"),
        ("a.jpg", {"engine": "ray", "gpus_per_actor": float("nan")}, "gpus_per_actor is nan"),
        ("a.jpg", {"engine": "spark"}, "No engine is called 'spark'"),
        ("a.jpg", {"keep": "embedding"}, "gives logits, and not embedding"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(words, options, message, tiny_onnx_fp32, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jpg").write_bytes(jpegs(1)[0])
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"a": [b"a"], "b": [b"b"], "key": ["a"]}), tmp_path / "two.parquet")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "text.parquet").read_bytes()[:60])
    (tmp_path / "torn.tar").write_bytes(b"no archive" * 100)
    (tmp_path / "images.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "table.csv").write_text("name,label\na.jpg,cat\n")
    source = [tmp_path / word for word in ((words,) if isinstance(words, str) else words)]
    with pytest.raises(InputError, match=message):
        cnx.batch(tiny_onnx_fp32, source, tmp_path / "out", **options)
    assert not list((tmp_path / "out").glob("rows/*.parquet"))


def test_a_row_of_a_parquet_file_without_bytes_is_a_row_with_its_reason(contents, expected, tiny_onnx_fp32, tmp_path):
    pq.write_table(pa.table({"image": [contents[0], None, contents[2]]}), tmp_path / "images.parquet")
    cnx.batch(tiny_onnx_fp32, tmp_path / "images.parquet", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert "Row 1 of" in rows[1]["error"]
    assert [answers(rows)[0], answers(rows)[2]] == [answers(expected)[0], answers(expected)[2]]


def test_a_name_that_is_no_utf_8_is_escaped(tiny_onnx_fp32, tmp_path):
    photos = tmp_path / os.fsdecode(b"caf\xe9")
    photos.mkdir()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(photos / os.fsdecode(b"caf\xe9.gif"), save_all=True, append_images=frames[1:])
    result = cnx.batch(tiny_onnx_fp32, photos, tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert row["error"] is None
    assert row["id"].endswith("caf\\udce9/caf\\udce9.gif")
    assert any("several frames" in text for text in result.notes)
    assert cnx.batch(tiny_onnx_fp32, photos, tmp_path / "out").was_finished


def test_a_column_may_have_a_point_in_its_name(contents, expected, tiny_onnx_fp32, tmp_path):
    pq.write_table(pa.table({"image.jpg": contents}), tmp_path / "images.parquet")
    cnx.batch(tiny_onnx_fp32, tmp_path / "images.parquet", tmp_path / "out", part_size=4)
    assert answers(rows_of(tmp_path / "out")) == answers(expected)


def test_of_a_folder_of_parquet_files_folders_and_hidden_files_are_left_out(contents, tiny_onnx_fp32, tmp_path):
    (tmp_path / "table.parquet").mkdir()  # as Spark writes one
    write_parquet(tmp_path / "table.parquet/part-0.parquet", contents[:3])
    (tmp_path / "table.parquet/._part-0.parquet").write_bytes(b"of a Finder")
    source = find_source([tmp_path])
    assert [(Path(part.place).name, part.count) for part in source.parts] == [("part-0.parquet", 3)]


def test_a_file_that_goes_while_the_others_are_made_is_missed_at_the_end(folder, tiny_onnx_fp32, tmp_path):
    out = tmp_path / "out"

    def lose(text, share):
        (out / "rows/part-000001.parquet").unlink(missing_ok=True)

    with pytest.raises(CheckFailedError, match=r"part-000001\.parquet is missing or damaged"):
        cnx.batch(tiny_onnx_fp32, folder, out, part_size=4, progress=lose)
    assert not (out / "manifest.json").exists()
    assert cnx.batch(tiny_onnx_fp32, folder, out, part_size=4).done == 4


@pytest.mark.slow
def test_a_kill_before_any_change_of_the_folder_loses_no_row_and_doubles_none(contents, tiny_onnx_fp32, tmp_path):
    images = write_folder(tmp_path / "photos", contents[:4])
    words = [sys.executable, "-m", "tests.support.batch_sweep", tiny_onnx_fp32.path, images, tmp_path / "sweep"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert [point["killed"] for point in points] == [True] * (len(points) - 1) + [False]
    assert {point["files"] for point in points} == {0, 1, 2}
    assert all(point["files"] == 2 for point in points if point["manifest"])
    assert not any(point["left"] for point in points)
