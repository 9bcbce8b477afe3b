"""What a dense model says of pictures, as files: a class for each pixel as a palette PNG, and an overlay."""

import re
from pathlib import Path

from cnx_deploy.core.errors import InputError
from cnx_deploy.data import ImageSource, pixels_of
from cnx_deploy.data.label_maps import overlaid, save_label_map, save_picture, sheet
from cnx_deploy.model.tasks.base import Prediction
from cnx_deploy.model.tasks.segmentation import MapPrediction
from cnx_deploy.verification.predict import Model

__all__ = ["Pictures"]


class Pictures:
    """Files of predictions in a folder, at the size of each picture; a file of the same name is replaced.

    Of segmentation `NNNN-name.png` holds the class of each pixel as the palette's index, and `NNNN-name-overlay.png`
    the picture under the classes' colours. Raises InputError for a task whose answers are no pictures.
    """

    def __init__(self, model: Model, images: ImageSource, folder: Path) -> None:
        if model.task.targets != "masks":
            raise InputError(
                f"Pictures are drawn of a class for each pixel, and the task {model.task.name} gives none. Leave "
                "--draw (draw) out."
            )
        self.model, self.images, self.folder = model, images, folder
        self.written: list[Path] = []

    def add(self, index: int, prediction: Prediction) -> None:
        """Draw the answer to image number `index` of the source; one that could not be read has none."""
        if not isinstance(prediction, MapPrediction) or prediction.labels is None:
            return
        picture = self.images.picture(index, self.model.preprocessing)
        assert picture is not None
        name = re.sub(r"[^\w.-]", "_", Path(prediction.path).stem)[:80]
        stem = f"{index:04d}-{name}"
        pixels = pixels_of(picture)
        save_label_map(self.folder / f"{stem}.png", prediction.labels)
        save_picture(self.folder / f"{stem}-overlay.png", sheet([[overlaid(pixels, prediction.labels)]]))
        self.written += [self.folder / f"{stem}.png", self.folder / f"{stem}-overlay.png"]

    def finish(self) -> str:
        """Say what was drawn."""
        return f"{len(self.written)} files in {self.folder}: classes by palette index, and overlays"
