"""Without the extra `ray`: what `serve` says."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from cnx_deploy.core.errors import MissingRequirementError


def test_serving_without_the_extra_names_it(tiny_onnx_fp32: Any, monkeypatch: pytest.MonkeyPatch, cnx: Any) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest))
    code, _, err = cnx("serve", Path(tiny_onnx_fp32.path), "--port", "0")
    assert (code, "cnx-deploy[ray]" in err) == (MissingRequirementError.exit_code, True)
