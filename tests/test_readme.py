"""The README's commands, run as they are written; its links and its table."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cnx_deploy.cli import COMMANDS

ROOT = Path(__file__).parent.parent
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


def test_every_command_is_in_the_readme_or_the_change_log() -> None:
    known = TEXT + (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`{name}`" not in known and f"cnx-deploy {name}" not in known] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/faults.md"])
def test_relative_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not ((ROOT / page).parent / link).exists()]
    assert broken == []


def test_every_module_is_on_the_architecture_page() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = [path for path in (ROOT / "cnx_deploy").glob("**/*.py") if not path.name.startswith("__")]
    missing = [path.name for path in modules if path.name not in page and path.parent.name not in ("cli", "runners")]
    assert missing == []


def test_records_and_the_readmes_table_are_what_the_manifests_say() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cnx_deploy", "report", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_changed_figure_in_the_table_is_found(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(TEXT.replace("3,708,400", "3,708,401"), encoding="utf-8")
    words = ["report", "--check", "--readme", "README.md"]
    folders = ["--export-dir", str(ROOT / "export"), "--engines-dir", str(ROOT / "engines")]
    done = subprocess.run(
        [sys.executable, "-m", "cnx_deploy", *words, *folders],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "README.md" in done.stderr
