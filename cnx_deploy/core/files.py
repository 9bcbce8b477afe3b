"""Files written whole or not at all: every file that this package writes for others to read goes through here.

What is written goes to a temporary folder `.<name>.tmp-<process>` beside the target, is flushed to the disk and
renamed, and the folder with the new name is flushed too. So a name holds the old bytes or all of the new ones, whenever
a process is killed or the power fails, and a reader that has the old file open or mapped keeps its bytes. A target that
is a symbolic link, or one of several hard links, is replaced: what it pointed to and the other names stay as they were.
"""

import contextlib
import errno
import glob
import hashlib
import itertools
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from cnx_deploy.core.errors import DiskFullError, InputError

__all__ = [
    "check_file",
    "check_folder",
    "check_name",
    "flush",
    "hidden_name",
    "make_folder",
    "open_regular",
    "place_errors",
    "remove_folder",
    "require_room",
    "room_errors",
    "sha256_of_file",
    "whole_file",
    "write_bytes",
    "write_text",
]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""No block is left, the user's quota is used up, the file is larger than the system allows this process (ulimit -f)."""

LONGEST_HIDDEN = 120
"""Bytes of a target's name that its temporary name keeps: file names end at 255 bytes, on encrypted folders at 143."""

IN_USE = "in-use"
OTHER_PLACE = "Choose another place."


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. A pipe, a device or a folder is an InputError and is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is no regular file, so it cannot be read here. Name a file.")
    return os.fdopen(descriptor, "rb")


