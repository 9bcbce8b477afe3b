"""What importing the package costs."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys

import pytest

import cnx_deploy
from cnx_deploy.cli import main

HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "tensorrt", "tensorrt_rtx", "numpy", "lightning", "PIL", "rich")

OF_RAY = ("ray", "starlette", "prometheus_client", "python_multipart")
"""What the extra `ray` brings, which has an environment of its own."""


def modules_after(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter once `code` has ended the way a command does."""
    script = (
        f"import json, sys\ntry:\n    {code}\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "words", ["--help", "export --help", "predict --help", "doctor --help", "train --help", "package triton --help"]
)
def test_help_loads_click_and_no_heavy_package(words: str) -> None:
    loaded = modules_after(f"import cnx_deploy.cli; cnx_deploy.cli.main({words.split()})")
    assert "click" in loaded
    assert not loaded & set(HEAVY)


def test_importing_the_package_loads_nothing_else() -> None:
    assert not modules_after("import cnx_deploy") & {"click", *HEAVY}


def test_every_module_imports() -> None:
    for module in pkgutil.walk_packages(cnx_deploy.__path__, "cnx_deploy."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] not in OF_RAY:
                raise


@pytest.mark.parametrize(("command", "policy"), [("variants", "passive"), ("bench", None)])
def test_threads_wait_without_spinning_but_in_the_benchmark(
    command: str, policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    found = os.environ.pop("OMP_WAIT_POLICY", None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert (found, os.environ["OMP_WAIT_POLICY"]) == (policy, "active")
