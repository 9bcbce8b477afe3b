"""Have an actor die when a test asks for it: Python imports this by its name where its folder is on the path.

The file that CNX_TEST_KILL names says "before" or "after": the first process that comes to a rename of a file of rows
takes the order and is killed just before it, when the file's data are written, or just after it, before anybody knows.
"""

import os
import signal
import sys
from pathlib import Path


def _hook():
    order, armed = Path(os.environ.get("CNX_TEST_KILL", "")), []

    def watch(name, words):
        if armed:  # the first event after the rename
            os.kill(os.getpid(), signal.SIGKILL)
        if name != "os.rename" or "/rows/part-" not in str(words[1]):
            return
        try:
            when = order.read_text(encoding="utf-8")
            order.unlink()  # whoever removes it has it
        except OSError:
            return
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        armed.append(True)

    if "CNX_TEST_KILL" in os.environ:
        sys.addaudithook(watch)


_hook()
