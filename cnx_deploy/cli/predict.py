"""`cnx-deploy predict`."""

from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options
from cnx_deploy.cli.printable import one_line
from cnx_deploy.core.errors import InputError


@click.command()
@click.argument("artifact", type=options.PATH)
@click.argument("images", nargs=-1, required=True, type=options.PATH)
@options.top
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Images run at once.")
@options.opened_model
@options.checkpoint_answer
@options.outputs
@click.option("--save", type=options.FILE, help="Write everything the model gives to a .npz file, with the paths.")
@click.option("--draw", type=options.FOLDER, help="Draw classes of pixels, or boxes and masks of objects.")
@click.option(
    "--tiles", type=float, metavar="OVERLAP",
    help="Of segmentation: run pictures larger than the canvas in tiles that overlap by this share, such as 0.25.",
)  # fmt: skip
@click.option("--explain", type=options.FOLDER, help="Draw class maps into a folder: where a score comes from.")
@options.as_json
def predict(
    artifact: Path, images: tuple[Path, ...], top: int | None, batch_size: int, class_names: Path | None,
    save: Path | None, draw: Path | None, tiles: float | None, explain: Path | None, as_json: bool, **words: Any,
) -> None:  # fmt: skip
    """Predict for IMAGES (files, or folders of them) with ARTIFACT: a checkpoint, an ONNX file or an engine.

    A file that is no image gets a row that says so, and exit code 2 at the end. --task and --output choose what a
    checkpoint gives; a file gives what it was exported with.
    """
    from cnx_deploy.core.class_names import names_of
    from cnx_deploy.verification.predict import OutputsFile, find_image_files, open_predictor, predict_images

    words["class_names"] = names_of(class_names)
    files = find_image_files(images)
    rows: list[Any] = []
    consumers: list[Any] = []  # of the outputs of each batch
    with open_predictor(artifact, many=len(files) > 1, explains=explain is not None, **words) as model:
        for text in (*model.notes, *files.notes):
            options.note(f"Note: {text}")
        if save is not None:
            consumers.append(OutputsFile(save))
        if explain is not None:
            from cnx_deploy.verification.explain import Explanations

            consumers.append(Explanations(model, explain))

        drawn = None
        if draw is not None:
            from cnx_deploy.verification.pictures import Pictures

            drawn = Pictures(model, files, draw)
        if tiles is not None and consumers:
            raise InputError(
                "Tiles give one map a picture, and --save keeps outputs of one size. Leave one of them out."
            )

        def consume(batch: Any, outputs: Any) -> None:
            for consumer in consumers:
                consumer.add(batch, outputs)

        for row in predict_images(model, files, top=top, batch_size=batch_size, each=consume, tiles=tiles):
            if drawn is not None:
                drawn.add(len(rows), row)
            rows.append(row.to_dict())  # without maps of pixels, which a dense task adds
            if not as_json:
                options.echo(one_line(f"{row.path}: {row}"))
    for consumer in (*consumers, *([drawn] if drawn is not None else [])):
        options.note(consumer.finish())
    for text in files.observed():
        options.note(f"Note: {text}")
    if as_json:
        notes = [*model.notes, *files.notes, *files.observed()]
        options.echo_json({"artifact": str(artifact), "predictions": rows, "notes": notes})
    if failed := sum(row["error"] is not None for row in rows):
        options.note(f"Error: {failed} of {len(rows)} files have no answer.")
        raise click.exceptions.Exit(InputError.exit_code)
