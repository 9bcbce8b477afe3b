"""What masked pre-training is asked for, what it says of an epoch and what it returns. Imports no Lightning.

Defaults are those of Woo et al., arXiv:2301.00808, appendix A.1, and of the reference code
(facebookresearch/ConvNeXt-V2, main_pretrain.py), except for the horizontal flip that the code has and the paper not.
"""

from dataclasses import dataclass, fields
from typing import Any

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import stage_sides
from cnx_deploy.training.fcmae.masking import masked_count
from cnx_deploy.training.records import EpochRecord, RunResult
from cnx_deploy.training.spec import RunSpec, TrainingSpec

__all__ = ["PretrainingRecord", "PretrainingResult", "PretrainingSpec"]

BETA2 = 0.95
WARMUP_EPOCHS = 40.0
WARMUP_SHARE = 0.05
"""40 of the reference's 800 epochs; shorter runs warm up for the same share."""


@dataclass(frozen=True, slots=True)
class PretrainingSpec(RunSpec):
    """What to pre-train; `RunSpec` has the rest.

    `data` is any folder of images, see `run.find_images_below`. A random crop is the only augmentation.
    `warmup_epochs` None: 40, or a twentieth of the epochs where those are fewer. A run is called
    `<variant>-fcmae-NNN`.

    Attributes:
        mask_ratio: Share of hidden patches.
        held_images: Kept out of training, at most a tenth of all; their loss under fixed masks says which weights are
            best.
        picture_every: Epochs between pictures of reconstructions; None makes about ten in a run.
    """

    epochs: int = 800
    batch_size: int = 64
    base_learning_rate: float = 1.5e-4
    min_crop_area: float = 0.2
    mask_ratio: float = 0.6
    held_images: int = 64
    picture_every: int | None = None

    def __post_init__(self) -> None:
        _ = self.training  # its own checks
        masked_count(self.patches, self.mask_ratio)
        for name in ("held_images", "picture_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")

    @property
    def training(self) -> TrainingSpec:
        """The same as far as training has it: AdamW, a cosine to zero, a random crop. Its head is unused."""
        shared = {field.name: getattr(self, field.name) for field in fields(RunSpec)}
        if self.learning_rate is not None:
            shared["base_learning_rate"] = None
        shared["warmup_epochs"] = self.resolved_warmup_epochs
        return TrainingSpec(**shared, beta2=BETA2, final_learning_rate=0.0, flip=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image, height and width."""
        return stage_sides(self.image_size, 3)

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def resolved_warmup_epochs(self) -> float:
        """The warm-up, or the default for so many epochs."""
        return min(WARMUP_EPOCHS, WARMUP_SHARE * self.epochs) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def resolved_picture_every(self) -> int:
        """Epochs between pictures."""
        return max(1, self.epochs // 10) if self.picture_every is None else self.picture_every

    def resolved(self) -> dict[str, Any]:
        """Everything, with the values that None stands for, for people to read."""
        return {
            **self.to_dict(),
            "optimizer": "adamw",
            "beta2": BETA2,
            "learning_rate": self.training.resolved_learning_rate,
            "warmup_epochs": self.resolved_warmup_epochs,
            "images_per_step": self.images_per_step,
            "patches": self.patches,
            "hidden_patches": masked_count(self.patches, self.mask_ratio),
        }


@dataclass(frozen=True, slots=True)
class PretrainingRecord(EpochRecord):
    """One epoch. Losses are mean squared errors of hidden patches, in units of each patch's variance.

    `held_loss`: of the held images, uncropped by chance and under the same masks in every epoch. `learning_rate`: the
    last step's. `images_per_second`: of training alone; `seconds`: of the whole epoch.
    """

    loss: float
    held_loss: float
    learning_rate: float
    images_per_second: float
    seconds: float

    @property
    def losses(self) -> tuple[float, float]:
        """Loss in training and on held images."""
        return self.loss, self.held_loss

    @property
    def rank(self) -> tuple[float, float]:
        """The lower the held loss the better."""
        return -self.held_loss, 0.0

    def summary(self, *, is_best: bool) -> str:
        """Losses and pace."""
        return (
            f"loss {self.loss:.4f}, held images {self.held_loss:.4f}{' (best)' if is_best else ''}, "
            f"{self.seconds:.1f} s, {self.images_per_second:.0f} images/s"
        )


@dataclass(frozen=True, slots=True)
class PretrainingResult(RunResult):
    """A pre-training run. Losses are None without a finished epoch; `best` and `last` are encoders without a head."""

    first_loss: float | None
    last_loss: float | None
    best_held_loss: float | None

    def summary(self) -> str:
        """The best weights, and how the losses fell."""
        if self.best is None:
            return RunResult.summary(self)
        return (
            f"{self.best}: loss {self.first_loss:.4f} in the first epoch, {self.last_loss:.4f} in the last of "
            f"{self.epochs_run}; held images {self.best_held_loss:.4f} at best"
        )
