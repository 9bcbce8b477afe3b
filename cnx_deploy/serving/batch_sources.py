"""Where the images of a batch come from: folders, patterns, CSV tables, Parquet files and WebDataset tars, in parts.

A source is listed once, before the work, in an order that its words determine. It is cut into parts, and each part
becomes one file of the output. Every image has an index, its place in the listing, so that an image that is there twice
has two rows. The listing's hash tells later whether the same words still mean the same images.
"""

import glob
import hashlib
import itertools
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.strict_json import shortened
from cnx_deploy.core.system import cpu_count
from cnx_deploy.data import SUFFIXES, ImageSource, picture_of
from cnx_deploy.data.bands import Picture
from cnx_deploy.data.csv_dataset import path_rows
from cnx_deploy.data.dataset import LeftOut, images_below, notes_of
from cnx_deploy.data.image_files import Observations
from cnx_deploy.data.preprocessing import cropped

__all__ = ["BatchSource", "Part", "PartImages", "find_source", "pyarrow"]

SMALLEST_PART, LARGEST_PART, PARTS = 16, 1024, 256
"""Images in a part where nobody says: so many that there are 256 parts, between these two."""
KINDS = {".tar": "tar", ".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "csv"}
"""Suffix -> the kind of a source; any other file is an image."""
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
WORDS = {
    "image": "image files",
    "csv": "tables of image paths",
    "parquet": "Parquet files of image bytes",
    "tar": "WebDataset tars",
}


@dataclass(frozen=True, slots=True)
class Part:
    """The images of one file of the output: some files, or those from `start` of one Parquet file or tar.

    `first`: the index of its first image in the source. `paths`: of files alone; relative ones begin at `place`.
    `ids`: where they are not the paths. `place`: a folder, or the Parquet file or tar.
    """

    number: int
    first: int
    count: int
    kind: str
    place: str
    start: int = 0
    paths: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    column: str | None = None
    id_column: str | None = None

    @property
    def file_name(self) -> str:
        """The name of its file: the same part has the same name in every run."""
        return f"part-{self.number:06}.parquet"


@dataclass(frozen=True, slots=True)
class BatchSource:
    """All images, in parts. `sha256` is over the listing: paths, or the names, sizes and counts of containers."""

    kind: str
    description: str
    count: int
    sha256: str
    parts: tuple[Part, ...] = field(repr=False)
    part_size: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.count:,} images of {self.description}"


class PartImages(ImageSource):
    """The images of a part, each under its id: a path, the bytes of a file, or the reason why there is none.

    `threads`: how many decode them.
    """

    description = "the images of a part"
    is_thread_safe = True

    def __init__(self, rows: Iterable[tuple[str, Path | bytes | InputError]], threads: int) -> None:
        self.rows, self.threads, self.seen = list(rows), threads, Observations()

    @classmethod
    def of(cls, part: Part, threads: int) -> Self:
        """Read a part; files of a folder are read when they are decoded."""
        return cls({"image": _files_of, "parquet": _parquet_rows, "tar": _tar_rows}[part.kind](part), threads)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def workers(self) -> int:
        """Threads that decode."""
        return self.threads

    def name(self, index: int) -> str:
        """The image's id."""
        return self.rows[index][0]

    def picture(self, index: int, preprocessing: Preprocessing) -> Picture:
        """Decode one image."""
        name, given = self.rows[index]
        if isinstance(given, InputError):
            raise given
        picture = picture_of(given, preprocessing.white_level, preprocessing.in_chans)
        self.seen.add(name, picture.info)
        return picture

    def pixels(self, index: int, preprocessing: Preprocessing) -> Tensor:
        """Decode one image, and resize and crop it."""
        return cropped(self.picture(index, preprocessing), preprocessing)

    def observed(self) -> tuple[str, ...]:
        """Files of several frames, and deep images that are nearly black or clipped."""
        return self.seen.notes()


