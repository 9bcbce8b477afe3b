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
@click.option(
    "--html", type=click.Path(path_type=Path),
    help="Write one self-contained page instead (needs the extra report).",
)  # fmt: skip
@click.option("--bench", multiple=True, type=click.Path(path_type=Path), help="For --html: bench --json.")
@click.option(
    "--headroom",
    multiple=True,
    type=click.Path(path_type=Path),
    help="For --html: diagnose headroom --json.",
)
@click.option("--layers", multiple=True, type=click.Path(path_type=Path), help="For --html: diagnose layers --json.")
@options.force
@options.as_json
def report(
    export_dir: Path, engines_dir: Path, readme: Path | None, check: bool, html: Path | None,
    bench: tuple[Path, ...], headroom: tuple[Path, ...], layers: tuple[Path, ...], force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write index.csv of both folders and the README's table from the manifests; or a page with --html.

    With --html: exit code 4, after the page is written, when a manifest could not be read.
    """
    if html is not None:
        if check or readme is not None:
            raise click.UsageError("--html writes a page and nothing else: leave out --check and --readme.")
        _write_page(html, export_dir, engines_dir, (bench, headroom, layers), force=force, as_json=as_json)
        return
    if bench or headroom or layers or force:
        raise click.UsageError("--bench, --headroom, --layers and --force are of the page: add --html FILE.")
    from cnx_deploy.report.records import check_records, has_place, write_records

    own = Path("README.md")
    if readme is None and has_place(own):
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
            options.echo(path)


def _write_page(
    html: Path, export_dir: Path, engines_dir: Path, documents: tuple[tuple[Path, ...], ...], *, force: bool,
    as_json: bool,
) -> None:  # fmt: skip
    from cnx_deploy.report.html.page import check_page, corrupt_error, gather, write_page

    check_page(html, force=force)
    bench, headroom, layers = documents
    page = gather(export_dir, engines_dir, bench=bench, headroom=headroom, layers=layers)
    write_page(html, page)
    if as_json:
        options.echo_json(page.to_dict(html))
    else:
        options.echo(html)
    if (error := corrupt_error(page, html)) is not None:
        options.fail(error, as_json=as_json)
