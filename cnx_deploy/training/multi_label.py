"""Training several labels an image, as the shared loop runs it. Importing this module takes the `train` extra."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.tasks.multi_label_metrics import ScoreTable, ThresholdFit, fit_thresholds, measured
from cnx_deploy.training.classifier import LabelledModule
from cnx_deploy.training.loop import EpochClock
from cnx_deploy.training.records import MultiLabelRecord
from cnx_deploy.training.spec import TrainingSpec

__all__ = ["MultiLabelModule"]


class MultiLabelModule(LabelledModule):
    """Binary cross-entropy or asymmetric loss; mean average precision, and F1 at thresholds found on validation images.

    The thresholds of each epoch go into the header of its weights, so that both always belong together.
    """

    record_type = MultiLabelRecord

    def __init__(
        self, model: ConvNeXtV2, spec: TrainingSpec, train_images: int, metadata: dict[str, Any], **data: Any
    ) -> None:
        super().__init__(model, spec, train_images, metadata, **data)
        self.tables: dict[str, ScoreTable] = {}
        self.fits: dict[str, ThresholdFit] = {}

    def logits(self, network: ConvNeXtV2, images: Tensor) -> Tensor:
        """Run the network on normalised images (N, C, H, W) up to the logits (N, labels)."""
        return network.forward_outputs(images, ("logits",))["logits"]

    def on_validation_epoch_start(self) -> None:
        """Start the validation's sums and tables."""
        super().on_validation_epoch_start()
        self.tables = {split: ScoreTable(self.model.num_classes) for split in ("val", "ema")}

    def measure(self, split: str, logits: Tensor, targets: Tensor) -> None:
        """Keep the probabilities and labels of a batch."""
        self.tables[split].add(logits.sigmoid(), targets)

    def epoch_record(self, losses: dict[str, float], rate: float, clock: EpochClock) -> MultiLabelRecord:
        """Losses and metrics over all processes; each must call this."""
        figures: dict[str, tuple[float | None, float | None]] = {"val": (None, None), "ema": (None, None)}
        self.fits = {}
        for split in ("val", "ema") if self.averaged is not None else ("val",):
            table = self.tables[split]
            if self.spec.launch.processes > 1:
                table = _JointTable(table)
            self.fits[split] = fit_thresholds(table)
            result = measured(table, self.fits[split].thresholds, [""] * table.labels)
            figures[split] = (_percent(result.mean_average_precision), _percent(result.micro_f1))
        self.tables = {}  # and their files
        return MultiLabelRecord(
            epoch=self.current_epoch + 1,
            train_loss=losses["train"],
            val_loss=losses["val"],
            val_map_percent=figures["val"][0],
            val_f1_percent=figures["val"][1],
            ema_val_loss=losses["ema"] if self.averaged is not None else None,
            ema_val_map_percent=figures["ema"][0],
            ema_val_f1_percent=figures["ema"][1],
            learning_rate=rate,
            seconds=clock.seconds,
            images_per_second=clock.images_per_second,
            data_wait_percent=clock.wait_percent,
        )

    def metadata_of(self, suffix: str) -> dict[str, Any]:
        """The thresholds of these weights beside what all files of the run say."""
        return {**self.metadata, "thresholds": self.fits["ema" if suffix else "val"].thresholds}


class _JointTable(ScoreTable):
    """The tables of all processes as one; each has to read the blocks."""

    def __init__(self, own: ScoreTable) -> None:
        self.labels, self._own = own.labels, own
        counts = _gathered(own.count)
        self.count, self._most = sum(counts), max(counts)

    def blocks(self, images: int | None = None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for some, scores, held in self._own.blocks(self._most):
            parts = _gathered((scores, held))
            yield some, torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _gathered(value: Any) -> list[Any]:
    """The value of each process, in all of them."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _percent(share: float) -> float | None:
    """None where no validation image has a label."""
    return None if share != share else round(100.0 * share, 4)
