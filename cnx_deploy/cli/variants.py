"""`cnx-deploy variants`."""

import click

from cnx_deploy.cli import options
from cnx_deploy.variants import VARIANTS


@click.command("variants")
@options.as_json
def variants_command(as_json: bool) -> None:
    """The eight sizes: parameters and MACs (own count, 224 px, 1000 classes), top-1 as the paper publishes it."""
    rows = [
        {
            "variant": entry.name,
            "depths": list(entry.depths),
            "dims": list(entry.dims),
            "parameters": entry.parameter_count,
            "macs_224": entry.mac_count(),
            "published_top1_percent": entry.published_top1_percent,
        }
        for entry in VARIANTS.values()
    ]
    if as_json:
        options.echo_json({"variants": rows, "source": "arXiv:2301.00808, table 14 and table 4 (published figures)"})
        return
    click.echo(
        f"{'variant':8} {'depths':>10} {'width':>6} {'parameters':>12} {'GMAC 224 px':>12} {'top-1 % (paper)':>16}"
    )
    for entry in VARIANTS.values():
        depths = "-".join(str(depth) for depth in entry.depths)
        macs = entry.mac_count() / 1e9
        click.echo(
            f"{entry.name:8} {depths:>10} {entry.dims[0]:>6} {entry.parameter_count:>12,} {macs:>12.3f} "
            f"{entry.published_top1_percent:>16.1f}"
        )
