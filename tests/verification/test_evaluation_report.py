"""What an evaluation says: the command, its text, its plot."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image

from cnx_deploy.cli import main
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import image_like_batches
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.verification.evaluation.plot import MOST_CLASSES, write_plot
from cnx_deploy.verification.evaluation.report import lines_of
from cnx_deploy.verification.evaluation.tally import Tally

NAMES = ("ant", "bee", "cow", "dog")


def tallied(classes, count=200, name="class {}"):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 2.0
    names = tuple(name.format(index) for index in range(classes))
    tally = Tally(names)
    tally.add(logits, labels, [f"{index}.png" for index in range(count)])
    return tally.result(names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random checkpoint of atto at 32 px, four classes of three images, one of them broken."""
    root = tmp_path_factory.mktemp("evaluation")
    pixels = torch.cat(list(image_like_batches(12, 32, batch_size=12)))
    for index, image in enumerate(pixels):
        path = root / "data" / "validation" / NAMES[index % 4] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(path)
    path.write_text("no image")
    save_checkpoint(
        root / "atto.safetensors",
        random_model("atto", 4),
        class_names=NAMES,
        preprocessing=Preprocessing(image_size=32),
    )
    return root


def run(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def test_the_command_tells_and_writes_everything_and_a_broken_image_is_no_failure(folder, capsys):
    files = {"--plot": folder / "out" / "plot.svg", "--save-predictions": folder / "out" / "rows.csv"}
    words = [word for pair in files.items() for word in pair]
    code, out, err = run(capsys, "eval", folder / "atto.safetensors", folder / "data", "--json", *words)
    found = json.loads(out)
    assert code == 0, err
    assert (found["count"], len(found["broken"]), found["device"] != "") == (11, 1, True)
    assert found["broken"][0]["path"].endswith("dog/11.png")
    assert sum(cell["count"] for cell in found["confusion"]) == 11
    assert {each["name"] for each in found["per_class"]} == set(NAMES)
    assert {"precision", "recall", "f1", "count"} <= set(found["per_class"][0])
    assert sum(each["count"] for each in found["calibration"]["bins"]) == 11
    assert found["mean_nll"] > 0
    assert len(found["worst"]) == min(10, 11 - found["correct_top1"])
    assert files["--plot"].is_file()
    assert len(files["--save-predictions"].read_text().splitlines()) == 12


def test_the_commands_text_names_rates_pairs_mistakes_and_broken_files(folder, capsys):
    code, out, err = run(capsys, "eval", folder / "atto.safetensors", folder / "data")
    lines = out.splitlines()
    assert code == 0, err
    assert lines[1].startswith("top-1 ")
    for start in ("mean over classes: precision", "calibration error", "most often confused", "the most confident"):
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert [line.split()[0] for line in lines if line.startswith("  ") and line.count("%") == 3] == list(NAMES)
    assert "1 of 12 images cannot be read and are not counted:" in lines
    assert "dog/11.png cannot be read" in lines[-1]


def test_a_plot_or_predictions_that_cannot_be_written_end_the_command_before_the_work(folder, capsys):
    for words, message in ((("--plot", "plot.png"), ".svg"), (("--save-predictions", "rows.txt"), ".csv")):
        code, out, err = run(capsys, "eval", folder / "absent.onnx", folder / "data", *words)
        assert (code, out) == (2, "")
        assert message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, where the device is there")
def test_ep_silent_fallback_of_eval_is_exit_code_5(folder, capsys):
    code, _, err = run(capsys, "eval", folder / "atto.safetensors", folder / "data", "--device", "cuda")
    assert code == 5
    assert "no GPU" in err


def test_more_classes_than_can_be_listed_are_told_by_the_worst():
    lines = list(lines_of(tallied(50, 2000)))
    rows = [line for line in lines if line.startswith("  class ") and line.count("%") == 3]
    rates = [float(row.split()[-2]) for row in rows]
    assert len(rows) == 20
    assert rates == sorted(rates)
    assert any("20 classes of the lowest F1 of 50" in line for line in lines)
    assert len([line for line in lines_of(tallied(40)) if line.startswith("  class ") and line.count("%") == 3]) == 40


def text_of(path):
    return " ".join(ElementTree.parse(path).getroot().itertext())


@pytest.mark.parametrize("classes", [2, 12, MOST_CLASSES])
def test_the_plot_has_a_cell_for_each_pair_up_to_forty_classes(tmp_path, classes):
    text = text_of(write_plot(tallied(classes), tmp_path / "plot.svg", "a title"))
    assert "a title" in text
    assert "share of the label" in text
    assert "too many" not in text
    assert all(f"class {index}" in text for index in range(classes))


def test_the_plot_of_more_classes_shows_the_most_confused_pairs_and_says_so(tmp_path):
    found = tallied(MOST_CLASSES + 1, 2000)
    text = text_of(write_plot(found, tmp_path / "plot.svg", "a title"))
    assert "41 classes are too many for a matrix" in text
    assert "the 25 most confused of" in text
    worst = found.confused_pairs[0]
    assert f"{worst.label} → {worst.predicted}" in text


def test_the_same_evaluation_gives_the_same_bytes_and_names_are_taken_as_they_are(tmp_path):
    found = tallied(3, name="$x^{}$ & <b>")
    first, second = (write_plot(found, tmp_path / name, "t").read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert "$x^2$ & <b>" in text_of(tmp_path / "a.svg")
