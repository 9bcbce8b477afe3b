"""Images for batches in every kind of source, and the rows of an output."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def jpegs(count: int, size: tuple[int, int] = (60, 45)) -> list[bytes]:
    """Small pictures with edges and gradients, each another, as bytes of JPEG files."""
    random, contents = np.random.default_rng(0), []
    rows, columns = np.mgrid[: size[1], : size[0]]
    for _ in range(count):
        colour, slope = random.integers(0, 256, 3), random.uniform(-4, 4, 2)
        plane = (rows * slope[0] + columns * slope[1])[..., None] + colour
        plane[random.integers(40) :, random.integers(50) :] += random.integers(0, 256, 3)
        stream = io.BytesIO()
        Image.fromarray(plane.astype(np.int64).astype(np.uint8)).save(stream, "JPEG", quality=90)
        contents.append(stream.getvalue())
    return contents


def with_broken(contents: list[bytes], *places: int) -> list[bytes]:
    """The same with some files cut in half."""
    return [content[: len(content) // 2] if at in places else content for at, content in enumerate(contents)]


def write_folder(folder: Path, contents: list[bytes]) -> Path:
    folder.mkdir(parents=True)
    for at, content in enumerate(contents):
        (folder / f"{at:04}.jpg").write_bytes(content)
    return folder


def write_csv(path: Path, folder: Path) -> Path:
    names = sorted(file.name for file in folder.iterdir())
    rows = "\n".join(f"{folder.name}/{name},{at}" for at, name in enumerate(names))
    path.write_text(f"image_path,key\n{rows}\n", encoding="utf-8")
    return path


def write_parquet(path: Path, contents: list[bytes], *, as_struct: bool = False, group: int = 5) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values: list[Any] = [{"bytes": content, "path": None} for content in contents] if as_struct else list(contents)
    keys = [f"key-{at}" for at in range(len(contents))]
    pq.write_table(pa.table({"image": values, "key": keys}), path, row_group_size=group)
    return path


def write_tar(path: Path, contents: list[bytes], first: int = 0) -> Path:
    with tarfile.open(path, "w") as archive:
        for at, content in enumerate(contents, first):
            for name, data in ((f"{at:04}.jpg", content), (f"{at:04}.cls", b"3")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def rows_of(out: Path) -> list[dict[str, Any]]:
    """All rows by index."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(out / "rows").sort_by("index").to_pylist()
    return rows


def check_exactly_once(out: Path, expected: list[dict[str, Any]]) -> None:
    """Every row is there once, and is to the bit that of an undisturbed run."""
    rows = rows_of(out)
    assert [row["index"] for row in rows] == list(range(len(expected)))
    assert rows == expected
