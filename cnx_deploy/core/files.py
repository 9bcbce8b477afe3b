"""Files written whole or not at all: every file that this package writes for others to read goes through here.

A file is written into the folder `.<name>.tmp` beside its target, flushed to the disk and renamed, and then the folder
that holds its new name is flushed. So a name holds the old bytes or all of the new ones, whenever a process is killed
or the power fails, and a reader that has the old file open or mapped keeps its bytes. A target that is a symbolic link,
or one of several hard links, is replaced: what it pointed to and the other names stay as they were.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from filelock import FileLock

from cnx_deploy.core.errors import DiskFullError, InputError, OutputExistsError

__all__ = [
    "WRITER", "check_file", "flush", "hidden_path", "is_written_here", "kind_of_weights", "make_folder",
    "open_regular", "place_errors", "room_errors", "sha256_of_file", "temporary_folder", "whole_file", "whole_folder",
    "write_text",
]  # fmt: skip

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""No block is left, the user's quota is used up, the file is larger than the system allows this process (ulimit -f)."""

OTHER_PLACE = "Choose another place."
WRITER = "# Written by cnx-deploy"
"""Begins the configuration by which a folder is known as one that a command wrote, and may replace."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. A pipe, a device or a folder is an InputError and is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is no regular file (a folder, pipe or device), so it cannot be read.")
    return os.fdopen(descriptor, "rb")


def kind_of_weights(head: bytes, size: int) -> Literal["safetensors", "pickle"] | None:
    """The kind of a file of weights from its first 16 bytes and its size; None where it is none."""
    # No instruction of pickle is zero; safetensors with a header of 640 bytes begins with 80 02 00.
    if head[:4] == b"PK\x03\x04" or (head[:2] in (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5") and head[2:3] != b"\0"):
        return "pickle"
    return "safetensors" if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8 else None


@contextlib.contextmanager
def whole_file(path: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Give a path to write to; when the block ends without an error, that file takes the place of `path`.

    Folders on the way are made. Another process that writes the same file is waited for.

    Args:
        path: The file to write or replace.
        needed_bytes: The file's size, where it is known.

    Raises:
        InputError: No file can be put at `path`; raised before the block.
        DiskFullError: Room is short, before or while the file is written.
    """
    path = Path(path)
    check_file(path)
    make_folder(path.parent)
    with temporary_folder(path, needed_bytes) as folder:
        yield folder / path.name
        flush(folder / path.name)
        with place_errors(path.parent):
            (folder / path.name).replace(path)
        flush(path.parent)


@contextlib.contextmanager
def whole_folder(
    path: Path, *, force: bool = False, is_own: Callable[[Path], bool] = lambda path: False, needed_bytes: int = 0
) -> Iterator[Path]:
    """Give an empty folder to fill; when the block ends without an error, it becomes `path`.

    Folders on the way are made. Another process that writes the same folder is waited for. A folder that is replaced
    goes between two renames: a process that is killed there leaves no folder, and never a part of one.

    Args:
        path: The folder to make. One that is there and empty is taken.
        force: Replace what is there.
        is_own: Whether the folder that is there was written by the same command; no other is replaced.
        needed_bytes: The size of what will be in it, as far as it is known.

    Raises:
        InputError: No folder can be put at `path`; raised before the block, as OutputExistsError where something is
            there.
        DiskFullError: Room is short, before or while files are written.
    """
    path = Path(path)
    make_folder(path.absolute().parent)
    with temporary_folder(path.absolute(), needed_bytes) as folder:
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            if not force:
                raise OutputExistsError(
                    f"{path} is there already. Choose another place, or replace it with --force (force)."
                )
            if path.is_symlink() or not path.is_dir() or not is_own(path):
                raise OutputExistsError(
                    f"{path} holds something else than this command writes, so it is not replaced. {OTHER_PLACE}"
                )
        new, old = folder / "new", folder / "old"
        new.mkdir()
        yield new
        for written in (*new.rglob("*"), new):
            flush(written)
        with place_errors(path.parent):
            if path.is_dir():
                path.replace(old)
            new.replace(path)
        flush(path.absolute().parent)


def is_written_here(path: Path) -> bool:
    """Whether a file begins with `WRITER`."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(WRITER)) == WRITER.encode()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, lines ended as they are; lone surrogates (names that are no UTF-8) as escapes."""
    content = text.encode("utf-8", "backslashreplace")
    with whole_file(path, needed_bytes=len(content)) as temporary:
        temporary.write_bytes(content)


