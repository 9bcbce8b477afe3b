"""`cnx-deploy report`."""

from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options

MANY: dict[str, Any] = {"multiple": True, "type": options.PATH}


@click.command()
@options.export_dir
@options.engines_dir
@click.option(
    "--readme", type=options.EXISTING, help="File with the table's place [default: README.md here, if it has one]."
)
@click.option("--check", is_flag=True, help="Write nothing; exit code 3 when something is out of date.")
@click.option("--html", type=options.PATH, help="Write one self-contained page instead (needs the extra report).")
@click.option("--bench", **MANY, help="For --html: bench --json.")
@click.option("--headroom", **MANY, help="For --html: diagnose headroom --json.")
@click.option("--layers", **MANY, help="For --html: diagnose layers --json.")
@options.force
@options.as_json
def report(
    export_dir: Path, engines_dir: Path, readme: Path | None, check: bool, html: Path | None, force: bool,
    as_json: bool, **documents: Any,
) -> None:  # fmt: skip
    """Write index.csv of both folders and the README's table from the manifests; or a page with --html.

    With --html: exit code 4, after the page is written, when a manifest could not be read.
    """
    if html is not None:
        if check or readme is not None:
            raise click.UsageError("--html writes a page and nothing else: leave out --check and --readme.")
        from cnx_deploy.report.html.page import check_page, corrupt_error, gather, write_page

        check_page(html, force=force)
        page = gather(export_dir, engines_dir, **documents)
        write_page(html, page)
        if as_json:
            options.echo_json(page.to_dict(html))
        else:
            options.echo(html)
        if (error := corrupt_error(page, html)) is not None:
            options.fail(error, as_json=as_json)
        return
    if force or any(documents.values()):
        raise click.UsageError("--bench, --headroom, --layers and --force are of the page: add --html FILE.")
    from cnx_deploy.report.records import check_records, has_place, write_records

    if readme is None and has_place(Path("README.md")):
        readme = Path("README.md")
    changed: list[Path] = []
    if check:
        check_records(export_dir, engines_dir, readme)
    else:
        changed = write_records(export_dir, engines_dir, readme)
    if as_json:
        options.echo_json({"changed": [str(path) for path in changed], "checked": check})
    else:
        for line in ["Records are up to date."] if check else changed:
            options.echo(line)