@contextlib.contextmanager
def whole_file(path: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """A path to write to; when the block ends without an error, that file takes the place of `path`.

    Folders on the way are made. `needed_bytes`: the file's size, where it is known. Raises InputError, before the
    block, where no file can be put; DiskFullError where room is short, before or while it is written.
    """
    path = Path(path)
    check_file(path)
    with place_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    require_room(path.parent, needed_bytes, str(path))
    with _temporary_folder(path) as folder, room_errors(path):
        temporary = folder / path.name
        yield temporary
        flush(temporary)
        with place_errors(path.parent):
            temporary.replace(path)
        flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, lines ended as they are; lone surrogates (names that are no UTF-8) as escapes."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file of these bytes."""
    with whole_file(path, needed_bytes=len(content)) as temporary:
        temporary.write_bytes(content)


def check_file(path: Path, advice: str = OTHER_PLACE) -> None:
    """Raise InputError, before the work, where no file can be written at `path`; nothing is left behind."""
    if os.path.isdir(path):  # noqa: PTH112 - Path's own raises where a folder above may not be read
        raise InputError(f"{path} is a folder, where a file was expected. {advice}")
    check_folder(path.parent, advice)
    check_name(path.parent, path.name, advice)


def check_folder(directory: Path, advice: str = OTHER_PLACE) -> None:
    """Raise InputError, before the work, where no file can be made in `directory`; it need not exist yet.

    A file without a name is made to find out: rights do not tell of a read-only file system or an immutable folder.
    """
    with place_errors(directory, advice):
        existing = _existing(directory)
        if existing.is_symlink() and not existing.exists():
            raise FileNotFoundError(errno.ENOENT, f"{existing.name} is a symbolic link to nothing")
        tempfile.TemporaryFile(dir=existing).close()
    for part in directory.absolute().relative_to(existing).parts:
        check_name(directory, part, advice)


def check_name(directory: Path, name: str, advice: str = "Give a shorter name.") -> None:
    """Raise InputError for a file of this name in `directory` whose name or whole path is too long to be written."""
    with place_errors(directory, advice):
        longest, size = os.pathconf(_existing(directory), "PC_NAME_MAX"), len(os.fsencode(name))
        with contextlib.suppress(FileNotFoundError):  # a path that is too long is told before whether it is there
            os.lstat(directory / f".{hidden_name(name)}.tmp-{os.getpid()}-0" / name[:longest])
    if size > longest:
        raise InputError(f"{name} is a name of {size} bytes, where a file's name has at most {longest}. {advice}")


def make_folder(directory: Path, advice: str = OTHER_PLACE) -> None:
    """Make a folder and those above it. Raises InputError where that, or a file in it, cannot be made."""
    with place_errors(directory, advice):
        directory.mkdir(parents=True, exist_ok=True)
    check_folder(directory, advice)


def require_room(directory: Path, needed_bytes: int, what: str) -> None:
    """Raise DiskFullError where fewer bytes are free in `directory`, which need not exist yet, than `what` takes."""
    free = _free_bytes(directory)
    if free is not None and free < needed_bytes:
        raise DiskFullError(
            f"{what} takes {_size(needed_bytes)}, and {_size(free)} are free in {directory}: expected room for it. "
            "Free some, or choose another place."
        )


@contextlib.contextmanager
def place_errors(directory: Path, advice: str = OTHER_PLACE) -> Iterator[None]:
    """Make what the system says of a place an InputError, and of its room a DiskFullError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise _full(directory, directory, error) from error
        raise InputError(f"Cannot write in {directory}: {error.strerror or error}. {advice}") from error


@contextlib.contextmanager
def room_errors(path: Path) -> Iterator[None]:
    """Make a DiskFullError of what says that there was no room while `path` was written; anything else passes.

    numpy's `tofile` says how much it wrote in place of an error number.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL or (error.errno is None and re.search(r"requested and \d+ written", str(error))):
            raise _full(path, path.parent, error) from error
        raise


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


def hidden_name(name: str) -> str:
    """`name` as temporary names carry it: itself, or where that is long its beginning and a hash."""
    raw = os.fsencode(name)
    if len(raw) <= LONGEST_HIDDEN:
        return name
    return f"{raw[: LONGEST_HIDDEN - 17].decode('utf-8', 'ignore')}-{hashlib.sha256(raw).hexdigest()[:16]}"


def remove_folder(folder: Path) -> None:
    """Remove a temporary folder, also when Ctrl-C comes a second time meanwhile."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A fresh folder beside `path`, locked while it is in use; those of dead processes are removed first."""
    begin = f".{hidden_name(path.name)}.tmp-"
    with place_errors(path.parent):
        _remove_abandoned(path.parent, begin)
        folder, lock = _claimed(path.parent, begin)
    try:
        yield folder
    finally:
        remove_folder(folder)
        lock.release()


def _claimed(directory: Path, begin: str) -> tuple[Path, FileLock]:
    """Make and lock a folder. A name may be taken: another container's process can have this one's number."""
    for number in itertools.count():
        folder = directory / (f"{begin}{os.getpid()}" + (f"-{number}" if number else ""))
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            lock = FileLock(folder / IN_USE)
            try:
                lock.acquire()
            except FileNotFoundError:  # another process took it for abandoned before it was locked
                continue
            except BaseException:
                remove_folder(folder)
                raise
            return folder, lock
    raise AssertionError("itertools.count ended")


def _remove_abandoned(directory: Path, begin: str) -> None:
    for folder in directory.glob(f"{glob.escape(begin)}*"):
        if folder.is_symlink():  # not ours: a lock would be made where it leads
            continue
        lock = FileLock(folder / IN_USE)
        with contextlib.suppress(Timeout, OSError):  # in use, or somebody else's
            lock.acquire(timeout=0)
            remove_folder(folder)
            lock.release()


def _existing(path: Path) -> Path:
    """The nearest folder, itself or above, that has a name on the disk."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if os.path.lexists(each))


def _free_bytes(directory: Path) -> int | None:
    """What this user may still fill; None where the file system does not say."""
    with place_errors(directory):
        found = os.statvfs(_existing(directory))
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def _full(what: Path, directory: Path, error: OSError) -> DiskFullError:
    free = _free_bytes(directory)
    shown = "" if free is None else f", {_size(free)} are free in {directory}"
    return DiskFullError(
        f"No room to write {what} ({error.strerror or error}){shown}: what was there before is kept. "
        "Free some, or choose another place."
    )


def _size(count: int) -> str:
    """As people read it: 1,234 bytes, 5.6 MB."""
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count:,} bytes"