def find_source(
    words: Sequence[str | Path], *, part_size: int | None = None, batch_size: int = 8, column: str | None = None,
    id_column: str | None = None, image_folder: Path | None = None,
) -> BatchSource:  # fmt: skip
    """List the images of folders, files and patterns such as `shards/*.tar`, all of one kind.

    Args:
        words: folders, whose images are taken, else their tars or Parquet files; image files; CSV tables with a column
            of paths; Parquet files with a column of image bytes; uncompressed tars. A word with *, ? or [ that is no
            file is a pattern.
        part_size: images in a file of the output; None takes 256 files, of 16 to 1,024 images each.
        batch_size: a part has a multiple of it where nobody gives a size.
        column: of paths in a table, or of bytes in a Parquet file; None takes the only one that can be.
        id_column: of a table or a Parquet file, what rows are called in place of the path or the row's number.
        image_folder: where a table's relative paths begin; None is the table's own folder.

    Raises:
        InputError: there is nothing, or files of several kinds, or a file cannot be listed.
    """
    notes: list[str] = []
    listed = list(itertools.chain.from_iterable(_listed(Path(word), notes) for word in words))
    kinds: dict[str, str] = {}
    for name, kind in listed:
        kinds.setdefault(kind, name)
    if len(kinds) > 1:
        named = " and ".join(f"{WORDS[kind]} ({name})" for kind, name in kinds.items())
        raise InputError(f"IMAGES are of several kinds: {named}. Give those of one kind to each run.")
    (kind,) = kinds
    _check_options(kind, column=column, id_column=id_column, image_folder=image_folder)
    names = [name for name, _ in listed]
    shown = shortened(", ".join(map(str, words)))
    hashed, found = hashlib.sha256(kind.encode()), list[Part]()
    if kind in ("image", "csv"):
        paths, ids, folder = _paths_of(names, kind, column, id_column, image_folder)
        for name in itertools.chain(paths, ids):
            hashed.update(f"\n{name}".encode("utf-8", "surrogateescape"))
        size, count = part_size or usual_size(len(paths), batch_size), len(paths)
        for number, first in enumerate(range(0, count, size)):
            some, called = tuple(paths[first : first + size]), tuple(ids[first : first + size])
            found.append(Part(number, first, len(some), "image", folder, 0, some, called))
    else:
        count_of: Callable[[str], tuple[int, str | None]]
        count_of = _tar_count if kind == "tar" else lambda name: _parquet_count(name, column, id_column)
        with ThreadPoolExecutor(cpu_count()) as pool:
            counted = list(pool.map(count_of, names))
        for name, (rows, read) in zip(names, counted, strict=True):
            hashed.update(f"\n{name} {Path(name).stat().st_size} {rows} {read} {id_column}".encode(errors="replace"))
        count = sum(rows for rows, _ in counted)
        size = part_size or usual_size(count, batch_size)
        first = 0
        for name, (rows, read) in zip(names, counted, strict=True):
            place = os.path.abspath(name)  # noqa: PTH100 - links are kept as they are
            for start in range(0, rows, size):
                taken = min(size, rows - start)
                # Rows are called after the file as it was given.
                found.append(Part(len(found), first, taken, kind, place, start, (), (name,), read, id_column))
                first += taken
    if not count:
        raise InputError(f"{shown} has no images: expected at least one. Check the path.")
    return BatchSource(kind, shown, count, hashed.hexdigest(), tuple(found), size, tuple(notes))


def usual_size(count: int, batch_size: int) -> int:
    """Images in a part where nobody says: a multiple of the batch size."""
    wanted = min(LARGEST_PART, max(SMALLEST_PART, math.ceil(count / PARTS)))
    return math.ceil(wanted / batch_size) * batch_size


