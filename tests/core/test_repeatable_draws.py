"""The run that gates a change draws the same examples in any order of tests."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def draws() -> list[float]:
    """What a property test of one function is given."""
    drawn: list[float] = []

    @settings(max_examples=100, derandomize=True)
    @given(st.floats(allow_nan=False))
    def keep(value: float) -> None:
        drawn.append(value)

    keep()
    return drawn


@pytest.mark.skipif(settings.get_current_profile_name() != "repeatable", reason="this run draws new examples")
def test_draws_do_not_depend_on_the_modules_that_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = draws()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "with_constants.py").write_text(f"VALUES = {[n + 0.37 for n in range(200)]}\n")
    import_module("with_constants")
    assert draws() == before
    del sys.modules["with_constants"]