def check_file(path: Path, advice: str = OTHER_PLACE) -> None:
    """Raise InputError, before the work, where no file can be written at `path`; nothing is left behind.

    The folder need not exist yet. A file without a name is made in the nearest one that does: rights do not tell of a
    read-only file system or an immutable folder.
    """
    if os.path.isdir(path):  # noqa: PTH112 - Path's own raises where a folder above may not be read
        raise InputError(f"{path} is a folder, where a file was expected. {advice}")
    whole = path.absolute()
    existing = next(folder for folder in whole.parents if os.path.lexists(folder))
    with place_errors(path.parent, advice):
        if existing.is_symlink() and not existing.exists():
            raise FileNotFoundError(errno.ENOENT, f"{existing.name} is a symbolic link to nothing")
        tempfile.TemporaryFile(dir=existing).close()
        longest = os.pathconf(existing, "PC_NAME_MAX")
    for name in whole.relative_to(existing).parts:
        if (size := len(os.fsencode(name))) > longest:
            raise InputError(f"{name} is a name of {size} bytes, where a name has at most {longest}. Shorten it.")


def make_folder(directory: Path, advice: str = OTHER_PLACE) -> None:
    """Make a folder and those above it. Raises InputError where that, or a file in it, cannot be made."""
    with place_errors(directory, advice):
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()


@contextlib.contextmanager
def temporary_folder(path: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Hold the lock of `path` and give an empty folder beside it, which is removed at the end with what is in it.

    The system frees the lock of a process that died, and what that left is removed. Raises InputError where the folder
    cannot be made, DiskFullError where fewer than `needed_bytes` are free or the disk becomes full.
    """
    lock, folder = FileLock(hidden_path(path, ".lock")), hidden_path(path, ".tmp")
    with place_errors(Path(lock.lock_file)):
        lock.acquire()
    try:
        _remove_folder(folder)
        free = _free_bytes(path.parent)
        if free is not None and free < needed_bytes:
            raise DiskFullError(
                f"{path} takes {_size(needed_bytes)}, and {_size(free)} are free in {path.parent}: expected room for "
                "it. Free some, or choose another place."
            )
        with place_errors(folder):
            folder.mkdir()
        with room_errors(path):
            yield folder
    finally:
        _remove_folder(folder)
        # The lock's file goes while it is held: a process that waits for it sees that what it opened has no name any
        # more and makes another (filelock does so from 3.24 on).
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def hidden_path(path: Path, suffix: str) -> Path:
    """`.<name><suffix>` beside `path`: its lock (".lock") or its temporary folder (".tmp").

    File names end at 255 bytes, on encrypted folders at 143, so the name is cut at 120. Names that begin alike share a
    lock, which costs them no more than to wait for each other.
    """
    return path.parent / f".{os.fsencode(path.name)[:120].decode('utf-8', 'ignore')}{suffix}"


@contextlib.contextmanager
def place_errors(directory: Path, advice: str = OTHER_PLACE) -> Iterator[None]:
    """Turn what the system says of a place into an InputError, and what it says of room into a DiskFullError."""
    try:
        with room_errors(directory):
            yield
    except OSError as error:
        raise InputError(f"Cannot write in {directory}: {error.strerror or error}. {advice}") from error


@contextlib.contextmanager
def room_errors(path: Path) -> Iterator[None]:
    """Turn what says that there was no room while `path` was written into a DiskFullError; other errors pass.

    numpy's `tofile` says how much it wrote in place of an error number.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL and (error.errno or not re.search(r"requested and \d+ written", str(error))):
            raise
        directory = path if path.is_dir() else path.parent
        free = _free_bytes(directory)
        shown = "" if free is None else f", {_size(free)} are free in {directory}"
        raise DiskFullError(
            f"No room to write {path} ({error.strerror or error}){shown}: what was there before is kept. "
            "Free some, or choose another place."
        ) from error


def flush(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remove_folder(folder: Path) -> None:
    """Remove a folder with what is in it, and leave a stranger's link or pipe: rmtree would wait for the pipe."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)


def _free_bytes(directory: Path) -> int | None:
    """What this user may still fill; None where the file system does not say."""
    with contextlib.suppress(OSError):
        report = os.statvfs(directory)
        return report.f_bavail * report.f_frsize if report.f_blocks else None
    return None


def _size(count: int) -> str:
    """Bytes as people read them: 1,234 bytes, 5.6 MB."""
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count:,} bytes"
