"""`cnx-deploy report`."""

from pathlib import Path

import click

from cnx_deploy.cli import options


@click.command()
@options.export_dir
@options.engines_dir
@click.option(
    "--readme", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the table's place [default: README.md here, if it has one].",
)  # fmt: skip
@click.option("--check", is_flag=True, help="Write nothing; exit code 3 when something is out of date.")
@options.as_json
def report(export_dir: Path, engines_dir: Path, readme: Path | None, check: bool, as_json: bool) -> None:
    """Write index.csv of both folders and the README's table from the manifests."""
    from cnx_deploy.report import BEGIN, check_records, write_records

    own = Path("README.md")
    if readme is None and own.is_file() and BEGIN in own.read_text(encoding="utf-8"):
        readme = own
    if check:
        check_records(export_dir, engines_dir, readme)
        changed: list[Path] = []
    else:
        changed = write_records(export_dir, engines_dir, readme)
    if as_json:
        options.echo_json({"changed": [str(path) for path in changed], "checked": check})
    elif check:
        click.echo("Records are up to date.")
    else:
        for path in changed:
            click.echo(path)
