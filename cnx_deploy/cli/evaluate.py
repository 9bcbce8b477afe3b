"""`cnx-deploy eval`."""

import contextlib
from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options


@click.command("eval")
@click.argument("artifact", type=options.PATH)
@click.argument("data", type=options.PATH)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Images run at once.")
@options.image_folder
@options.reduce_zero_label
@options.opened_model
@options.checkpoint_answer
@click.option("--fit-thresholds", type=options.FILE, help="Find thresholds of several labels and write them, as JSON.")
@click.option("--fit-temperature", is_flag=True, help="Find the number to divide the logits by, for export.")
@click.option("--plot", type=options.FILE, help="Draw confusion and reliability into an SVG file.")
@click.option(
    "--save-predictions", type=options.FILE,
    help="Write a CSV file with every image's five best classes, or its labels.",
)  # fmt: skip
@options.as_json
def evaluate_command(
    artifact: Path, data: Path, batch_size: int, image_folder: Path | None, reduce_zero_label: bool | None,
    class_names: Path | None, plot: Path | None, save_predictions: Path | None, fit_temperature: bool,
    fit_thresholds: Path | None, as_json: bool, **words: Any,
) -> None:  # fmt: skip
    """Accuracy, confusion and calibration, or of several labels mAP and F1, of ARTIFACT on DATA.

    ARTIFACT is a checkpoint, an ONNX file or an engine.

    DATA has a folder of images for each class, itself or in val/, validation/, valid/ or test/; or is a CSV file with
    the columns path and label, and split (train, val, test) where it holds more than the images to evaluate on. Its
    classes are found among the network's by name; a network without names takes them in sorted order, and says so.
    """
    from cnx_deploy.core.class_names import names_of
    from cnx_deploy.core.errors import InputError
    from cnx_deploy.core.plotting import check_plot
    from cnx_deploy.data import image_source
    from cnx_deploy.model.tasks.classification_metrics import PredictionWriter
    from cnx_deploy.verification.evaluation_plot import write_plot
    from cnx_deploy.verification.predict import open_predictor
    from cnx_deploy.verification.temperature import evaluate_model

    if plot is not None:
        check_plot(plot)
    # Made before the artifact is opened: a name that cannot be used ends the command at once.
    writer = PredictionWriter(save_predictions, data) if save_predictions is not None else None
    opened = open_predictor(artifact, many=True, class_names=names_of(class_names), **words)
    with opened as model, contextlib.ExitStack() as held:
        progress = held.enter_context(options.reporter("Evaluating"))
        for text in model.notes:
            options.note(f"Note: {text}")
        if plot is not None and model.task.takes_label_sets:
            raise InputError("Several labels an image have no confusion to draw. Leave --plot out.")
        images = image_source(data, image_folder, targets=model.task.targets, reduce_zero_label=bool(reduce_zero_label))
        found, fit = evaluate_model(
            model, images, fits_temperature=fit_temperature, fits_thresholds=fit_thresholds is not None,
            batch_size=batch_size,
            note=lambda text: options.note(f"Note: {text}"),
            progress=lambda done, total: progress(f"{done} of {total}", done / total),
            each=held.enter_context(writer).add if writer is not None else None,
        )  # fmt: skip
        info = model.runner.info
    if writer is not None:
        options.note(f"{writer.path}")
    if fit_thresholds is not None:
        options.note(f"{fit.save(fit_thresholds)}")
    if plot is not None:
        options.note(f"{write_plot(found, plot, f'{artifact.name} on {found.count} images of {data.name}')}")
    if as_json:
        backend = {"backend": info.backend, "version": info.version, "device": info.device}
        document = {"artifact": str(artifact), "data": str(data), **backend, **found.to_dict()}
        what = "thresholds" if fit_thresholds is not None else "temperature"
        document |= {what: fit.to_dict()} if fit is not None else {}
        assumed = [text for text in opened.notes if text.startswith("Assumed")]
        options.echo_json({**document, "notes": [*assumed, *document["notes"]]})
        return
    options.echo(f"{artifact} on {found.count} images of {data}, {info.backend} {info.version} on {info.device}")
    options.echo("\n".join(found.lines()))
    if fit is not None:
        options.echo(fit)
