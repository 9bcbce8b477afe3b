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


def loaded_with(module: str) -> dict[str, str]:
    """Packages of others that importing a module of ours loads by itself, and a module of ours that names each."""
    found, seen, waiting = dict[str, str](), set[str](), [module]
    while waiting:
        name = waiting.pop()
        path = PACKAGE.joinpath(*name.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in seen or not path.exists():
            continue
        seen.add(name)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # what a function imports is loaded later
            if isinstance(node, ast.ImportFrom):
                named = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            waiting += [other for other in named if other.startswith("cnx_deploy.")]
            found |= {other.partition(".")[0]: name for other in named if not other.startswith("cnx_deploy")}
    return found


def test_the_api_loads_torch_and_no_package_that_few_commands_use() -> None:
    loaded = loaded_with("cnx_deploy.api")
    assert "torch" in loaded
    # torchvision takes five seconds of processor time, most of them for torch's compiler.
    assert not loaded.keys() & {"torchvision", "lightning", "transformers", "timm"}, loaded


def test_every_folder_imports_lower_floors_only() -> None:
    assert upward_imports(PACKAGE) == []


@pytest.mark.parametrize("line", ["from cnx_deploy.bench.timing import measure", "from cnx_deploy import api"])
def test_an_upward_import_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "errors.py").write_text(line, encoding="utf-8")
    assert len(upward_imports(tmp_path)) == 1
