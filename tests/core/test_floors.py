"""Imports run downwards: a folder uses those on lower floors and none beside it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cnx_deploy"
FLOORS = (
    {"core"}, {"kernels"}, {"data", "model"}, {"exporters", "training"}, {"runners"}, {"verification"},
    {"bench", "diagnosis", "serving"}, {"report"}, {"api"}, {"cli"}, {"__main__"},
)  # fmt: skip
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "cnx_deploy":
            yield from (alias.name for alias in node.names if alias.name in FLOOR_OF)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cnx_deploy."):
            yield node.module.split(".")[1]


def upward_imports(package: Path) -> list[str]:
    rooms = {path: path.relative_to(package).parts[0].removesuffix(".py") for path in sorted(package.rglob("*.py"))}
    return [
        f"{path.relative_to(package)} imports {other}"
        for path, room in rooms.items()
        if room != "__init__"
        for other in imported_rooms(path)
        if other != room and FLOOR_OF[other] >= FLOOR_OF[room]
    ]


def test_every_folder_imports_lower_floors_only() -> None:
    assert upward_imports(PACKAGE) == []


@pytest.mark.parametrize("line", ["from cnx_deploy.bench.timing import measure", "from cnx_deploy import api"])
def test_an_upward_import_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "errors.py").write_text(line, encoding="utf-8")
    assert len(upward_imports(tmp_path)) == 1
