"""The document of `cnx-deploy diagnose layers --json` as a page needs it: the worst of each block on each side."""

from dataclasses import dataclass
from pathlib import Path

from cnx_deploy.core.errors import InputError
from cnx_deploy.report.html.fields import Fields, Source, read_document

__all__ = ["BlockResult", "Layers", "Side", "read_layers"]

COMMAND = "cnx-deploy diagnose layers"
GRAVITY = ("ok", "jumps", "not lined up", "other order", "fails", "not finite")
"""Verdicts of a module, the gravest last."""


@dataclass(frozen=True, slots=True)
class BlockResult:
    """A block's gravest verdict and its largest relative L2; None where it is not finite or was not computed."""

    block: str
    verdict: str
    relative_l2: float | None


@dataclass(frozen=True, slots=True)
class Side:
    """Who ran; `limit` is the relative L2 above which a module fails. `not_run` says why where it did not."""

    name: str
    limit: float
    not_run: str
    modules: int
    within: int
    blocks: tuple[BlockResult, ...]

    def of_block(self, name: str) -> BlockResult | None:
        """The result of a block."""
        return next((block for block in self.blocks if block.block == name), None)


@dataclass(frozen=True, slots=True)
class Layers:
    """One file by layer. `first` says in words where the first side diverges, "" where none does."""

    source: Source
    artifact: str
    images: int
    passed: bool
    first: str
    missing: tuple[tuple[str, str], ...]
    sides: tuple[Side, ...]

    @property
    def ran(self) -> tuple[Side, ...]:
        """The sides that ran."""
        return tuple(side for side in self.sides if side.blocks)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks in order of depth."""
        return tuple(dict.fromkeys(block.block for side in self.ran for block in side.blocks))


def read_layers(path: Path) -> tuple[Layers, ...]:
    """Read a document of one or more files; InputError for anything else."""
    source, fields = read_document(path, COMMAND)
    try:
        return tuple(_layers(source, entry) for entry in fields.children("layers"))
    except ValueError as error:
        message = f"{path} is no comparison by layer: {error}. Give what `{COMMAND} --json` printed."
        raise InputError(message) from error


def _layers(source: Source, fields: Fields) -> Layers:
    first = fields.maybe_child("first_divergence")
    where = f"{first.text('module')} on {first.text('backend')}: {first.text('verdict')}" if first else ""
    return Layers(
        source=source,
        artifact=fields.text("artifact"),
        images=fields.integer("images"),
        passed=fields.flag("passed"),
        first=where,
        missing=fields.text_items("missing"),
        sides=tuple(map(_side, fields.children("backends"))),
    )


def _side(fields: Fields) -> Side:
    taps = fields.children("outputs")
    blocks = dict.fromkeys(tap.text("block") for tap in taps)
    verdicts = [tap.text("verdict") for tap in taps]
    return Side(
        name=fields.text("backend"),
        limit=fields.number("relative_l2_max"),
        not_run=fields.text("not_run") if fields.has("not_run") else "",
        modules=len(taps),
        within=sum(verdict in ("ok", "jumps") for verdict in verdicts),
        blocks=tuple(_block(name, [tap for tap in taps if tap.text("block") == name]) for name in blocks),
    )


def _block(name: str, taps: list[Fields]) -> BlockResult:
    verdicts = [tap.text("verdict") for tap in taps]
    unknown = [verdict for verdict in verdicts if verdict not in GRAVITY]
    if unknown:
        raise ValueError(f"a verdict is {unknown[0]!r}, expected one of {', '.join(GRAVITY)}")
    figures = [found.maybe_number("relative_l2") for tap in taps if (found := tap.maybe_child("figures"))]
    known = [figure for figure in figures if figure is not None]
    largest = max(known) if known and len(known) == len(figures) else None
    return BlockResult(name, max(verdicts, key=GRAVITY.index), largest)
