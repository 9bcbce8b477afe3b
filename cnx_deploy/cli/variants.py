"""`cnx-deploy variants`."""

import click

from cnx_deploy.cli import options
from cnx_deploy.core.variants import ALL_VARIANTS


@click.command("variants")
@options.as_json
def variants_command(as_json: bool) -> None:
    """The sizes of V2 and V1: parameters and MACs (own count, 224 px, 1000 classes), top-1 as the papers publish it."""
    rows = [
        {
            "variant": entry.name,
            "depths": list(entry.depths),
            "dims": list(entry.dims),
            "parameters": entry.parameter_count,
            "macs_224": entry.mac_count(),
            "published_top1_percent": entry.published_top1_percent,
            "version": entry.version,
        }
        for entry in ALL_VARIANTS.values()
    ]
    if as_json:
        source = "arXiv:2301.00808, tables 4 and 14; V1 small: arXiv:2201.03545, table 1 (published figures)"
        options.echo_json({"variants": rows, "source": source})
        return
    options.echo(
        f"{'variant':9} {'depths':>10} {'width':>6} {'parameters':>12} {'GMAC 224 px':>12} {'top-1 % (paper)':>16}"
    )
    for entry in ALL_VARIANTS.values():
        depths = "-".join(str(depth) for depth in entry.depths)
        top1 = "–" if entry.published_top1_percent is None else f"{entry.published_top1_percent:.1f}"
        macs = entry.mac_count() / 1e9
        options.echo(
            f"{entry.name:9} {depths:>10} {entry.dims[0]:>6} {entry.parameter_count:>12,} {macs:>12.3f} {top1:>16}"
        )
