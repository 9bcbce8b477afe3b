"""Which artifacts hold one network, and what was made from what: weights, ONNX file, engine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.manifest import WeightsRecord
from cnx_deploy.core.variants import find_variant
from cnx_deploy.report.html.manifests import Entry, Records

__all__ = ["Link", "Network", "ToolSet", "networks_of", "tool_sets"]

KINDS = ("checkpoint", "onnx", "engine")
PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, slots=True)
class Link:
    """An artifact in its chain: what was made from it, and in words what is wrong with where it comes from."""

    entry: Entry
    tools: str
    made: tuple["Link", ...] = ()
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Network:
    """One network and everything recorded of it. Counts are None for a variant that is none of the table's."""

    variant: str
    image_size: int
    num_classes: int
    weights: WeightsRecord
    head_is_new: bool
    parameters: int | None
    macs: int | None
    chain: tuple[Link, ...]
    entries: tuple[Entry, ...]

    @property
    def is_random(self) -> bool:
        """Whether the weights were drawn and mean nothing."""
        return self.weights.origin == "random"

    @property
    def weights_words(self) -> str:
        """Where the weights are from: "random, seed 0"."""
        label = {"random": "random, seed", "pretrained": "published,"}.get(self.weights.origin, self.weights.origin)
        return f"{label} {self.weights.reference}"

    def of_kind(self, kind: str) -> tuple[Entry, ...]:
        """The entries of one kind."""
        return tuple(entry for entry in self.entries if entry.kind == kind)


@dataclass(frozen=True, slots=True)
class ToolSet:
    """Versions that artifacts were made with, under a letter."""

    name: str
    tools: tuple[tuple[str, str], ...]
    artifacts: int


def tool_sets(records: Records) -> tuple[ToolSet, ...]:
    """The different sets of versions, in order of appearance; "A", "B", … "AA"."""
    counts: dict[tuple[tuple[str, str], ...], int] = {}
    for entry in records.entries:
        counts[entry.tools] = counts.get(entry.tools, 0) + 1
    return tuple(ToolSet(_letters(at), tools, count) for at, (tools, count) in enumerate(counts.items()))


def networks_of(records: Records, sets: Sequence[ToolSet]) -> tuple[Network, ...]:
    """The networks, the smallest first; those of unknown size last."""
    groups: dict[tuple[str, int, int, str], list[Entry]] = {}
    for entry in records.entries:
        key = (entry.variant, entry.image_size, entry.num_classes, entry.weights.sha256)
        groups.setdefault(key, []).append(entry)
    letters = {each.tools: each.name for each in sets}
    found = [_network(sorted(group, key=_rank), letters) for group in groups.values()]
    return tuple(sorted(found, key=lambda each: (each.macs is None, each.macs or 0, each.variant, each.image_size)))


def _rank(entry: Entry) -> tuple[int, int, str]:
    """By kind as they are made, then the precise ones first."""
    precision = PRECISIONS.index(entry.precision) if entry.precision in PRECISIONS else len(PRECISIONS)
    return KINDS.index(entry.kind), precision, entry.stem


def _network(entries: list[Entry], letters: dict[tuple[tuple[str, str], ...], str]) -> Network:
    first = entries[0]
    parameters, macs = _counts(first)
    return Network(
        variant=first.variant,
        image_size=first.image_size,
        num_classes=first.num_classes,
        weights=first.weights,
        head_is_new=first.head_is_new,
        parameters=parameters,
        macs=macs,
        chain=tuple(_chain(entries, letters)),
        entries=tuple(entries),
    )


def _counts(entry: Entry) -> tuple[int | None, int | None]:
    """Parameters and MACs of an image, as a benchmark counts them."""
    try:
        variant = find_variant(entry.variant)
        parameters = variant.parameter_count + (entry.num_classes - 1000) * (variant.dims[-1] + 1)
        return parameters, variant.mac_count(entry.image_size, entry.num_classes)
    except InputError:  # a size that this version does not know
        return None, None


def _chain(entries: list[Entry], letters: dict[tuple[tuple[str, str], ...], str]) -> Iterator[Link]:
    """What was made from the weights, with its engines below it; then engines whose ONNX file is not recorded."""
    engines = [entry for entry in entries if entry.kind == "engine"]
    others = [entry for entry in entries if entry.kind != "engine"]
    placed: set[str] = set()
    for entry in others:
        made = [engine for engine in engines if engine.source_sha256 == entry.sha256]
        placed.update(engine.sha256 for engine in made)
        remark = "" if entry.source_sha256 == entry.weights.sha256 else "its source is not the weights it names"
        links = tuple(Link(engine, letters[engine.tools]) for engine in made)
        yield Link(entry, letters[entry.tools], links, remark if entry.kind == "onnx" else "")
    for engine in engines:
        if engine.sha256 not in placed:
            yield Link(engine, letters[engine.tools], remark=_lost(engine, others))


def _lost(engine: Entry, others: list[Entry]) -> str:
    """Why an engine has no place below an ONNX file."""
    wanted = f"{engine.source_name} ({engine.source_sha256[:12]})"
    same = next((entry for entry in others if entry.file == engine.source_name), None)
    if same is None:
        return f"its source {wanted} is not recorded here"
    return f"its source {wanted} was replaced since: the file of that name is {same.sha256[:12]}"


def _letters(index: int) -> str:
    """0 -> "A", 25 -> "Z", 26 -> "AA"."""
    above, at = divmod(index, 26)
    return (_letters(above - 1) if above else "") + chr(ord("A") + at)
