"""`cnx-deploy eval`."""

from pathlib import Path

import click

from cnx_deploy.cli import options


@click.command("eval")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(file_okay=False, path_type=Path))
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Images run at once.")
@options.as_json
def evaluate_command(artifact: Path, data: Path, batch_size: int, as_json: bool) -> None:
    """Top-1 and top-5 of ARTIFACT (a checkpoint, an ONNX file or an engine) on DATA.

    DATA has a folder of images for each class, itself or in val/ or test/.
    """
    from cnx_deploy.evaluation import evaluate
    from cnx_deploy.prediction import open_classifier

    with open_classifier(artifact, many=True) as classifier, options.reporter("Evaluating") as progress:
        for text in classifier.notes:
            options.note(f"Note: {text}")
        found = evaluate(
            classifier.runner,
            data,
            classifier.preprocessing,
            batch_size=batch_size,
            class_names=classifier.class_names,
            progress=lambda done, total: progress(f"{done} of {total} images", done / total),
        )
    info = classifier.runner.info
    if as_json:
        backend = {"backend": info.backend, "version": info.version, "device": info.device}
        options.echo_json({"artifact": str(artifact), "data": str(data), **backend, **found.to_dict()})
        return
    click.echo(f"{artifact} on {found.count} images of {data}, {info.backend} {info.version} on {info.device}")
    click.echo(f"top-1 {found.top1_percent:.2f} %, top-5 {found.top5_percent:.2f} %")
    for entry in found.per_class:
        click.echo(f"  {entry.name:24} {entry.correct:>6} of {entry.count}")
