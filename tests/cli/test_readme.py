"""The pages' commands exist, the main ones and all Python run as written; links and the table of models hold."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cnx_deploy.cli import cli
from cnx_deploy.cli.options import DefaultGroup
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.report.records import check_records
from tests.support.artifacts import copy_artifact

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [
    path.relative_to(ROOT)
    for path in (README, ROOT / "CONTRIBUTING.md", ROOT / "llms.txt", *sorted((ROOT / "docs").rglob("*.md")))
]
PYTHON_BLOCKS = [
    pytest.param(code, id=f"{page}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL))
]


def block_below(page: Path, heading: str, language: str) -> str:
    """The first code block of a language below a heading."""
    text = page.read_text(encoding="utf-8")
    match = re.search(rf"```{language}\n(.*?)```", text[text.index(f"\n{heading}\n") :], re.DOTALL)
    assert match is not None
    return match[1]


def run_in(folder: Path, commands: list[str], **replacements: str) -> str:
    """Run commands in bash, stopping at the first that fails; returns what they print."""
    script = "\n".join(commands)
    for name, value in replacements.items():
        script = re.sub(rf"\b{re.escape(name)}\b", value, script)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_four_commands_work_in_an_empty_folder_and_print_the_readmes_columns(tmp_path: Path) -> None:
    block = block_below(README, "## Four commands", "console")
    commands = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    assert len(commands) == 4
    # As written they take two minutes and show no more.
    shorter = (" --batch 1:2:4 --image-size 64", "", "", " --batch 1 --duration 0.3")
    commands = [command + more for command, more in zip(commands, shorter, strict=True)]
    printed = run_in(tmp_path, commands)
    assert (tmp_path / "engines" / "atto-64-fp16-rtx-sm89.engine").is_file()
    assert "FAIL" not in printed
    assert "INVALID" not in printed
    columns = [line.partition("…")[0].strip() for line in block.splitlines() if line.startswith("artifact ")]
    assert [line for line in columns if line not in printed] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_for_a_folder_of_images_work_on_a_few_digits(tmp_path: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in (0, 1):
        for number, index in enumerate((digits.target == label).nonzero()[0][:10]):
            folder = tmp_path / "images" / ("val" if number < 2 else "train") / f"digit-{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[index] * 15).astype("uint8")).resize((64, 64)).save(folder / f"{number}.png")
    Image.new("RGB", (80, 60), "gray").save(tmp_path / "photo.jpg")
    block = block_below(ROOT / "docs" / "train.md", "## Fine-tune on a folder of images", "bash")
    assert "digit-0" in run_in(tmp_path, block.splitlines(), DATA="images")


@pytest.fixture(scope="module")
def folder(tiny_onnx_fp16: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a photo, in which the smallest network has been exported before: that takes seconds."""
    from PIL import Image

    made = tmp_path_factory.mktemp("pages")
    copy_artifact(tiny_onnx_fp16, made / "export")
    Image.new("RGB", (80, 60), "gray").save(made / "photo.jpg")
    return made


@pytest.mark.usefixtures("quick_timing")
@pytest.mark.parametrize("code", PYTHON_BLOCKS)
def test_the_pages_python_runs_as_it_is_written(
    code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    small = 'export("tiny-test", image_size=32, num_classes=10, batch=(1, 4, 8)'
    exec(compile(re.sub(r'export\(\s*"atto"', small, code), "page", "exec"), {})
    assert "FAIL" not in capsys.readouterr().out


def written_commands(text: str) -> set[tuple[str, ...]]:
    """The words of each `cnx-deploy …` in a page: in a code span, or at the beginning of a line or of a prompt."""
    spans = re.findall(
        r"`(?:\w+=\S+ )?cnx-deploy ([^`]+)`|^(?:\$ )?cnx-deploy (.+)", text.replace("\\\n", " "), re.MULTILINE
    )
    return {tuple(re.split(r"\s#|&&|\|", span or line)[0].split()) for span, line in spans}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_and_option_on_a_page_exists(page: Path) -> None:
    for words in written_commands((ROOT / page).read_text(encoding="utf-8")):
        command: click.Command = cli
        context = click.Context(cli)
        rest = list(words)
        while isinstance(command, click.Group) and rest and not rest[0].startswith(("-", "…", "COMMAND")):
            found = command.get_command(context, rest[0])
            if found is not None:
                rest.pop(0)
            elif isinstance(command, DefaultGroup):
                found = command.default  # called bare, as `verify FILE` beside `verify saved`
            assert found is not None, words
            command, context = found, click.Context(found, parent=context)
        if isinstance(command, DefaultGroup):
            command = command.default
        known = {name for option in command.get_params(context) for name in option.opts + option.secondary_opts}
        given = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert given <= known, words


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / page.parent / link).exists()] == []


def test_the_index_and_the_readmes_table_are_what_the_manifests_say() -> None:
    check_records(ROOT / "export", ROOT / "engines", README)


def test_the_command_line_reference_has_every_command() -> None:
    text = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    blocks = re.findall(r":module: (\S+)\n +:command: (\w+)\n +:prog_name: cnx-deploy (.+)", text)
    documented = {name: getattr(importlib.import_module(module), command) for module, command, name in blocks}
    context, expected = click.Context(cli), dict[str, click.Command]()
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        if isinstance(command, DefaultGroup):
            expected |= {name: command.default, **{f"{name} {sub}": made for sub, made in command.commands.items()}}
        elif command is not None:
            expected[name] = command
    assert documented == expected
