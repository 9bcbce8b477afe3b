"""What code does to a process when it goes wrong; run in a child."""

import ctypes
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from cnx_deploy.core.errors import InputError


def segfault() -> None:
    ctypes.string_at(0)


def abort() -> None:
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
    os.abort()


def signal_itself() -> None:
    os.kill(os.getpid(), 40)
    time.sleep(10)


def leave() -> None:
    sys.stdout.write("noise\n")
    os._exit(7)


def stumble() -> None:
    raise ZeroDivisionError("division by zero")


def hang() -> None:
    time.sleep(600)


def eat_memory() -> None:
    kept = []
    while True:
        kept.append(bytearray(50_000_000))
        time.sleep(0.01)


def babble() -> None:
    while True:
        os.write(2, b"x" * (1 << 20))


def refuse() -> None:
    raise InputError("The file is no image; a picture was expected.")


def find_no_room() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def find_no_memory() -> None:
    raise MemoryError


def add(first: int, second: int) -> int:
    sys.stdout.write('{"result": 0}\n')  # what a library prints is no answer
    time.sleep(0.1)
    return first + second


def forge(text: str) -> None:
    """Answer in the place of `child_process.main`, as code that took the process over could."""
    log = Path("/proc/self/fd/1").readlink()
    (log.parent / "answer.json").write_bytes(text.encode("latin-1"))
    os._exit(0)


def tell_pid(path: str) -> None:
    Path(path).write_text(str(os.getpid()), encoding="ascii")
    signal.pause()


def leave_a_grandchild(path: str) -> None:
    started = subprocess.Popen(["sleep", "600"])
    Path(path).write_text(str(started.pid), encoding="ascii")


def leave_a_grandchild_and_hang(path: str) -> None:
    leave_a_grandchild(path)
    time.sleep(600)


def answers_to_flips(engine: str, count: int) -> list[list[str]]:
    """For a child: the validity API's answer and the deserialiser's first error, for the engine whole and flipped."""
    from cnx_deploy.exporters.trt.backend import load_backend

    backend, content = load_backend("tensorrt-rtx"), Path(engine).read_bytes()
    log = backend.recording_logger()
    runtime = backend.trt.Runtime(log)
    draw, found = random.Random(0), []
    for index in range(count + 1):
        damaged = bytearray(content)
        if index:
            damaged[draw.randrange(1000, len(content))] ^= 1 << draw.randrange(8)
        validity = str(runtime.get_engine_validity(bytes(damaged)))
        log.messages.clear()
        assert runtime.deserialize_cuda_engine(bytes(damaged)) is None
        found.append([validity, next(text for severity, text in log.messages if severity == "ERROR")])
    return found
