"""The commands as a user meets them: exit codes, messages, documents, and one run from export to prediction."""

import errno
import json
import os
import pty
import select
import shutil
import sys

import click
import pytest
from PIL import Image

from cnx_deploy import __version__
from cnx_deploy.cli import COMMANDS, cli, main, options
from cnx_deploy.core.system import find_gpus, package_version
from cnx_deploy.data import image_like_batches
from cnx_deploy.report import doctor
from tests.support.artifacts import copy_artifact

EXPORT = ("export", "--variant", "tiny-test", "--image-size", "32", "--num-classes", "10", "--batch", "1:4:8")
"""What the shared artifacts were asked for with, as a user asks."""


@pytest.fixture(scope="session")
def exported_folder(tiny_onnx_fp32, tiny_onnx_fp16, tmp_path_factory):
    """A folder with the smallest network at 32 px in both precisions in `export/`, and an image of each class."""
    folder = tmp_path_factory.mktemp("project")
    for artifact in (tiny_onnx_fp32, tiny_onnx_fp16):
        copy_artifact(artifact, folder / "export")
    for index, image in enumerate(image_like_batches(10, 40, batch_size=1)):
        path = folder / "images" / str(index) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    return folder


@pytest.fixture
def project(exported_folder, tmp_path, monkeypatch):
    """A copy of that folder as the working directory."""
    folder = shutil.copytree(exported_folder, tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_of_the_table_answers_help_under_its_own_name(cnx, command):
    code, out, _ = cnx(command, "--help")
    assert code == 0
    assert out.startswith(f"Usage: cnx-deploy {command} ")


def test_each_name_of_the_table_is_another_command():
    commands = [cli.get_command(click.Context(cli), name) for name in COMMANDS]
    assert len({id(command) for command in commands}) == len(COMMANDS)


def test_the_groups_help_lists_every_command_and_keeps_the_lines_of_its_example(cnx):
    code, out, _ = cnx("--help")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("  cnx-deploy verify   ")]
    for command, (_, text) in COMMANDS.items():
        assert f"  {command:9}  {text}" in out


def test_no_words_show_the_help_as_a_usage_error(cnx):
    code, _, err = cnx()
    assert code == 2
    assert "Commands:" in err


def test_the_version_is_the_packages(cnx):
    assert cnx("--version") == (0, f"cnx-deploy, version {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("frobnicate",), "No such command 'frobnicate'"),
        (("export", "--variant", "gigantic"), "'gigantic' is not one of"),
        (("export", "--variant", "atto", "--batch", "8:1"), "'8:1' is not a batch"),
        (("export", "--variant", "atto", "--batch", "8:4:1"), "must rise"),
        (("export", "--variant", "atto", "--batch", "0"), "must rise"),
        (("export", "--variant", "atto", "--image-size", "16"), "32 to 65536 pixels"),
        (("export", "--variant", "atto", "--image-size", "64*96"), "256x512"),
        (("export", "--variant", "atto", "--checkpoint", "absent.pt"), "'absent.pt' does not exist"),
        (("verify",), "Run `cnx-deploy export --variant atto` first"),
        (("build-trt",), "Run `cnx-deploy export --variant atto` first"),
        (("verify", "absent.onnx"), "absent.onnx does not exist"),
        (("inspect", "absent.onnx"), "No such file"),
        (("predict", "absent.onnx", "image.png"), "No such file"),
        (("predict", "absent.onnx"), "Missing argument 'IMAGES...'"),
        (("eval", "absent.onnx", "."), "No such file"),
    ],
)
def test_log_and_error_hygiene_wrong_usage_is_exit_code_2_with_one_message(cnx, empty, words, expected):
    code, out, err = cnx(*words)
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("Error: ") == 1
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("predict", "absent.onnx", "image.png", "--json"), "InputError"),
        (("export", "--variant", "gigantic", "--json"), "BadParameter"),
        (("inspect", "--json"), "MissingParameter"),
    ],
)
def test_log_and_error_hygiene_an_error_with_json_is_the_one_document(cnx, empty, words, name):
    code, out, err = cnx(*words)
    document = json.loads(out)
    assert (code, document["exit_code"], document["error"]) == (2, 2, name)
    assert document["message"] in err.replace("\n", "")


