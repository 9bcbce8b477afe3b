"""`cnx-deploy` in a process that knows the smallest network: `python -m tests.support.batch_command batch …`.

With CNX_TEST_KILL_DRIVER it kills itself once it has heard of so many parts from Ray.
"""

import os
import signal
from collections.abc import Iterator
from typing import Any

import tests.conftest  # noqa: F401 - registers it
from cnx_deploy.cli import main


def kill_at(parts: int) -> None:
    from cnx_deploy.serving import batch_ray

    undisturbed = batch_ray.run_on_ray

    def until_killed(*words: Any) -> Iterator[Any]:
        for done, result in enumerate(undisturbed(*words), start=1):
            if done == parts:
                os.kill(os.getpid(), signal.SIGKILL)
            yield result

    batch_ray.run_on_ray = until_killed


if __name__ == "__main__":
    if parts := os.environ.get("CNX_TEST_KILL_DRIVER"):
        kill_at(int(parts))
    main()