def pyarrow() -> Any:
    """The module `pyarrow`, with `pyarrow.parquet`. Raises MissingRequirementError, which names the extra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingRequirementError(
            "pyarrow is not installed, and batch writes Parquet files. Install it with pip install "
            "'cnx-deploy[parquet]'."
        ) from error
    return pyarrow


# --- what the words mean ----------------------------------------------------------------------------------------------


def _listed(word: Path, notes: list[str]) -> Iterator[tuple[str, str]]:
    """The files that a word means, each with its kind."""
    if word.is_dir():
        yield from _below(word, notes)
    elif word.is_file():
        yield str(word), _kind_of(str(word))
    elif glob.has_magic(str(word)):
        names = [name for name in sorted(glob.glob(str(word), recursive=True)) if Path(name).is_file()]  # noqa: PTH207
        if not names:
            raise InputError(f"No file matches the pattern {word}. Check it, and the folder that it begins in.")
        for name in names:
            yield name, _kind_of(name)
    else:
        raise InputError(
            f"{word} is not there: expected a folder, a pattern such as 'shards/*.tar', or a file. Check the path."
        )


def _below(folder: Path, notes: list[str]) -> Iterator[tuple[str, str]]:
    """The images of a folder; of one without any its tars, or its Parquet files."""
    left_out = LeftOut(str(folder))
    images = sorted(images_below(folder, left_out))
    if images:
        notes += notes_of([left_out], folder)
        yield from ((str(path), "image") for path in images)
        return
    for kind, suffixes in (("tar", (".tar",)), ("parquet", (".parquet", ".pq"))):
        inside = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
        if held := sorted(str(path) for path in inside if not path.name.startswith(".")):
            yield from ((name, kind) for name in held)
            return
    said = notes_of([left_out], folder)
    raise InputError(f"{folder} holds no images, tars or Parquet files. {' '.join(said)}".rstrip())


def _kind_of(name: str) -> str:
    if name.lower().endswith(PACKED):
        raise InputError(
            f"{name} is a compressed archive, in which no image can be found by its place. Unpack it to .tar."
        )
    return KINDS.get(Path(name).suffix.lower(), "image")


def _check_options(kind: str, **given: Any) -> None:
    allowed = {"csv": ("column", "id_column", "image_folder"), "parquet": ("column", "id_column")}.get(kind, ())
    if wrong := [name for name, value in given.items() if value is not None and name not in allowed]:
        flags = " and ".join(f"--{name.replace('_', '-')} ({name})" for name in wrong)
        raise InputError(f"IMAGES are {WORDS[kind]}, of which {flags} says nothing. Leave it out.")


# --- files and tables -------------------------------------------------------------------------------------------------


def _paths_of(
    names: list[str], kind: str, column: str | None, id_column: str | None, image_folder: Path | None
) -> tuple[list[str], list[str], str]:  # fmt: skip
    """The paths, the ids where they differ, and the folder in which relative paths begin."""
    if kind == "image":
        return names, [], os.getcwd()  # noqa: PTH109 - as the shell names it
    paths, ids = list[str](), list[str]()
    for name in names:
        folder = os.path.abspath(image_folder or Path(name).parent)  # noqa: PTH100
        for path, row_id in path_rows(Path(name), column, id_column):
            paths.append(os.path.join(folder, path))  # noqa: PTH118 - an absolute path stays
            ids.append(path if row_id is None else row_id)
    return paths, ids, "/"


def _files_of(part: Part) -> Iterator[tuple[str, Any]]:
    for name, path in zip(part.ids or part.paths, part.paths, strict=True):
        yield name, Path(part.place) / path


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _opened(name: str) -> Any:
    arrow = pyarrow()
    try:
        return arrow.parquet.ParquetFile(name)
    except (arrow.ArrowException, OSError) as error:
        raise InputError(
            f"{name} cannot be read as a Parquet file ({str(error).splitlines()[0]}). Replace it."
        ) from error


def _parquet_count(name: str, column: str | None, id_column: str | None) -> tuple[int, str | None]:
    """Rows, and the column of image bytes as pyarrow is asked for it."""
    arrow = pyarrow()
    with _opened(name) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows

    def holds_bytes(kind: Any) -> bool:
        return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))

    found = [field.name for field in schema if holds_bytes(field.type)]
    # As Hugging Face's datasets write images: bytes and path.
    found += [
        f"{field.name}.bytes" for field in schema if arrow.types.is_struct(field.type)
        for inner in field.type if inner.name == "bytes" and holds_bytes(inner.type)
    ]  # fmt: skip
    if column is not None:
        found = [each for each in found if column in (each, each.removesuffix(".bytes"))]
    if len(found) != 1:
        held = ", ".join(f"{field.name} ({field.type})" for field in schema)
        asked = f"no column {column} of image bytes" if column else f"{len(found) or 'no'} columns of bytes"
        raise InputError(f"{name} has {asked}; its columns are {shortened(held)}. Name one with --column (column).")
    if id_column is not None and id_column not in schema.names:
        raise InputError(f"{name} has no column {id_column}: it has {', '.join(schema.names)}. Correct --id-column.")
    return rows, found[0]


def _parquet_rows(part: Part) -> Iterator[tuple[str, Any]]:
    """The rows of a part; of the row groups before them nothing is read."""
    arrow, (shown,), column = pyarrow(), part.ids, str(part.column)
    asked = [column, *([part.id_column] if part.id_column else [])]
    with _opened(part.place) as file:
        is_struct = column not in file.schema_arrow.names
        column = column.removesuffix(".bytes") if is_struct else column
        groups, start, first = list[int](), part.start, 0
        for group in range(file.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            if first < part.start + part.count and last > part.start:
                start = part.start - first if not groups else start
                groups.append(group)
            first = last
        try:
            batches = file.iter_batches(batch_size=64, row_groups=groups, columns=asked)
            rows = (row for batch in batches for row in _plain_rows(batch, column, part.id_column))
            for at, (content, name) in enumerate(itertools.islice(rows, start, start + part.count), part.start):
                name = f"{shown}#{at}" if part.id_column is None else str(name)
                content = content["bytes"] if is_struct and content is not None else content
                yield name, content or InputError(f"Row {at} of {shown} holds no bytes. Replace or remove it.")
        except (arrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{part.place} cannot be read to its end ({reason}). Replace it.") from error


def _plain_rows(batch: Any, column: str, id_column: str | None) -> Iterable[tuple[Any, Any]]:
    ids = batch.column(id_column).to_pylist() if id_column is not None else [None] * len(batch)
    return zip(batch.column(column).to_pylist(), ids, strict=True)


# --- tars -------------------------------------------------------------------------------------------------------------


def _members(name: str) -> Iterator[tuple[str, tarfile.TarInfo | None, Any]]:
    """The images of a tar: the name within it, its place, and the open file; at an end that is cut off one without."""
    try:
        archive: Any = tarfile.open(name, "r:")  # noqa: SIM115 - closed below
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{name} cannot be read as a tar archive ({error}). Replace it.") from error
    with archive:
        is_cut, member = False, None
        while True:
            try:
                if (member := archive.next()) is None:
                    break
            except tarfile.ReadError:  # the last member's data end early
                is_cut = True
                break
            archive.members.clear()  # it remembers all
            if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                yield member.name, member, archive.fileobj
        # A header that is cut, or is none, ends the listing like the mark of zeros at the end of a whole archive.
        archive.fileobj.seek(archive.offset)
        if is_cut or archive.fileobj.read(512) != bytes(512):
            yield "", None, archive.fileobj


def _tar_count(name: str) -> tuple[int, str | None]:
    return sum(1 for _ in _members(name)), None


def _tar_rows(part: Part) -> Iterator[tuple[str, Any]]:
    (shown,) = part.ids
    for name, member, stream in itertools.islice(_members(part.place), part.start, part.start + part.count):
        if member is None:
            yield shown, InputError(f"{shown} is cut off: images after its last one may be missing. Copy it again.")
            continue
        stream.seek(member.offset_data)
        content = stream.read(member.size)
        if len(content) == member.size:
            yield f"{shown}/{name}", content
            continue
        there = f"{len(content):,} of {member.size:,} bytes are there"
        yield f"{shown}/{name}", InputError(f"{name} is cut off in {shown}: {there}. Copy the archive again.")