def test_what_the_system_refuses_is_a_message_and_exit_code_1(cnx, empty, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(doctor, "examine", full)
    code, out, err = cnx("doctor")
    assert (code, out) == (1, "")
    assert err.startswith("Error: The system refused: [Errno 28] No space left on device")


def test_log_and_error_hygiene_a_traceback_is_shown_with_debug_only(cnx, empty):
    from cnx_deploy.core.errors import InputError

    assert "Traceback" not in cnx("inspect", "absent.onnx")[2]
    with pytest.raises(InputError):
        main(["--debug", "inspect", "absent.onnx"])


def test_log_and_error_hygiene_control_characters_in_a_files_name_are_escaped(cnx, empty):
    """A name that would colour the terminal, ring its bell and erase the line."""
    code, _, err = cnx("inspect", "red\x1b[31m\x07\x9b2K\u202e.onnx")
    assert code == 2
    assert r"red\x1b[31m\x07\x9b2K\u202e.onnx" in err
    assert not [character for character in err if not character.isprintable() and character != "\n"]


def test_log_and_error_hygiene_results_on_stdout_are_escaped_too(capsys):
    options.echo("photo\x1b]0;owned\x07.png: cat")
    assert capsys.readouterr().out == "photo\\x1b]0;owned\\x07.png: cat\n"


def test_log_and_error_hygiene_no_secret_of_the_environment_is_printed(cnx, empty, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2-hunter2")
    for words in (("inspect", "absent"), ("export", "--variant", "atto", "--batch", "x"), ("doctor", "--json")):
        assert "hunter2" not in "".join(cnx(*words)[1:])


def test_build_sigint_sigterm_is_exit_code_130(cnx, empty, monkeypatch):
    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert cnx("doctor")[0] == 130


OF_TESTS = ("tiny-test", "narrow-test")


def test_variants_as_json_is_one_document_of_both_versions(cnx):
    code, out, err = cnx("variants", "--json")
    versions = [entry["version"] for entry in json.loads(out)["variants"] if entry["variant"] not in OF_TESTS]
    assert (code, err, versions) == (0, "", [2] * 8 + [1] * 9)


def test_doctor_prints_a_line_a_finding_and_exits_with_0(cnx, empty):
    code, out, _ = cnx("doctor")
    _, document, _ = cnx("doctor", "--json")
    findings = json.loads(document)["findings"]
    assert code == 0
    assert len(out.splitlines()) == len(findings)
    for line, finding in zip(out.splitlines(), findings, strict=True):
        assert line.startswith(finding["status"])
        assert finding["remedy"] in line


def test_what_export_wrote_verifies(cnx, project):
    (project / "export" / "tiny-test-32-fp16.onnx").unlink()  # its emulated rounding takes long on a CPU
    code, out, err = cnx("verify", "--samples", "1", "--json")
    (entry,) = json.loads(out)["verifications"]
    assert (code, entry["artifact"], entry["passed"]) == (0, "tiny-test-32-fp32.onnx", True)
    assert "1 recorded artifacts have no file here" in err


def test_what_export_wrote_is_inspected_with_its_parity(cnx, project):
    code, out, _ = cnx("inspect", "export/tiny-test-32-fp16.onnx")
    assert code == 0
    assert out.startswith("export/tiny-test-32-fp16.onnx: an ONNX file, ")
    assert "match the manifest (1 of 1 files)" in out
    assert "parity passed      True" in out


def test_inspect_shows_every_file_and_ends_with_the_worst_exit_code(cnx, project):
    good, altered, folder = "export/tiny-test-32-fp32.onnx", project / "export" / "tiny-test-32-fp16.onnx", "images"
    altered.write_bytes(altered.read_bytes()[:-1])
    code, out, err = cnx("inspect", altered, good, folder, good)
    blocks = out.split("\n\n")
    assert (code, len(blocks), blocks[0].rstrip()) == (4, 2, blocks[1].rstrip())
    assert blocks[0].startswith(f"{good}: an ONNX file, ")
    assert "bytes, its manifest says" in err
    assert "images is a folder, expected a checkpoint, an ONNX file or an engine." in err
    code, out, _ = cnx("inspect", altered, good, folder, "--json")
    rows = json.loads(out)
    assert (code, [row["path"] for row in rows]) == (4, [str(altered), good, folder])
    assert [row.get("exit_code", 0) for row in rows] == [4, 0, 2]
    assert rows[1]["facts"]["precision"] == "fp32"


def test_inspect_as_json_is_a_list_for_one_file_too(cnx, project):
    code, out, _ = cnx("inspect", "export/tiny-test-32-fp16.onnx", "--json")
    assert (code, [row["facts"]["precision"] for row in json.loads(out)]) == (0, ["fp16"])


def test_what_export_wrote_predicts_one_line_an_image_and_says_that_weights_are_random(cnx, project):
    code, out, err = cnx("predict", "export/tiny-test-32-fp32.onnx", "images", "--top", "3")
    assert (code, len(out.splitlines())) == (0, 10)
    assert all(line.count("%") == 3 for line in out.splitlines())
    assert "random" in err


def test_empty_and_truncated_image_is_exit_code_2_after_the_other_answers(cnx, project):
    (project / "images" / "0" / "0.png").write_text("no image")
    code, out, err = cnx("predict", "export/tiny-test-32-fp32.onnx", "images", "--json")
    rows = json.loads(out)["predictions"]
    assert code == 2
    assert [row["error"] is None for row in rows] == [False] + [True] * 9
    assert "1 of 10 files" in err


def test_what_export_wrote_is_evaluated_on_a_folder_of_classes(cnx, project):
    code, out, err = cnx("eval", "export/tiny-test-32-fp32.onnx", "images", "--json", "--batch-size", "3")
    found = json.loads(out)
    assert code == 0, err
    assert (found["count"], found["backend"]) == (10, "onnxruntime")
    assert found["top1_percent"] <= found["top5_percent"] <= 100.0
    assert cnx("eval", "export/tiny-test-32-fp32.onnx", "images")[1].splitlines()[1] == (
        f"top-1 {found['top1_percent']:.2f} %, top-5 {found['top5_percent']:.2f} %"
    )


def test_a_folder_of_other_classes_is_a_usage_error(cnx, project):
    shutil.rmtree(project / "images" / "3")
    code, _, err = cnx("eval", "export/tiny-test-32-fp32.onnx", "images")
    assert code == 2
    assert "the 9 classes of images" in err


@pytest.mark.parametrize("words", [("verify",), ("inspect",), ("build-trt",), ("predict", "images")])
def test_an_altered_file_is_exit_code_4_for_whoever_would_read_it(cnx, project, words):
    path = project / "export" / "tiny-test-32-fp16.onnx"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    command, *rest = words
    code, out, err = cnx(command, path, *rest)
    assert (code, out) == (4, "")
    assert "was altered: SHA-256" in err


def test_engine_unsigned_or_unlisted_is_refused_by_predict(cnx, project):
    (project / "foreign.engine").write_bytes(b"vtrt" + bytes(100))
    code, _, err = cnx("predict", "foreign.engine", "images")
    assert code == 4
    assert "native code" in err


@pytest.mark.skipif(not package_version("tensorrt-rtx"), reason="tensorrt-rtx is not installed")
@pytest.mark.skipif(bool(find_gpus()), reason="has a GPU, where an engine would run")
def test_no_gpu_behaviour_is_exit_code_5_where_a_gpu_is_needed(cnx, project, tiny_engine):
    """The command finds the shared engine made: a build takes seconds."""
    copy_artifact(tiny_engine, project / "engines")
    words = ("--target", "rtx4090", "--runtime", "tensorrt-rtx", "--batch", "1", "--batch", "1:4:8")
    code, out, _ = cnx("build-trt", "export/tiny-test-32-fp16.onnx", *words)
    assert (code, out) == (0, "engines/tiny-test-32-fp16-rtx-sm89.engine\n")
    for words in (("verify", out.strip()), ("predict", out.strip(), "images"), ("build-trt", "--target", "current")):
        code, printed, err = cnx(*words, "--json")
        assert code == 5, err
        assert json.loads(printed)["error"] == "MissingRequirementError"
    assert cnx("inspect", out.strip())[0] == 0


def test_the_command_asks_for_what_its_words_say_in_both_precisions_and_reuses_what_is_there(cnx, project):
    paths = [f"export/tiny-test-32-{precision}.onnx" for precision in ("fp32", "fp16")]
    before = [(project / path).stat().st_mtime_ns for path in paths]
    code, out, err = cnx(*EXPORT)
    assert (code, out.splitlines(), err.count("reused")) == (0, paths, 2)
    assert [(project / path).stat().st_mtime_ns for path in paths] == before
    code, _, err = cnx(*EXPORT, "--batch", "1:2:8")
    assert (code, "Use --force" in err) == (2, True)


@pytest.mark.parametrize(("piped", "json", "count"), [(False, False, 1), (True, False, 2), (False, True, 2)])
def test_a_path_is_printed_once_where_both_streams_are_one_terminal(project, tmp_path, monkeypatch, piped, json, count):
    """`reused` shows it on stderr; what is piped or read by a program has it on stdout too."""
    terminal, side = pty.openpty()
    with (
        os.fdopen(terminal, "rb", buffering=0) as screen,
        os.fdopen(side, "w") as both,
        (tmp_path / "piped").open("w+") as pipe,
    ):
        monkeypatch.setattr(sys, "stderr", both)
        monkeypatch.setattr(sys, "stdout", pipe if piped else both)
        with pytest.raises(SystemExit):
            main([*EXPORT, "--precision", "fp32", *(["--json"] if json else [])])
        monkeypatch.undo()
        pipe.seek(0)
        shown = pipe.read().encode()
        while select.select([screen], [], [], 0.0)[0]:
            shown += screen.read(65536)
    assert shown.count(b"export/tiny-test-32-fp32.onnx") == count


@pytest.mark.slow
def test_another_export_to_the_same_name_is_refused_without_force_and_done_with_it(cnx, project):
    path = project / "export" / "tiny-test-32-fp32.onnx"
    before = path.read_bytes()
    other = (*EXPORT, "--precision", "fp32", "--seed", "1")
    code, _, err = cnx(*other)
    assert code == 2
    assert "Use --force" in err
    assert path.read_bytes() == before
    assert cnx(*other, "--force")[0] == 0
    assert path.read_bytes() != before


def test_train_is_reached_and_names_what_its_data_lacks(cnx, empty):
    code, out, err = cnx("train", "nowhere", "--variant", "atto")
    assert (code, out) == (2, "")
    assert "nowhere is not a folder" in err
