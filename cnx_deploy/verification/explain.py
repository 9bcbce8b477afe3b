"""Where in an image a class gets its score from, as a picture: class maps of any artifact, Grad-CAM of a checkpoint.

A class map is an output of the network itself (`model.tasks.pooled`): its mean over the positions is the class's logit.
Grad-CAM is another question's answer, drawn beside it for comparison: it holds no statistics of the LayerNorm, leaves
out the bias and cuts what speaks against the class. Its sum is no score.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.files import whole_file
from cnx_deploy.core.plotting import STYLE, require_packages
from cnx_deploy.data import ImageBatch
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.tasks.classification_metrics import class_scores
from cnx_deploy.model.tasks.multi_label_metrics import probabilities_of
from cnx_deploy.runners.pytorch import TorchRunner

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cnx_deploy.verification.predict import Model

__all__ = ["Explanations", "grad_cam"]

OUTPUT, WORD = "class_maps", "class-maps"


class Explanations:
    """Pictures of class maps in a folder, one an image, made while batches are answered; see `predict_images`.

    Args:
        model: gives class maps and the scores of all classes, and beside them of a checkpoint Grad-CAM.
        folder: is made where it is missing; a picture of the same name is replaced.
        top: best classes that are drawn of an image.

    Raises InputError for a model without class maps or scores, MissingRequirementError without matplotlib.
    """

    def __init__(self, model: "Model", folder: Path, top: int = 3) -> None:
        require_packages("matplotlib")
        if OUTPUT not in model.output_names or model.task.class_output_of(model.output_names) is None:
            raise InputError(
                f"Pictures are drawn of class maps and scores, and this file gives {', '.join(model.output_names)}. "
                f"Export it with --output logits --output {WORD}."
            )
        self.model, self.folder, self.top = model, folder, top
        self.written: list[Path] = []
        self._network = None
        if isinstance(model.runner, TorchRunner):
            modules = model.runner.module.modules()
            self._network = next((module for module in modules if isinstance(module, ConvNeXtV2)), None)

    def add(self, batch: ImageBatch, outputs: Mapping[str, Tensor]) -> None:
        """Draw the images of a batch: the picture, its best classes' maps, and Grad-CAM of the best of all."""
        scores = class_scores(outputs)
        assert scores is not None
        shares = probabilities_of(outputs) if self.model.task.takes_label_sets else scores.softmax(dim=1)
        best = shares.topk(min(self.top, shares.shape[1]), dim=1)
        pixels = self._pixels(batch.images[: len(batch)])
        cams = None
        if self._network is not None:
            preprocessing = self.model.preprocessing
            device = next(self._network.parameters()).device
            cams = grad_cam(self._network, normalise(pixels.to(device), preprocessing), best.indices[:, 0].to(device))
        names = self.model.class_names
        for at, path in enumerate(batch.names):
            rows = [
                (names[index] if names else str(index), share, outputs[OUTPUT][at, index].numpy())
                for index, share in zip(best.indices[at].tolist(), best.values[at].tolist(), strict=True)
            ]
            words = (pixels[at].numpy(), rows, None if cams is None else cams[at].cpu().numpy())
            self.written.append(_written(self.folder, batch.indices[at], path, *words))

    def finish(self) -> str:
        """Say what was drawn."""
        beside = ", Grad-CAM beside them" if self._network is not None else ""
        return f"{len(self.written)} pictures of class maps in {self.folder}{beside}"

    def _pixels(self, images: Tensor) -> Tensor:
        """The runner's images as (N, H, W, C) uint8 again."""
        if self.model.runner.input_spec.kind == "uint8":
            return images.cpu()
        return (images.cpu().permute(0, 2, 3, 1) * 255.0).round().to(torch.uint8)


def grad_cam(network: ConvNeXtV2, images: Tensor, classes: Tensor) -> Tensor:
    """Gradient-weighted class activation maps of the last stage: (N, C, H, W) normalised -> (N, h, w), at least 0.

    `classes` (N,) are indices. Source: Selvaraju et al., "Grad-CAM", arXiv:1610.02391, equations 1 and 2.
    """
    kept: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    handle = network.stages[3].register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = network.forward_outputs(images, ("logits",))["logits"]
            (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), kept[0])
    finally:
        handle.remove()
    weights = gradient.mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
    return (weights * kept[0].detach()).sum(dim=1).clamp_min(0.0)


Row = tuple[str, float, "np.ndarray[Any, Any]"]
"""A class, its probability and its map (h, w)."""


def _written(folder: Path, index: int, name: str, pixels: Any, rows: Sequence[Row], cam: Any) -> Path:
    """The picture's path. Its name is the image's, and the place among the images keeps two of one name apart."""
    from matplotlib import style

    stem = re.sub(r"[^\w.-]", "_", Path(name).stem)[:80]
    path = folder / f"{index:04d}-{stem}.png"
    with style.context(["default", {**STYLE, "axes.grid": False}]), whole_file(path) as temporary:
        _figure(pixels, rows, cam).savefig(
            temporary, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None}
        )
    return path


def _figure(pixels: Any, rows: Sequence[Row], cam: Any) -> "Figure":
    from matplotlib.figure import Figure

    columns = 1 + len(rows) + (cam is not None)
    height, width = pixels.shape[:2]
    figure = Figure(figsize=(2.6 * columns, 2.6 * height / width + 0.75), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.set(xticks=[], yticks=[])
        for spine in each.spines.values():
            spine.set_visible(False)
    picture = pixels if pixels.shape[2] == 3 else np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    axes[0].imshow(picture.astype(np.uint8))
    positions = "x".join(map(str, rows[0][2].shape))
    axes[0].set_title(f"as the network sees it\n{positions} positions")
    grey = picture.mean(axis=2)
    limit = max(float(np.abs(values).max()) for _, _, values in rows) or 1.0
    shown: Any = None
    for axis, (name, share, values) in zip(axes[1:], rows, strict=False):
        shown = _overlay(axis, grey, values, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_title(f"{_short(name)} {share:.1%}\nmean of the map {values.mean():.2f}")
    figure.colorbar(shown, ax=axes[1 : 1 + len(rows)], shrink=0.8, label="logit")
    if cam is not None:
        shown = _overlay(axes[-1], grey, cam, cmap="magma", vmin=0.0, vmax=float(cam.max()) or 1.0)
        axes[-1].set_title(f"Grad-CAM of {_short(rows[0][0])}\nno score, for comparison")
    return figure


def _overlay(axis: "Axes", grey: Any, values: Any, **scale: Any) -> Any:
    """The picture in grey under a map, which is enlarged by linear interpolation."""
    height, width = grey.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=extent)
    return axis.imshow(values, alpha=0.55, extent=extent, interpolation="bilinear", **scale)


def _short(name: str) -> str:
    plain = name if len(name) <= 18 else f"{name[:17]}…"
    return plain.replace("$", r"\$")
