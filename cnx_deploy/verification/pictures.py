"""What a dense model says of pictures, as files: a class for each pixel as a palette PNG, an overlay, or objects."""

import re
from pathlib import Path

import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.data import ImageSource, pixels_of
from cnx_deploy.data.label_maps import overlaid, save_label_map, save_picture, sheet
from cnx_deploy.data.object_pictures import DRAWN_FROM, drawn_objects
from cnx_deploy.model.tasks.base import Prediction
from cnx_deploy.model.tasks.detection import DetectionPrediction
from cnx_deploy.model.tasks.detection_metrics import pasted
from cnx_deploy.model.tasks.segmentation import MapPrediction
from cnx_deploy.verification.predict import Model

__all__ = ["Pictures"]


class Pictures:
    """Files of predictions in a folder, at the size of each picture; a file of the same name is replaced.

    Of segmentation `NNNN-name.png` holds the class of each pixel as the palette's index, and `NNNN-name-overlay.png`
    the picture under the classes' colours. Of detection `NNNN-name-objects.png` is the picture with boxes, masks and
    names of the objects from a probability of one half on. Raises InputError for a task whose answers are no pictures.
    """

    def __init__(self, model: Model, images: ImageSource, folder: Path) -> None:
        if not model.task.is_dense:
            raise InputError(
                f"Pictures are drawn of classes of pixels and of objects, and the task {model.task.name} gives none. "
                "Leave --draw (draw) out."
            )
        self.model, self.images, self.folder = model, images, folder
        self.written: list[Path] = []

    def add(self, index: int, prediction: Prediction) -> None:
        """Draw the answer to image number `index` of the source; one that could not be read has none."""
        if prediction.error is not None or (isinstance(prediction, MapPrediction) and prediction.labels is None):
            return
        picture = self.images.picture(index, self.model.preprocessing)
        assert picture is not None
        name = re.sub(r"[^\w.-]", "_", Path(prediction.path).stem)[:80]
        stem = f"{index:04d}-{name}"
        if isinstance(prediction, DetectionPrediction):
            drawn = drawn_objects(picture, _objects(prediction, picture.size), self._names(prediction))
            save_picture(self.folder / f"{stem}-objects.png", sheet([[drawn]]))
            self.written.append(self.folder / f"{stem}-objects.png")
        elif isinstance(prediction, MapPrediction):
            save_label_map(self.folder / f"{stem}.png", prediction.labels)
            overlay = overlaid(pixels_of(picture), prediction.labels)
            save_picture(self.folder / f"{stem}-overlay.png", sheet([[overlay]]))
            self.written += [self.folder / f"{stem}.png", self.folder / f"{stem}-overlay.png"]

    def finish(self) -> str:
        """Say what was drawn."""
        what = "classes by palette index, and overlays" if self.model.task.targets == "masks" else "objects on pictures"
        return f"{len(self.written)} files in {self.folder}: {what}"

    def _names(self, prediction: DetectionPrediction) -> dict[int, str]:
        return {one.index: one.name for one in prediction.detections}


def _objects(prediction: DetectionPrediction, size: tuple[int, int]) -> dict[str, Tensor]:
    """The objects that are drawn, with masks of the picture's width and height `size`."""
    shown = [at for at, one in enumerate(prediction.detections) if one.probability >= DRAWN_FROM]
    chosen = [prediction.detections[at] for at in shown]
    objects = {
        "boxes": torch.tensor([one.box for one in chosen]).reshape(-1, 4),
        "labels": torch.tensor([one.index for one in chosen], dtype=torch.int64),
        "scores": torch.tensor([one.probability for one in chosen]),
    }
    if prediction.masks is not None:
        objects["masks"] = pasted(torch.from_numpy(prediction.masks[shown]), objects["boxes"], size[::-1])
    return objects
