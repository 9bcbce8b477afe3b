"""`cnx-deploy sign`."""

import sys
from pathlib import Path

import click

from cnx_deploy.cli import options
from cnx_deploy.errors import InputError


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--key", required=True, type=click.Path(path_type=Path), help="PEM file of a private EC key (P-256 to P-521)."
)
@click.option(
    "--key-password-file", type=click.Path(path_type=Path),
    help="File whose first line opens an encrypted key [default: asked for at a terminal].",
)  # fmt: skip
@options.force
@options.as_json
def sign(artifacts: tuple[Path, ...], key: Path, key_password_file: Path | None, force: bool, as_json: bool) -> None:
    """Sign ARTIFACTS: manifest and files of each, in a file .sig beside them; needs the extra signing, no network.

    Every hash is checked first. cnx-deploy verify --signed PUBLIC_KEY.pem checks the signatures.
    """
    from cnx_deploy.artifacts import open_artifact
    from cnx_deploy.signing import sign_artifact

    password = _password(key, key_password_file)
    opened = [open_artifact(path) for path in artifacts]
    signed = [(artifact, sign_artifact(artifact, key, password=password, force=force)) for artifact in opened]
    if as_json:
        entries = [
            {"artifact": str(artifact.path), "signature": str(path), "files": len(artifact.manifest.files) + 1}
            for artifact, path in signed
        ]
        options.echo_json({"signed": entries})
        return
    for artifact, path in signed:
        options.echo(f"{path} signs {artifact.path.name}: its manifest and {len(artifact.manifest.files)} files")


def _password(key: Path, file: Path | None) -> bytes | None:
    """From the file, or asked for where the key is encrypted and somebody is there to ask; never from the environment.

    Raises InputError where nobody is.
    """
    from cnx_deploy.signing import key_is_encrypted, password_from_file

    if file is not None:
        return password_from_file(file)
    if not key_is_encrypted(key):
        return None
    if not sys.stdin.isatty():
        raise InputError(f"{key} is encrypted, and no terminal is here to ask at: give --key-password-file.")
    return str(click.prompt(f"Password of {key}", hide_input=True, err=True)).encode()
