"""The HTML page read back: a strict tree of it, and folders of manifests to make one from."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from cnx_deploy.report.html.page import gather, render

ROOT = Path(__file__).parents[2]
VOID = {"meta", "link", "br", "img", "input"}
CREATED = "2026-01-02T03:04:05+00:00"


@dataclass
class Node:
    """An element with its attributes and, in order, its children and texts."""

    tag: str
    attributes: dict[str, str]
    children: list["Node | str"] = field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> list["Node"]:
        """Elements below with this tag and, by word, these attributes; `class_` for class."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [
            node
            for node in self.walk()
            if node.tag == tag and all(value in node.attributes.get(key, "").split() for key, value in wanted.items())
        ]

    def one(self, tag: str, **attributes: str) -> "Node":
        """The only such element."""
        (found,) = self.all(tag, **attributes)
        return found

    def walk(self) -> Iterator["Node"]:
        """Every element below, in order."""
        for child in self.children:
            if isinstance(child, Node):
                yield child
                yield from child.walk()

    @property
    def text(self) -> str:
        """All text below, white space made one."""
        parts = [child if isinstance(child, str) else child.text for child in self.children]
        return " ".join(" ".join(parts).split())

    @property
    def values(self) -> list[float]:
        """The exact numbers below, as `data` elements hold them."""
        return [float(node.attributes["value"]) for node in self.all("data")]


class _Reader(HTMLParser):
    """Builds the tree; what is not closed in order is an error, as no browser's repair is wanted."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute: {names}"
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert any(node.tag == "svg" for node in self.open), f"<{tag}/> is for SVG alone"
        self.open[-1].children.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}> at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parsed(html: str) -> Node:
    """The tree of a page that is closed properly."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == [reader.root], f"never closed: {[node.tag for node in reader.open[1:]]}"
    return reader.root


def page_of(folder: Path, **documents: tuple[Path, ...]) -> str:
    """The page over export/ and engines/ of a folder, made at a fixed time."""
    return render(gather(folder / "export", folder / "engines", created=CREATED, **documents))


def section(page: Node, name: str) -> Node:
    """The section under the heading with this id."""
    (found,) = [node for node in page.all("section") if node.attributes.get("aria-labelledby") == name]
    return found


def rows(table: Node) -> dict[str, Node]:
    """The rows of a table's body by their heading."""
    return {row.one("th").text: row for row in table.one("tbody").all("tr")}


def manifest(name: str, folder: str = "export") -> dict[str, Any]:
    """One of the repository's own manifests."""
    document: dict[str, Any] = json.loads((ROOT / folder / f"{name}.json").read_text(encoding="utf-8"))
    return document


def put(folder: Path, name: str, change: Callable[[dict[str, Any]], None] | None = None, kind: str = "export") -> Path:
    """Copy one of the repository's manifests into a folder's export/ or engines/, changed; its path."""
    data = manifest(name, kind)
    if change is not None:
        change(data)
    path = folder / kind / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path
