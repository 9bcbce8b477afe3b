"""`cnx-deploy sbom`."""

import datetime
from pathlib import Path

import click

from cnx_deploy.cli import options

END_OF_TIME = 253_402_300_799
"""Seconds since 1970: the last one of the year 9999."""


@click.command()
@click.option("--output", type=click.Path(path_type=Path), help="Write a file [default: to stdout].")
@click.option(
    "--epoch", type=click.IntRange(0, END_OF_TIME), envvar="SOURCE_DATE_EPOCH", show_envvar=True,
    help="The time that it bears, in seconds since 1970: the same bytes again [default: now].",
)  # fmt: skip
@options.force
@options.as_json
def sbom(output: Path | None, epoch: int | None, force: bool, as_json: bool) -> None:
    """Write a software bill of materials of this installation: CycloneDX 1.6 in JSON (extra sbom).

    It has cnx-deploy and every package that it uses, those of installed extras as optional, with versions, licences
    and who needs whom. It reads installed metadata and imports none of the packages.
    """
    from cnx_deploy.installed import find_installation
    from cnx_deploy.requirements import check_requirements
    from cnx_deploy.sbom import bill_of_materials, check_sbom

    check_requirements(["packaging", "filelock"] if output else ["packaging"])
    check_sbom(output, force=force)
    installation = find_installation()
    created = None if epoch is None else datetime.datetime.fromtimestamp(epoch, datetime.UTC)
    document = bill_of_materials(installation, created)
    for each in installation.absent:
        options.note(f"Note: left out, because it is not installed: {each}.")
    if output is None:
        click.echo(document, nl=False)
        return
    from cnx_deploy.whole_files import write_text

    write_text(output, document)
    if as_json:
        count = len(installation.packages)
        options.echo_json({"output": str(output), "packages": count, "absent": list(installation.absent)})
    else:
        options.echo(output)
