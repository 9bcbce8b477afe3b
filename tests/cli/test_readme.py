"""The pages' commands exist, those of the README run as they are written; links and the table of records hold."""

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cnx_deploy.cli import cli
from cnx_deploy.cli.options import DefaultGroup
from cnx_deploy.report.records import check_records

ROOT = Path(__file__).parents[2]
PAGES = [
    path.relative_to(ROOT) for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def block_after(heading: str) -> list[str]:
    """The commands of the first bash block below a line that holds `heading`; installing is the environment's part."""
    match = re.search(r"```bash\n(.*?)```", TEXT[TEXT.index(heading) :], re.DOTALL)
    assert match is not None
    lines = [line.partition("#")[0].strip() for line in match[1].splitlines()]
    return [line for line in lines if line and not line.startswith("pip install")]


def run_in(folder: Path, commands: list[str], **replacements: str) -> str:
    """Run commands in bash, stopping at the first that fails; returns what they print."""
    script = "\n".join(commands)
    for name, value in replacements.items():
        script = re.sub(rf"\b{re.escape(name.replace('_dot_', '.'))}\b", value, script)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_four_commands_work_in_an_empty_folder(tmp_path: Path) -> None:
    commands = block_after("Or install it and work in any folder")
    assert len(commands) == 4
    # As written they take two minutes and show no more.
    shorter = (" --batch 1:2:4 --image-size 64", " --target sm89", "", " --batch 1 --duration 0.3")
    commands = [command + more for command, more in zip(commands, shorter, strict=True)]
    printed = run_in(tmp_path, commands)
    assert (tmp_path / "engines" / "atto-64-fp16-rtx-sm89.engine").is_file()
    assert "FAIL" not in printed
    assert "INVALID" not in printed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_for_your_own_images_work_on_a_few_digits(tmp_path: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in (0, 1):
        for number, index in enumerate((digits.target == label).nonzero()[0][:10]):
            folder = tmp_path / "images" / ("val" if number < 2 else "train") / f"digit-{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[index] * 15).astype("uint8")).resize((64, 64)).save(folder / f"{number}.png")
    Image.new("RGB", (80, 60), "gray").save(tmp_path / "photo.jpg")
    printed = run_in(tmp_path, block_after("## Your own images"), DATA="images")
    assert "digit-0" in printed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_python_example_runs_as_it_is_written(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (80, 60), "gray").save(tmp_path / "photo.jpg")
    match = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert match is not None
    done = subprocess.run([sys.executable, "-c", match[1]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pass" in done.stdout
    assert done.stdout.count("ClassScore") == 5


def written_commands(text: str) -> set[tuple[str, ...]]:
    """The words of each `cnx-deploy …` in a page: in a code span, or at the beginning of a line."""
    spans = re.findall(r"`(?:\w+=\S+ )?cnx-deploy ([^`]+)`|^cnx-deploy (.+)", text.replace("\\\n", " "), re.MULTILINE)
    return {tuple(re.split(r"\s#|&&|\|", span or line)[0].split()) for span, line in spans}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_and_option_on_a_page_exists(page: Path) -> None:
    for words in written_commands((ROOT / page).read_text(encoding="utf-8")):
        command: click.Command = cli
        context = click.Context(cli)
        rest = list(words)
        while isinstance(command, click.Group) and rest and not rest[0].startswith(("-", "…")):
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
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / page.parent / link).exists()] == []


def test_the_index_and_the_readmes_table_are_what_the_manifests_say() -> None:
    check_records(ROOT / "export", ROOT / "engines", ROOT / "README.md")
