"""What importing costs, and that the package is what it says it is."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cnx_deploy
from cnx_deploy.cli import COMMANDS

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "tensorrt", "tensorrt_rtx", "numpy", "lightning", "PIL", "rich")
MODULES = sorted(module.name for module in pkgutil.walk_packages(cnx_deploy.__path__, "cnx_deploy."))


def modules_after(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter once `code` has ended the way a command does."""
    script = (
        f"import json, sys\ntry:\n    {code}\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_loads_click_and_no_heavy_package():
    loaded = modules_after("import cnx_deploy.cli; cnx_deploy.cli.main(['--help'])")
    assert "click" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("command", ["export", "predict", "inspect", "doctor", "eval", "train"])
def test_a_commands_help_loads_no_heavy_package(command):
    assert not modules_after(f"import cnx_deploy.cli; cnx_deploy.cli.main(['{command}', '--help'])") & set(HEAVY)


def test_the_package_itself_imports_nothing():
    assert not modules_after("import cnx_deploy") & {"click", *HEAVY}


def test_the_walk_finds_every_module_file():
    package = ROOT / "cnx_deploy"
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in package.rglob("*.py")}
    assert {name.removesuffix(".__init__") for name in files} == {"cnx_deploy", *MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_and_has_what_its_all_promises(name):
    module = importlib.import_module(name)
    promised = getattr(module, "__all__", [])
    assert [each for each in promised if not hasattr(module, each)] == []
    assert list(promised) == sorted(set(promised), key=lambda each: (not each.isupper(), not each[0].isupper(), each))


def test_every_command_module_holds_one_command():
    # The lazy group takes the first one it finds.
    import click

    for module_name, _ in COMMANDS.values():
        module = importlib.import_module(f"cnx_deploy.cli.{module_name}")
        assert len([value for value in vars(module).values() if isinstance(value, click.Command)]) == 1, module_name


def test_only_the_backend_module_imports_a_tensorrt():
    importing = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "cnx_deploy").rglob("*.py")
        if any(line.strip().startswith(("import tensorrt", "from tensorrt")) for line in path.read_text().splitlines())
    ]
    assert set(importing) <= {"cnx_deploy/trt/backend.py"}


def test_the_wheel_has_one_top_level_name_and_the_type_marker(tmp_path):
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"cnx_deploy"}
    assert {"cnx_deploy/py.typed", "cnx_deploy/cli/__init__.py"} <= set(names)
