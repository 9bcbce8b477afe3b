"""`cnx-deploy serve`."""

import queue
import signal
from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options
from cnx_deploy.core.errors import CnxDeployError

CHECK_SECONDS = 10.0


@click.command()
@click.argument("artifact", type=options.PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; any other needs a token.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--token", envvar="CNX_DEPLOY_TOKEN", show_envvar=True,
    help="What requests have to bring as Authorization: Bearer TOKEN. Others see a command's words: use the variable.",
)  # fmt: skip
@click.option("--replicas", type=click.IntRange(min=1), default=1, show_default=True, help="Processes with the model.")
@click.option("--max-batch", type=click.IntRange(min=1), default=8, show_default=True, help="Images run at once.")
@click.option(
    "--max-wait-ms", type=click.FloatRange(min=0), default=5.0, show_default=True,
    help="How long the first image of a batch waits for others while the model is free.",
)  # fmt: skip
@click.option("--max-queue", type=click.IntRange(min=1), default=64, show_default=True, help="Images that may wait.")
@click.option(
    "--max-megabytes", type=click.FloatRange(min=0, min_open=True), default=32.0, show_default=True,
    help="Largest request, in millions of bytes.",
)  # fmt: skip
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True,
    help="Seconds in which a request has to be there.",
)  # fmt: skip
@options.opened_model
@options.checkpoint_answer
@options.outputs
@options.as_json
def serve(artifact: Path, as_json: bool, **words: Any) -> None:
    """Serve ARTIFACT, a checkpoint, an ONNX file or an engine, over HTTP: the Open Inference Protocol, uploads, a page.

    SIGTERM and Ctrl-C answer what is under way and end it; SIGHUP takes the file anew.
    """
    from cnx_deploy import api

    with api.serve(artifact, note=options.note, **words) as serving:
        signals = queue.SimpleQueue[int]()
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(each, lambda number, frame: signals.put(number))
        if as_json:
            options.echo_json({"url": serving.url, "model": serving.name, "version": serving.version})
        else:
            options.echo(f"Ready: {serving.url} ({serving.name}, version {serving.version})")
        while True:
            try:
                number: int = signals.get(timeout=CHECK_SECONDS)
            except queue.Empty:
                serving.check()
                continue
            if number != signal.SIGHUP:
                break
            try:
                options.note(f"Version {serving.reload()} answers.")
            except CnxDeployError as error:
                options.note(f"Error: {error}")
        options.note("Stopping: what is under way is answered.")
