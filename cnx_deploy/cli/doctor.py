"""`cnx-deploy doctor`."""

from dataclasses import asdict
from pathlib import Path

import click

from cnx_deploy.cli import options


@click.command("doctor")
@options.as_json
def doctor_command(as_json: bool) -> None:
    """Say what this machine can and cannot do, and what would change that. The exit code is 0 whatever is found."""
    from cnx_deploy.report.doctor import examine

    findings = examine(Path())
    if as_json:
        options.echo_json({"findings": [asdict(finding) for finding in findings]})
        return
    for finding in findings:
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        options.echo(f"{finding.status:8} {finding.topic:17} {finding.what}{remedy}")
